"""What a client is set up with. What cannot be meant is refused by its name, before anything is connected.

Every function returns what it was given. Raises InvalidInput.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeVar

from prefillshare.kvshare.errors import InvalidInput

T = TypeVar("T")
#: A hundred years, which gRPC's clock can hold.
LONGEST_S = 100 * 365 * 86400


def seconds(value: Any, field: str, *, or_none_at_all: bool = False) -> float:
    """`or_none_at_all`: 0 is meant, too."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (fits and 0 <= value <= LONGEST_S) or (value == 0 and not or_none_at_all):
        least = "from 0 on" if or_none_at_all else "above 0"
        raise InvalidInput(f"{value!r:.60} is no time", field=field, fix=f"give a number of seconds {least}")
    return value


def count(value: Any, field: str) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise InvalidInput(f"{value!r:.60} is no count", field=field, fix="give a whole number from 0 on")
    return value


def text(value: Any, field: str, fix: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidInput(f"{value!r:.60} is no text" if value != "" else "it is empty", field=field, fix=fix)
    return value


def one_of(value: T, kind: type[T], field: str, fix: str) -> T:
    if not isinstance(value, kind):
        raise InvalidInput(f"{value!r:.60} does not fit", field=field, fix=fix)
    return value
