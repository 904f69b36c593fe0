"""Sees to it that what is kept stays kept: every PERIOD_S, slowly, and behind all turns.

 1. It learns who keeps something, for the gauges, and so that turns of others cost nothing here.
 2. It looks for a kept session that no replica keeps any more, because that is gone or needed the room, and has one keep it
    again: one session at a time, those that are given up last first, and only where blocks are free. Prompts are kept again by
    the next call that asks for them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from prefillshare.kvshare.errors import NotFound
from prefillshare.router.background import Periodic
from prefillshare.router.kept.holding import Holding, Wanted
from prefillshare.router.kept.kept import Kept
from prefillshare.router.kept.store import KeptStore

PERIOD_S = 10.0
#: How long one router sees to a session before another may, seconds.
CLAIM_S = 60.0
#: Tenants that have a series of their own; the others share one. Labels that no tenant can have as its name.
MOST_TENANTS, OTHERS, ANONYMOUS = 100, "(others)", "(anonymous)"

#: (tenant, session) -> its token ids and their salt. Raises PrefillShareError, NotFound for a session that is gone.
Contexts = Callable[[str, str], Awaitable[tuple[list[int], str | None]]]


class Upkeep:
    """Works from `start` to `stop`."""

    def __init__(self, store: KeptStore, holding: Holding, contexts: Contexts, gauge, block_size: int):
        self._store, self._holding, self._contexts = store, holding, contexts
        self._gauge, self._block_size = gauge, block_size
        self._tenants: set[str] = set()
        self._labels: dict[str, str] = {}
        self._looking: Periodic | None = None

    def start(self) -> None:
        self._looking = Periodic("what is kept is not looked after", self.look, PERIOD_S, spread=0.2)

    async def stop(self) -> None:
        if self._looking:
            await self._looking.stop()

    def keeps(self, tenant: str) -> None:
        """The tenant keeps something."""
        self._tenants.add(tenant)

    def may_keep(self, tenant: str) -> bool:
        """Whether the tenant keeps something. Of what other routers have granted, this one learns within PERIOD_S."""
        return tenant in self._tenants

    async def look(self) -> None:
        """Raises PrefillShareError."""
        held = await self._store.held()
        self._tenants = set(held)
        self._show(held)
        everything = [kept for tenant in held for kept in await self._store.of(tenant)]
        missing = [kept for kept in everything if kept.session_id is not None and self._holding.is_missing(kept)]
        for kept in sorted(missing, key=lambda kept: (-kept.rank, kept.tenant, kept.name)):
            if self._holding.has_room(kept) and await self._store.claim(kept.tenant, kept.name, CLAIM_S):
                return await self._keep_again(kept)

    async def _keep_again(self, kept: Kept) -> None:
        try:
            token_ids, salt = await self._contexts(kept.tenant, kept.session_id)
        except NotFound:
            await self._store.let_go(kept.tenant, kept.name)
            return
        if len(token_ids) >= kept.blocks * self._block_size:  # else it has been shortened, and its next turn says what it is
            self._holding.hold(Wanted([kept], token_ids, salt))

    def _show(self, held: dict[str, int]) -> None:
        for tenant in held:
            if tenant not in self._labels and len(self._labels) < MOST_TENANTS:
                self._labels[tenant] = tenant or ANONYMOUS
        shown = dict.fromkeys(self._labels.values(), 0)
        for tenant, blocks in held.items():
            label = self._labels.get(tenant, OTHERS)
            shown[label] = shown.get(label, 0) + blocks
        for label, blocks in shown.items():
            self._gauge.labels(label).set(blocks * self._block_size)
