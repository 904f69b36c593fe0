"""Waiting for what happens by itself: ask again until it is so."""

import asyncio
from collections.abc import Awaitable, Callable

#: Guards against a test that never ends; no claim is made about it.
PATIENCE_S = 60


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.01)
