"""What a stage has found, and how it tells its supervisor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    PASSED, FAILED, MEASURED = "passed", "failed", "measured"
    #: The stage ended before it came to a result, or was not begun.
    UNFINISHED, SKIPPED = "unfinished", "skipped"


@dataclass(frozen=True)
class Part:
    """One result. `found`: one line for people. `figures`: for programs."""

    name: str
    status: Status
    found: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    done: int
    total: int
    what: str


Tell = Callable[[Part | Progress], None]


def line(told: Part | Progress) -> str:
    return json.dumps({type(told).__name__: asdict(told)})


def parse(text: str) -> Part | Progress:
    ((kind, fields),) = json.loads(text).items()
    if kind == Progress.__name__:
        return Progress(**fields)
    return Part(**fields | {"status": Status(fields["status"])})
