"""A gate of fixed width: waiting callers are let in tenant by tenant, so that no tenant keeps the others out."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prefillshare.kvshare.errors import Overloaded


class FairGate:
    """`width`: callers inside at once. `most_waiting`: waiting callers of one tenant; more are refused. One event loop."""

    def __init__(self, what: str, width: int, most_waiting: int):
        self._what, self._free, self._most_waiting = what, width, most_waiting
        #: Tenant -> its waiting callers, in the order in which tenants are served; a served tenant moves to the end.
        self._waiting: OrderedDict[str, deque[asyncio.Future]] = OrderedDict()

    @asynccontextmanager
    async def enter(self, tenant: str) -> AsyncIterator[None]:
        """Be inside while the block runs. Raises Overloaded."""
        await self.join(tenant)
        try:
            yield
        finally:
            self.leave()

    async def join(self, tenant: str) -> None:
        """Wait to be let in; the caller is inside until it calls `leave`. Raises Overloaded."""
        if self._free and not self._waiting:
            self._free -= 1
            return
        mine = self._waiting.setdefault(tenant, deque())
        if len(mine) >= self._most_waiting:
            text = f"{len(mine)} requests of this tenant wait for {self._what} already"
            raise Overloaded(text, retry_after_s=1.0, fix="try again in 1 s, or send fewer at once")
        turn = asyncio.get_running_loop().create_future()
        mine.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in while it was being cancelled
                self.leave()
            else:
                mine.remove(turn)
                if not mine and self._waiting.get(tenant) is mine:
                    del self._waiting[tenant]
            raise

    def leave(self) -> None:
        while self._waiting:
            tenant, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[tenant] = turns
            if not turn.done():
                return turn.set_result(None)
        self._free += 1
