"""Waits for a condition by asking for it again and again."""

import asyncio
from collections.abc import Awaitable, Callable

#: Seconds. Guards against a test that never ends; it is no requirement.
PATIENCE_S = 60


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.01)
