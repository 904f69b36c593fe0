"""asyncio on a virtual clock: when all tasks wait, time jumps to the next timer. Nothing sleeps, and runs repeat exactly."""

import asyncio
import functools
import selectors
from collections.abc import Coroutine
from typing import Any


class _Selector(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise RuntimeError("everybody waits and no timer is set: this would never end")
        self.now += max(timeout, 0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def jump(self, seconds: float) -> None:
        """As if the process had stood still for so long."""
        self._virtual.now += seconds


def run(main: Coroutine) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def clock() -> float:
    return asyncio.get_running_loop().time()


def on_virtual_time(test):
    """Decorator: an async test becomes a plain one that runs on virtual time."""

    @functools.wraps(test)
    def plain(*args, **kwargs):
        run(test(*args, **kwargs))

    return plain


async def settle() -> None:
    """Let all tasks run that can run now."""
    for _ in range(10):
        await asyncio.sleep(0)
