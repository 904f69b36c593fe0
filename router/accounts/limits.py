"""How many turns and tokens a tenant may start a minute, and how many turns it may have in progress.

1. When a turn is about to join the queue, one turn and the tokens that it is expected to use are taken from its tenant's
   buckets (bucket.py), or it is refused with a hint when they will be there.
2. While it generates more than was expected, the rest is taken as it goes.
3. When it ends, what it has really used is what remains taken. A turn that was not admitted gets back everything.

A token counts if it has to be computed: prompt tokens that are not found cached, and generated tokens. What sharing saves is
therefore the tenant's own gain, as with Anthropic's input tokens a minute; OpenAI counts cached tokens, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from prefillshare.kvshare.errors import OverLimit
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.rate_limits import REQUESTS, TOKENS, Standing, note
from prefillshare.router import clock
from prefillshare.router.accounts.bucket import Bucket
from prefillshare.router.admission.grant import Demand, TenantShare
from prefillshare.router.admission.refusals import Refusal


class Charge:
    """What one turn has taken of its tenant's limits; as it is here, of none. Only the first end counts."""

    def used(self, tokens: int) -> None:
        """The turn has used so many tokens up to now."""

    def settle(self, tokens: int) -> None:
        """The turn has ended and used so many."""

    def give_back(self) -> None:
        """The turn was not admitted."""

    async def settled(self) -> None:
        """Wait until other routers know of the end as well; not for long if they cannot be told."""


class Limits(ABC):
    """`metrics`: counts what is refused."""

    def __init__(self, metrics: Metrics):
        self._refused = metrics["turns_refused_total"]

    async def take(self, demand: Demand, output_tokens: int) -> Charge:
        """`output_tokens`: what the turn is expected to generate. The caller's surface is told how the tenant stands then.
        Raises OverLimit with a hint."""
        tenant = demand.tenant
        if not tenant.is_limited:
            return Charge()
        return await self._take(demand, demand.uncached_tokens + output_tokens)

    @abstractmethod
    async def _take(self, demand: Demand, cost: int) -> Charge: ...

    @abstractmethod
    async def close(self) -> None:
        """Stop working in the background."""

    def _refusal(self, demand: Demand, reason: Refusal, cost: int, retry_s: float, standing: Standing) -> OverLimit:
        note(standing)
        self._refused.labels(demand.pool, reason.value).inc()
        tenant = demand.tenant
        field, text = {
            Refusal.TENANT_LIMIT: ("max_in_progress", f"{tenant.max_in_progress} turns are in progress or waiting"),
            Refusal.TURNS_PER_MINUTE: ("turns_per_minute", f"{tenant.turns_per_minute} turns a minute have been taken"),
            Refusal.TOKENS_PER_MINUTE: (
                "tokens_per_minute",
                f"of {tenant.tokens_per_minute} tokens a minute, the {cost} that the turn is expected to use are not left",
            ),
        }[reason]
        where = f"tenants.{tenant.name}.{field}"
        return OverLimit(text, field=where, retry_after_s=retry_s, fix=f"try again in {retry_s:.1f} s")


class MemoryLimits(Limits):
    """Those of one router. It admits all turns there are, so its queue already knows how many are in progress."""

    def __init__(self, metrics: Metrics):
        super().__init__(metrics)
        #: Tenants of the keys file only, so there are not more of them than it has.
        self._buckets: dict[str, dict[str, Bucket]] = {}

    async def _take(self, demand: Demand, cost: int) -> Charge:
        now, tenant = clock.now(), demand.tenant
        buckets = self._of(tenant, now)
        costs = {REQUESTS: 1, TOKENS: cost}
        for what, bucket in buckets.items():
            if missing_s := bucket.missing_s(costs[what], now):
                reason = Refusal.TURNS_PER_MINUTE if what == REQUESTS else Refusal.TOKENS_PER_MINUTE
                raise self._refusal(demand, reason, cost, missing_s, _standing(buckets, now))
        for what, bucket in buckets.items():
            bucket.take(costs[what], now)
        note(_standing(buckets, now))
        return _OfBuckets(buckets, cost)

    async def close(self) -> None:
        pass

    def _of(self, tenant: TenantShare, now: float) -> dict[str, Bucket]:
        if tenant.name not in self._buckets:
            limits = {REQUESTS: tenant.turns_per_minute, TOKENS: tenant.tokens_per_minute}
            self._buckets[tenant.name] = {what: Bucket(limit, now) for what, limit in limits.items() if limit}
        return self._buckets[tenant.name]


def _standing(buckets: dict[str, Bucket], now: float) -> Standing:
    return tuple(bucket.allowance(what, now) for what, bucket in buckets.items())


class _OfBuckets(Charge):
    def __init__(self, buckets: dict[str, Bucket], cost: int):
        self._turns, self._tokens = buckets.get(REQUESTS), buckets.get(TOKENS)
        self._taken, self._is_open = cost, True

    def used(self, tokens: int) -> None:
        if self._is_open and tokens > self._taken:
            self._change_to(tokens)

    def settle(self, tokens: int) -> None:
        if self._is_open:
            self._is_open = False
            self._change_to(tokens)

    def give_back(self) -> None:
        if self._is_open and self._turns:
            self._turns.take(-1, clock.now())
        self.settle(0)

    def _change_to(self, tokens: int) -> None:
        if self._tokens:
            self._tokens.take(tokens - self._taken, clock.now())
        self._taken = tokens
