"""Ways to break a replica."""

from __future__ import annotations

from contextlib import contextmanager

import psutil


def processes(running, pool: str, replica: str) -> list[psutil.Process]:
    """The replica's own process, then its engine's."""
    parent = psutil.Process(running.info()[pool][replica]["pid"])
    return [parent, *parent.children(recursive=True)]


@contextmanager
def stopped(victims: list[psutil.Process]):
    """They hang meanwhile."""
    for process in victims:
        process.suspend()
    try:
        yield
    finally:
        for process in victims:
            process.resume()
