"""Ledgers and limits that one suite of tests runs on, in memory and in Redis, and how time passes for each."""

import uuid
from datetime import date

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.accounts.ledger import Ledger, MemoryLedger
from prefillshare.router.accounts.limits import Limits, MemoryLimits
from prefillshare.router.accounts.redis_ledger import RedisLedger
from prefillshare.router.accounts.redis_limits import RedisLimits
from prefillshare.router.clock import taken_from
from prefillshare.router.redis_calls import RedisCalls


class InMemory:
    """`today`: the ledger's day. `now`: the limits' clock, seconds."""

    def __init__(self):
        self.today, self.now, self.registry = date(2026, 5, 1), 0.0, CollectorRegistry()
        self._clock = taken_from(lambda: self.now)
        self._clock.__enter__()

    def ledger(self, keep_days: int = 400) -> Ledger:
        return MemoryLedger(keep_days, lambda: self.today)

    def limits(self) -> Limits:
        return MemoryLimits(Metrics(self.registry))

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds

    async def close(self) -> None:
        self._clock.__exit__(None, None, None)


class InRedis:
    """One deployment on a server. Each store that is made is another router's. Time passes for limits by moving all that is
    stored into the past."""

    def __init__(self, url: str):
        self.today, self.url, self.prefix, self._open = date(2026, 5, 1), url, uuid.uuid4().hex, []
        self.registries: list[CollectorRegistry] = []

    @property
    def registry(self) -> CollectorRegistry:
        return self.registries[-1]

    def calls(self) -> RedisCalls:
        self._open.append(RedisCalls(self.url, "store of accounts", prefix=self.prefix))
        return self._open[-1]

    def _metrics(self) -> Metrics:
        self.registries.append(CollectorRegistry())
        return Metrics(self.registry)

    def ledger(self, keep_days: int = 400) -> RedisLedger:
        made = RedisLedger(self.calls(), keep_days, self._metrics(), lambda: self.today)
        self._open.append(made)
        return made

    def limits(self) -> RedisLimits:
        made = RedisLimits(self.calls(), self._metrics())
        self._open.append(made)
        return made

    async def pass_time(self, seconds: float) -> None:
        by = round(seconds * 1000)
        async with Redis.from_url(self.url) as redis:
            for key in await redis.keys(f"{{{self.prefix}}}:limits:*:levels"):
                for field in await redis.hkeys(key):
                    if field.endswith(b"_at"):
                        await redis.hincrby(key, field, -by)
            for key in await redis.keys(f"{{{self.prefix}}}:limits:*:turns"):
                for turn in await redis.zrange(key, 0, -1):
                    await redis.zincrby(key, -by, turn)

    async def close(self) -> None:
        while self._open:
            await self._open.pop().close()
