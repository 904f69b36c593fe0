"""What tenants keep, in the memory of a deployment's only router."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from prefillshare.router.clock import now
from prefillshare.router.kept.budgets import Budget
from prefillshare.router.kept.kept import KEY_BYTES, Kept, common_blocks, each, of_prompt
from prefillshare.router.kept.store import ALL_BUDGET, NEVER_FITS, OWN_BUDGET, Answer, KeptStore


@dataclass
class _Record:
    kept: Kept
    keys: bytes
    until: float


@dataclass
class _Tenant:
    """`blocks`: a block's key -> how many of the kept contexts have it."""

    records: dict[str, _Record] = field(default_factory=dict)
    blocks: Counter[bytes] = field(default_factory=Counter)

    def change(self, before: bytes, after: bytes) -> None:
        """A context with the first keys has the second ones now."""
        common = common_blocks(before, after) * KEY_BYTES
        self.blocks.update(each(after[common:]))
        self.blocks.subtract(each(before[common:]))
        for key in each(before[common:]):
            if not self.blocks[key]:
                del self.blocks[key]

    def forget(self, name: str) -> _Record | None:
        if record := self.records.pop(name, None):
            self.change(record.keys, b"")
        return record


class MemoryKept(KeptStore):
    """No method waits, so each is atomic for the event loop's other tasks."""

    def __init__(self, clock: Callable[[], float] = now):
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}
        self._claims: dict[tuple[str, str], float] = {}

    async def keep(self, kept: Kept, keys: bytes, budget: Budget) -> Answer:
        if kept.blocks > min(budget.own, budget.all):
            return Answer(None, NEVER_FITS)
        tenant = self._of(kept.tenant)
        record = tenant.records.get(kept.name) or _Record(kept, b"", 0.0)
        if refused := self._changed(tenant, record, keys, budget):
            return self._answer(tenant, None, refused)
        record.kept = replace(kept, pool=record.kept.pool, replica=record.kept.replica)
        record.until = self._clock() + kept.ttl_s
        tenant.records[kept.name] = record
        if kept.is_prompt:
            self._take_place_of_shorter_ones(tenant, record)
        return self._answer(tenant, record)

    async def prolong(self, tenant: str, name: str, keys: bytes, budget: Budget) -> Answer:
        held = self._of(tenant)
        if not (record := held.records.get(name)):
            return self._answer(held, None)
        refused = self._changed(held, record, keys, budget)
        record.until = self._clock() + record.kept.ttl_s
        return self._answer(held, record, refused)

    async def placed(self, tenant: str, names: Sequence[str], pool: str, replica: str) -> list[str]:
        records = self._of(tenant).records
        for name in names:
            if record := records.get(name):
                record.kept = replace(record.kept, pool=pool, replica=replica)
        return [name for name in names if name not in records]

    async def shorten(self, tenant: str, name: str, ttl_s: float) -> Kept | None:
        if not (record := self._of(tenant).records.get(name)):
            return None
        record.kept = replace(record.kept, ttl_s=min(record.kept.ttl_s, ttl_s))
        record.until = min(record.until, self._clock() + ttl_s)
        return self._seen(record)

    async def let_go(self, tenant: str, name: str) -> Kept | None:
        record = self._of(tenant).forget(name)
        return self._seen(record) if record else None

    async def of(self, tenant: str) -> list[Kept]:
        return [self._seen(record) for record in self._of(tenant).records.values()]

    async def own(self, tenant: str) -> int:
        return len(self._of(tenant).blocks)

    async def held(self) -> dict[str, int]:
        held = {name: len(self._of(name).blocks) for name in tuple(self._tenants)}
        for name in [name for name, tenant in self._tenants.items() if not tenant.records]:
            del self._tenants[name]
        return {name: blocks for name, blocks in held.items() if name in self._tenants}

    async def claim(self, tenant: str, name: str, for_s: float) -> bool:
        time = self._clock()
        self._claims = {whose: until for whose, until in self._claims.items() if until > time}
        if is_first := (tenant, name) not in self._claims:
            self._claims[tenant, name] = time + for_s
        return is_first

    async def close(self) -> None:
        self._tenants.clear()

    def _of(self, name: str) -> _Tenant:
        tenant = self._tenants.setdefault(name, _Tenant())
        time = self._clock()
        for expired in [name for name, record in tenant.records.items() if record.until <= time]:
            tenant.forget(expired)
        return tenant

    def _changed(self, tenant: _Tenant, record: _Record, keys: bytes, budget: Budget) -> str:
        """The record has these keys now. If the tenant would keep more than before, and more than it may, nothing changes and
        the reason is returned."""
        before, old = len(tenant.blocks), record.keys
        tenant.change(old, keys)
        own, rest = len(tenant.blocks), sum(len(other.blocks) for other in self._tenants.values() if other is not tenant)
        if own > before and (own > budget.own or own + rest > budget.all):
            tenant.change(keys, old)
            return OWN_BUDGET if own > budget.own else ALL_BUDGET
        record.keys = keys
        return ""

    def _take_place_of_shorter_ones(self, tenant: _Tenant, record: _Record) -> None:
        for end in range(KEY_BYTES, len(record.keys), KEY_BYTES):
            shorter = tenant.records.get(of_prompt(record.keys[:end]))
            if shorter and shorter.until <= record.until and shorter.kept.rank <= record.kept.rank:
                tenant.forget(shorter.kept.name)

    def _seen(self, record: _Record) -> Kept:
        return replace(record.kept, blocks=len(record.keys) // KEY_BYTES, left_s=max(0.0, record.until - self._clock()))

    def _answer(self, tenant: _Tenant, record: _Record | None, refused: str = "") -> Answer:
        in_all = sum(len(one.blocks) for one in self._tenants.values())
        free_s = min((one.until for one in tenant.records.values()), default=self._clock()) - self._clock()
        return Answer(self._seen(record) if record else None, refused, len(tenant.blocks), in_all, free_s)
