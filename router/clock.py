"""The router's clock. Code that measures time, or waits for a point in time, reads it here, so that tests can control time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_source: Callable[[], float] = time.monotonic


def now() -> float:
    """Seconds since an arbitrary but fixed moment."""
    return _source()


@contextmanager
def taken_from(source: Callable[[], float]) -> Iterator[None]:
    """Within this context, `now` reads `source`."""
    global _source
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before
