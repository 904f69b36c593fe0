"""What tenants keep, in Redis: over all routers, and beyond the end of any of them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from prefillshare.router.kept import scripts
from prefillshare.router.kept.budgets import Budget
from prefillshare.router.kept.kept import Kept
from prefillshare.router.kept.store import NEVER_FITS, Answer, KeptStore
from prefillshare.router.redis_calls import RedisCalls, ms

CALL_S = 2.0


class RedisKept(KeptStore):
    """Owns `calls`. Scripts recognise what they have done already, and may be run twice."""

    def __init__(self, calls: RedisCalls):
        self._calls = calls

    async def keep(self, kept: Kept, keys: bytes, budget: Budget) -> Answer:
        if kept.blocks > min(budget.own, budget.all):
            return Answer(None, NEVER_FITS)
        context = {"ttl_ms": ms(kept.ttl_s), "priority": kept.priority, "rank": kept.rank, "salt": kept.salt}
        args = (kept.name, keys, budget.own, budget.all, ms(kept.ttl_s), json.dumps(context), kept.rank, int(kept.is_prompt))
        return _answer(kept.tenant, await self._ask(scripts.KEEP, kept.tenant, *args))

    async def prolong(self, tenant: str, name: str, keys: bytes, budget: Budget) -> Answer:
        return _answer(tenant, await self._ask(scripts.PROLONG, tenant, name, keys, budget.own, budget.all))

    async def placed(self, tenant: str, names: Sequence[str], pool: str, replica: str) -> list[str]:
        return [name.decode() for name in await self._ask(scripts.PLACED, tenant, json.dumps([pool, replica]), *names)]

    async def shorten(self, tenant: str, name: str, ttl_s: float) -> Kept | None:
        return _kept(tenant, await self._ask(scripts.SHORTEN, tenant, name, ms(ttl_s)))

    async def let_go(self, tenant: str, name: str) -> Kept | None:
        return _kept(tenant, await self._ask(scripts.LET_GO, tenant, name))

    async def of(self, tenant: str) -> list[Kept]:
        return [kept for told in await self._ask(scripts.OF, tenant) if (kept := _kept(tenant, told))]

    async def own(self, tenant: str) -> int:
        return (await self._ask(scripts.HELD, tenant))[0]

    async def held(self) -> dict[str, int]:
        names = await self._calls.run(scripts.TENANTS, [self._all], (), CALL_S)
        held = {}
        for tenant in (name.decode() for name in names):
            blocks, contexts = await self._ask(scripts.HELD, tenant)
            if contexts:
                held[tenant] = blocks
        return held

    async def claim(self, tenant: str, name: str, for_s: float) -> bool:
        key = self._calls.key("kept", "claim", f"{len(tenant)}:{tenant}:{name}")
        return bool((await self._calls.run(scripts.CLAIM, [key], (ms(for_s),), CALL_S))[0])

    async def close(self) -> None:
        await self._calls.close()

    @property
    def _all(self) -> str:
        return self._calls.key("kept", "all")

    async def _ask(self, script: str, tenant: str, *args) -> list:
        parts = ("contexts", "keys", "ends", "places", "blocks")
        keys = [*(self._calls.key("kept", tenant, part) for part in parts), self._all]
        return await self._calls.run(script, keys, (tenant, *args), CALL_S)


def _answer(tenant: str, told: list) -> Answer:
    context, reason, own, in_all, free_ms = told
    return Answer(_kept(tenant, context), reason.decode(), own, in_all, free_ms / 1000)


def _kept(tenant: str, told: list) -> Kept | None:
    """From what scripts.py's `seen` returns."""
    if not told:
        return None
    name, context, blocks, left_ms, place = told
    context, (pool, replica) = json.loads(context), json.loads(place or '["", ""]')
    return Kept(
        tenant,
        name.decode(),
        blocks,
        context["ttl_ms"] / 1000,
        max(0, left_ms) / 1000,
        context["priority"],
        context["rank"],
        context["salt"],
        pool,
        replica,
    )
