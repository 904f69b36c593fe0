"""The ledger in Redis: one for all routers, kept when any of them ends, and exact whatever ends.

1. What turns add is gathered into a batch, one figure per tenant and decoder, however many turns there are.
2. One task writes the batches, one after the other and each with its number, as soon as there is something to write. What is
   added during a write goes into the next batch, so at most one write is under way.
3. The script adds a batch only if its number is higher than the last one of this router: a write whose answer was lost is
   repeated without being counted twice.
4. Turns pass a token on only when the batch that counts it has been written (`written`). So the ledger has all that any client
   has seen, even if the router is killed; beyond that, it may have the tokens of one step that were not sent any more.
5. A write that does not succeed in PATIENCE_S puts the ledger `behind`: turns wait no longer, batches gather in memory, and the
   write is tried again until it succeeds. If the router ends before that, they are lost.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import date

from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router import clock
from prefillshare.router.accounts import scripts
from prefillshare.router.accounts.figures import NOTHING, Figures, Place, Row
from prefillshare.router.accounts.ledger import Ledger, today
from prefillshare.router.background import Background
from prefillshare.router.redis_calls import RedisCalls

logger = logging.getLogger(__name__)

#: Longest time that a token waits for its batch to be written, seconds; times of other calls, and of the end.
PATIENCE_S, CALL_S, CLOSE_S = 0.25, 2.0, 5.0
#: Pause between tries to write, seconds.
PAUSE_S = 0.5
#: After how long a router that writes nothing is forgotten: later than any write is still repeated.
ROUTER_S = 30 * 24 * 3600

Batch = dict[Place, Figures]


class RedisLedger(Ledger):
    def __init__(self, calls: RedisCalls, keep_days: int, metrics: Metrics, day: Callable[[], date] = today):
        super().__init__(keep_days, day)
        self._calls, self._router, self._number = calls, uuid.uuid4().hex, 0
        self._pending: Batch = {}
        #: Set once the batch that is being gathered, or the one under way, has been written or is not waited for any more.
        self._gathered, self._under_way = asyncio.Event(), _set()
        #: Set while there is nothing to write.
        self._idle = _set()
        #: When the oldest of what is not written was added.
        self._since: float | None = None
        self.is_behind = False
        #: Key that keeps the ledger from being written.
        self._damaged: bytes | None = None
        self._wake, self._tidied = asyncio.Event(), None
        metrics["usage_unwritten_seconds"].set_function(self._unwritten_s)
        self._background = Background(metrics)
        self._task = asyncio.create_task(self._write_batches())

    def add(self, tenant: str, decoder: str, used: Figures) -> None:
        place = Place(self._day(), tenant, decoder)
        self._pending[place] = self._pending.get(place, NOTHING).plus(used)
        if self._since is None:
            self._since = clock.now()
        self._idle.clear()
        self._wake.set()

    async def written(self) -> None:
        if not self.is_behind:
            await (self._gathered if self._pending else self._under_way).wait()

    async def rows(self, since: date | None = None, until: date | None = None) -> list[Row]:
        await self.written()
        first, last = max(since or self._first_day, self._first_day), until or date.max
        wanted = [day for day in await self._days() if first <= day <= last]
        told = await self._calls.run(scripts.READ, [self._day_key(day) for day in wanted], (), CALL_S) if wanted else []
        return sorted(row for day, fields in zip(wanted, told, strict=True) for row in _rows(day, fields))

    async def close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._idle.wait()
        except TimeoutError:
            logger.error("the store of usage has not answered for %.0f s; what came meanwhile is lost", self._unwritten_s())
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._background.stop()

    async def _write_batches(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                batch, self._pending = self._pending, {}
                self._under_way, self._gathered = self._gathered, asyncio.Event()
                self._number += 1
                await self._write(*self._packed(batch))
                self._since = clock.now() if self._pending else None
                self._under_way.set()
            self._idle.set()
            if self._tidied != (day := self._day()):
                self._tidied = day
                self._background.start("usage_tidying", self._tidy())

    async def _write(self, keys: list[str], args: list) -> None:
        """Until it is written."""
        timeout_s = PATIENCE_S
        while not await self._is_written(keys, args, timeout_s):
            self.is_behind, timeout_s = True, CALL_S
            self._under_way.set()
            self._gathered.set()
            await asyncio.sleep(PAUSE_S)
        if self.is_behind:
            self.is_behind, self._gathered = False, asyncio.Event()

    async def _is_written(self, keys: list[str], args: list, timeout_s: float) -> bool:
        try:
            answer = await self._calls.run(scripts.WRITE, keys, args, timeout_s)
        except Unavailable:
            return False  # the calls have logged it
        except Exception:  # if the task ended, turns would wait for it for ever
            logger.exception("usage is not written")
            return False
        damaged = answer[1] if answer[0] != b"ok" else None
        if damaged and damaged != self._damaged:
            logger.error("%r in Redis is not as this program writes it; usage stays in memory until it is removed", damaged)
        self._damaged = damaged
        return damaged is None

    def _packed(self, batch: Batch) -> tuple[list[str], list]:
        days = sorted({place.day for place in batch})
        keys = [self._calls.key("usage", "routers"), self._calls.key("usage", "days"), *map(self._day_key, days)]
        args = [self._router, self._number, len(days), *(day.isoformat() for day in days)]
        for place, figures in batch.items():
            number = days.index(place.day) + 1
            for figure, amount in zip(Figures._fields, figures, strict=True):
                if amount:
                    args += (number, f"{place.tenant}/{place.decoder}:{figure}", amount)
        return keys, args

    async def _tidy(self) -> None:
        """Forget old days; if Redis does not answer, after the next batch."""
        try:
            old = [day for day in await self._days() if day < self._first_day]
            keys = [self._calls.key("usage", "routers"), self._calls.key("usage", "days"), *map(self._day_key, old)]
            await self._calls.run(scripts.FORGET, keys, [ROUTER_S, *(day.isoformat() for day in old)], CALL_S)
        except Unavailable:
            self._tidied = None

    async def _days(self) -> list[date]:
        days = []
        for day in await self._calls.run(scripts.DAYS, [self._calls.key("usage", "days")], (), CALL_S):
            with suppress(ValueError):
                days.append(date.fromisoformat(day.decode()))
        return sorted(days)

    def _day_key(self, day: date) -> str:
        return self._calls.key("usage", day.isoformat())

    def _unwritten_s(self) -> float:
        return 0.0 if self._since is None else clock.now() - self._since


def _rows(day: date, fields: list[bytes]) -> list[Row]:
    found: dict[Place, dict[str, int]] = {}
    for name, number in zip(fields[::2], fields[1::2], strict=True):
        who, _, figure = name.decode().partition(":")
        tenant, _, decoder = who.partition("/")
        if figure in Figures._fields:  # a later version may count more
            found.setdefault(Place(day, tenant, decoder), {})[figure] = int(number)
    return [Row(place, Figures(**figures)) for place, figures in found.items()]



def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
