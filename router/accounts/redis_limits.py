"""Limits over all routers, in Redis. A turn's tenant is asked for in one call of one script.

Written here because no library does all of it: `limits` (PyPI, 5.8) has windows in Redis and is quick enough, but gives nothing
back, lets nobody take more than is left, knows no turns in progress whose router may die, and looks at several limits one after
the other.

If Redis does not answer in PATIENCE_S, the router limits the tenant by itself (MemoryLimits), which is counted, and asks Redis
again after AWAY_S. Tenants then get at most the limit from each router.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections import defaultdict

from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.rate_limits import REQUESTS, TOKENS, Allowance, Standing, note
from prefillshare.router import clock
from prefillshare.router.accounts import scripts
from prefillshare.router.accounts.limits import Charge, Limits, MemoryLimits
from prefillshare.router.admission.grant import Demand, TenantShare
from prefillshare.router.admission.refusals import Refusal
from prefillshare.router.background import Background, Periodic
from prefillshare.router.redis_calls import RedisCalls, ms

logger = logging.getLogger(__name__)

#: Longest time that a turn waits for Redis, and for how long it is not asked after that, seconds.
PATIENCE_S, AWAY_S = 0.25, 2.0
#: How long a turn counts as in progress without being renewed, seconds; renewals and ends of turns may take CALL_S.
LEASE_S, CALL_S = 15.0, 2.0
#: Hint for a turn whose tenant has too many in progress: nobody knows when one of them ends.
RETRY_S = 1.0

_REASONS = {
    b"in progress": Refusal.TENANT_LIMIT,
    REQUESTS.encode(): Refusal.TURNS_PER_MINUTE,
    TOKENS.encode(): Refusal.TOKENS_PER_MINUTE,
}


class RedisLimits(Limits):
    """Renews the turns in progress until `close`."""

    def __init__(self, calls: RedisCalls, metrics: Metrics):
        super().__init__(metrics)
        self._calls, self._alone = calls, MemoryLimits(metrics)
        self._counted_alone = metrics["turns_limited_alone_total"]
        self._away_until = -math.inf
        self._open: dict[str, _InRedis] = {}
        self._background = Background(metrics)
        self._renewal = Periodic("turns in progress are not renewed", self.renew, LEASE_S / 3, later=True)

    async def close(self) -> None:
        await self._renewal.stop()
        await self._background.stop()

    async def _take(self, demand: Demand, cost: int) -> Charge:
        if clock.now() < self._away_until:
            return await self._take_alone(demand, cost)
        tenant, turn = demand.tenant, uuid.uuid4().hex
        most = tenant.max_in_progress
        args = ("" if most is None else most, turn, cost, ms(LEASE_S))
        try:
            status, wait_ms, told = await self.ask(scripts.TAKE, tenant, args, PATIENCE_S)
        except (Unavailable, asyncio.CancelledError) as error:  # Redis may have taken it, or be about to
            self._background.start("limit_settling", _InRedis(self, tenant, turn, cost).told(0, 1))
            if isinstance(error, asyncio.CancelledError):
                raise
            self._away_until = clock.now() + AWAY_S
            return await self._take_alone(demand, cost)
        standing = _standing(tenant, told)
        if reason := _REASONS.get(status):
            raise self._refusal(demand, reason, cost, wait_ms / 1000 or RETRY_S, standing)
        note(standing)
        charge = self._open[turn] = _InRedis(self, tenant, turn, cost)
        return charge

    async def _take_alone(self, demand: Demand, cost: int) -> Charge:
        self._counted_alone.inc()
        return await self._alone._take(demand, cost)

    async def ask(self, script: str, tenant: TenantShare, args: tuple, timeout_s: float) -> list:
        """Raises Unavailable."""
        keys = [self._calls.key("limits", tenant.name, what) for what in ("levels", "turns", "taken")]
        limits = ("" if limit is None else limit for limit in (tenant.turns_per_minute, tenant.tokens_per_minute))
        return await self._calls.run(script, keys, (*limits, *args), timeout_s)

    def settle(self, charge: _InRedis, tokens: int, back: int) -> asyncio.Task | None:
        """Tell Redis that the turn has ended."""
        if self._open.pop(charge.turn, None):
            return self._background.start("limit_settling", charge.told(tokens, back))
        return None

    async def renew(self) -> None:
        """Renew the leases of this router's turns, and take what they have used beyond what was expected.

        Raises Unavailable."""
        by_tenant: dict[TenantShare, list[_InRedis]] = defaultdict(list)
        for charge in self._open.values():
            by_tenant[charge.tenant].append(charge)
        for tenant, charges in by_tenant.items():
            turns = [part for charge in charges for part in (charge.turn, charge.tokens)]
            await self.ask(scripts.RENEW, tenant, (ms(LEASE_S), *turns), CALL_S)


class _InRedis(Charge):
    def __init__(self, limits: RedisLimits, tenant: TenantShare, turn: str, cost: int):
        self._limits, self.tenant, self.turn, self.tokens = limits, tenant, turn, cost
        self._settling: asyncio.Task | None = None

    def used(self, tokens: int) -> None:
        self.tokens = max(self.tokens, tokens)

    def settle(self, tokens: int) -> None:
        self._settling = self._settling or self._limits.settle(self, tokens, 0)

    def give_back(self) -> None:
        self._settling = self._settling or self._limits.settle(self, 0, 1)

    async def settled(self) -> None:
        if self._settling:
            await asyncio.wait({self._settling}, timeout=PATIENCE_S)

    async def told(self, tokens: int, back: int) -> None:
        try:
            await self._limits.ask(scripts.SETTLE, self.tenant, (self.turn, tokens, back), CALL_S)
        except Unavailable as error:
            logger.warning("a turn of tenant %r counts as in progress for up to %g s: %s", self.tenant.name, LEASE_S, error)


def _standing(tenant: TenantShare, told: list[int]) -> Standing:
    """From what scripts.py's `standing` returns."""
    limits = ((REQUESTS, tenant.turns_per_minute, *told[:2]), (TOKENS, tenant.tokens_per_minute, *told[2:]))
    return tuple(Allowance(what, limit, left, wait_ms / 1000) for what, limit, left, wait_ms in limits if limit is not None)
