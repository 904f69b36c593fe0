"""Ledger and limits as a router has them: in memory, or in the Redis that its sessions are in, too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prefillshare.kvshare.config import Deployment, Router
from prefillshare.kvshare.contract import KVShape
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.usage import TurnUsage
from prefillshare.router.accounts.account import TurnAccount
from prefillshare.router.accounts.kv_time import KVTime
from prefillshare.router.accounts.ledger import Ledger, MemoryLedger
from prefillshare.router.accounts.limits import Charge, Limits, MemoryLimits
from prefillshare.router.accounts.metrics import TenantMetrics
from prefillshare.router.accounts.redis_ledger import RedisLedger
from prefillshare.router.accounts.redis_limits import RedisLimits
from prefillshare.router.admission.grant import Demand
from prefillshare.router.redis_calls import RedisCalls


@dataclass
class Accounts:
    """`kv_bytes`: of one token, over all layers."""

    ledger: Ledger
    limits: Limits
    metrics: TenantMetrics
    block_size: int
    kv_bytes: int = 0
    #: Of both stores, if they are in Redis.
    calls: RedisCalls | None = None

    @classmethod
    def in_memory(cls, metrics: Metrics, block_size: int, kv_bytes: int = 0, keep_days: int = 400) -> Accounts:
        return cls(MemoryLedger(keep_days), MemoryLimits(metrics), TenantMetrics(metrics), block_size, kv_bytes)

    @classmethod
    def in_redis(cls, config: Router, metrics: Metrics, block_size: int, kv_bytes: int = 0) -> Accounts:
        """Raises ConfigError if the password is missing. To be made while an event loop runs."""
        calls = RedisCalls.of(config, "store of accounts")
        ledger, limits = RedisLedger(calls, config.usage_days, metrics), RedisLimits(calls, metrics)
        return cls(ledger, limits, TenantMetrics(metrics), block_size, kv_bytes, calls)

    @classmethod
    def of(cls, deployment: Deployment, metrics: Metrics) -> Accounts:
        base, config = deployment.base, deployment.router
        kv_bytes = KVShape.of(base.model).bytes_per_token(base.dtype)
        if config.redis_url is None:
            return cls.in_memory(metrics, base.block_size, kv_bytes, config.usage_days)
        return cls.in_redis(config, metrics, base.block_size, kv_bytes)

    def of_turn(self, tenant: str, decoder: str, usage: TurnUsage, *, is_free: bool) -> TurnAccount:
        """`is_free`: nobody is charged for the turn."""
        kv_time = KVTime(self.block_size, self.kv_bytes)
        return TurnAccount(tenant, decoder, usage, kv_time, None if is_free else self.ledger, self.metrics)

    @asynccontextmanager
    async def taken(self, demand: Demand, output_tokens: int) -> AsyncIterator[Charge]:
        """What the turn is expected to use is taken from its tenant's limits; if the block raises, it is given back, unless it
        has been settled before. Raises as Limits.take does."""
        charge = await self.limits.take(demand, output_tokens)
        try:
            yield charge
        finally:
            charge.give_back()

    async def close(self) -> None:
        """Write what is left."""
        await self.ledger.close()
        await self.limits.close()
        if self.calls:
            await self.calls.close()
