"""Keeps contexts for tenants: sessions, and beginnings of prompts.

 1. `keep`: the store grants it within the tenant's budget, or refuses, and nothing changes.
 2. A replica keeps it (holding.py). Nobody waits for that.
 3. When a kept session goes on, it is kept for its time again, with what is new as far as the budget allows (`went_on`). A
    prompt is prolonged by the next call that asks for the same.
 4. It ends with its time, or when it is let go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from prefillshare.kvshare.caller import Caller
from prefillshare.kvshare.config import Base, Deployment
from prefillshare.kvshare.errors import InvalidInput, PrefillShareError, Unavailable
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.background import Background
from prefillshare.router.kept.budgets import Budgets
from prefillshare.router.kept.holding import Holding, Wanted, capacity_blocks
from prefillshare.router.kept.kept import (
    KEY_BYTES,
    PRIORITIES,
    USUAL_PRIORITY,
    Kept,
    block_keys,
    of_prompt,
    of_session,
    rank_of,
)
from prefillshare.router.kept.store import KeptStore, refusal
from prefillshare.router.kept.upkeep import Contexts, Upkeep
from prefillshare.router.pools.fleet import Fleet
from prefillshare.router.tenants import Tenants

logger = logging.getLogger(__name__)

#: Longest time for which a call waits to be granted that its prompt is kept, seconds.
PATIENCE_S = 0.5


@dataclass(frozen=True)
class Listed:
    """What a tenant keeps. `held`: name -> tokens of it that a replica keeps, by what that has told. Figures in tokens."""

    kept: Sequence[Kept]
    held: dict[str, int]
    tokens: int
    max_tokens: int


class Keeper:
    """Owns `store`. Call `stop` at the end."""

    def __init__(self, store: KeptStore, budgets: Budgets, holding: Holding, upkeep: Upkeep, base: Base, metrics: Metrics):
        self._store, self._budgets, self._holding, self._upkeep = store, budgets, holding, upkeep
        self._block_size, self._metrics, self._background = base.block_size, metrics, Background(metrics)

    @classmethod
    def of(
        cls, deployment: Deployment, fleet: Fleet, metrics: Metrics, tenants: Tenants, store: KeptStore, contexts: Contexts
    ) -> Keeper:
        config, base = deployment.router, deployment.base
        budgets = Budgets(config, base.block_size, tenants, lambda: capacity_blocks(fleet))
        holding = Holding(fleet, store, budgets, base, metrics, stride_tokens=config.eager_prefill_stride_tokens)
        upkeep = Upkeep(store, holding, contexts, metrics["kept_tokens"], base.block_size)
        return cls(store, budgets, holding, upkeep, base, metrics)

    def start(self) -> None:
        """To be called when there are pools."""
        self._upkeep.start()

    async def keep_session(
        self, caller: Caller, session_id: str, token_ids: Sequence[int], salt: str | None, ttl_s: float, priority: int | None
    ) -> Kept:
        """Keep a session's context from now on. Raises InvalidInput, Overloaded beyond the budget, Unavailable."""
        self._holding.check()
        if priority is not None and priority not in PRIORITIES:
            raise InvalidInput(
                f"{priority} is out of range",
                field="priority",
                fix=f"use {PRIORITIES[0]} to {PRIORITIES[-1]}: the higher, the later it is given up if requests need the room",
            )
        budget, keys = self._budgets.of(caller.tenant), block_keys(token_ids, self._block_size, salt)
        asked = self._asked(caller, of_session(session_id), keys, ttl_s, salt, priority)
        answer = await self._store.keep(asked, keys, budget)
        if answer.refused:
            self._count(answer.refused)
            raise refusal(asked, answer, budget, self._block_size)
        self._upkeep.keeps(caller.tenant)
        self._holding.hold(Wanted([answer.kept], list(token_ids), salt))
        return answer.kept

    async def grant(
        self, caller: Caller, prompt: Sequence[int], salt: str | None, asked: Sequence[tuple[int, float]]
    ) -> list[Kept]:
        """Grant a call that beginnings of its prompt are kept: `asked` says how many tokens each, and for how many seconds.
        Those beyond the budget are left out and counted. To be called when its KV is there; what is granted is then given to
        `hold`."""
        granted, keys = [], block_keys(prompt, self._block_size, salt)
        budget = self._budgets.of(caller.tenant)
        for tokens, ttl_s in sorted(asked):
            own = keys[: tokens // self._block_size * KEY_BYTES]
            if not own:
                continue
            try:
                async with asyncio.timeout(PATIENCE_S):
                    answer = await self._store.keep(self._asked(caller, of_prompt(own), own, ttl_s, salt), own, budget)
            except (Unavailable, TimeoutError) as error:
                logger.warning("a prompt is not kept: %s: %s", type(error).__name__, error)
                break
            if answer.refused:
                self._count(answer.refused)
            else:
                granted.append(answer.kept)
        return granted

    def hold(
        self, granted: list[Kept], prompt: list[int], salt: str | None, ready: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Have a replica keep what has been granted. `ready`: as in Wanted."""
        if granted:
            self._upkeep.keeps(granted[0].tenant)
            self._holding.hold(Wanted(granted, prompt, salt, ready))

    def turn(self, tenant: str, session_id: str) -> AbstractContextManager[None]:
        """A turn runs on a session."""
        return self._holding.turn((tenant, of_session(session_id)))

    def went_on(
        self,
        tenant: str,
        session_id: str,
        context: Callable[[], list[int]],
        salt: str | None,
        ready: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """A session has gone on; its context is prolonged if it is kept."""
        if self._upkeep.may_keep(tenant):
            prolonging = self._prolong(tenant, of_session(session_id), context(), salt, ready)
            self._background.start("keeping", prolonging, session=session_id)

    async def shorten(
        self, tenant: str, session_id: str, token_ids: Sequence[int], salt: str | None, ttl_s: float
    ) -> None:
        """A session lives for no more than `ttl_s` unused from now on, and is kept no longer than that. Raises Unavailable."""
        if kept := await self._store.shorten(tenant, of_session(session_id), ttl_s):
            self._holding.hold(Wanted([kept], list(token_ids), salt))

    async def let_go(self, tenant: str, name: str) -> bool:
        """Keep a session or a prompt no longer. `name`: as of Kept. Returns whether it was kept. Raises Unavailable."""
        if kept := await self._store.let_go(tenant, name):
            self._holding.let_go(kept)
        return kept is not None

    async def gone(self, tenant: str, session_id: str) -> None:
        """A session has been deleted, or another one begins under its name."""
        try:
            await self.let_go(tenant, of_session(session_id))
        except PrefillShareError as error:
            logger.warning("session %r is kept until its time is over: %s", session_id, error)

    def tokens(self, kept: Kept) -> int:
        return kept.blocks * self._block_size

    async def listed(self, tenant: str) -> Listed:
        """Raises Unavailable."""
        kept = await self._store.of(tenant)
        held = {one.name: self._holding.held_tokens(one) for one in kept}
        tokens = await self._store.own(tenant) * self._block_size
        return Listed(kept, held, tokens, self._budgets.of(tenant).own * self._block_size)

    async def stop(self) -> None:
        for part in (self._upkeep, self._background, self._holding):
            await part.stop()
        await self._store.close()

    def _asked(
        self, caller: Caller, name: str, keys: bytes, ttl_s: float, salt: str | None, priority: int | None = None
    ) -> Kept:
        priority = USUAL_PRIORITY if priority is None else priority
        rank = rank_of(priority, caller.priority)
        return Kept(caller.tenant, name, len(keys) // KEY_BYTES, ttl_s, ttl_s, priority, rank, salt)

    async def _prolong(self, tenant: str, name: str, context: list[int], salt: str | None, ready) -> None:
        keys = block_keys(context, self._block_size, salt)
        try:
            answer = await self._store.prolong(tenant, name, keys, self._budgets.of(tenant))
        except Unavailable as error:
            logger.warning("%s is not prolonged: %s", name, error)
            return
        if answer.refused:
            self._count(answer.refused)
        if answer.kept:
            self._holding.hold(Wanted([answer.kept], context, salt, ready))

    def _count(self, refused: str) -> None:
        self._metrics["keeps_refused_total"].labels(refused).inc()


