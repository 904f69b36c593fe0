"""Questions that a router asks replicas from time to time, in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from prefillshare.router.background import Background


class Questions:
    """The questions of one pool, at most one of each kind at a time."""

    def __init__(self, pool: str, background: Background):
        self._pool, self._background = pool, background
        self._asking: dict[str, asyncio.Task] = {}

    def ask(self, what: str, question: Coroutine) -> None:
        """`what`: the question's kind. While one of this kind is being asked, another one is dropped."""
        if what in self._asking:
            question.close()
            return
        task = self._asking[what] = self._background.start("replica_question", question, pool=self._pool, question=what)
        task.add_done_callback(lambda _: self._asking.pop(what, None))

    async def stop(self) -> None:
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
