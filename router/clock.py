"""What time it is in a router. Whoever measures, or waits for a time to come, asks here: a test can so let time pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_source: Callable[[], float] = time.monotonic


def now() -> float:
    """Seconds since some moment that stays the same."""
    return _source()


@contextmanager
def taken_from(source: Callable[[], float]) -> Iterator[None]:
    """Inside, that is the time."""
    global _source
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before
