"""A ChatSurface on which contexts are kept: the store and the budgets are real; no replica keeps anything."""

from __future__ import annotations

from contextlib import nullcontext

from prometheus_client import CollectorRegistry

from benchmarks.chats.surface import ChatSurface
from prefillshare.kvshare.config import Router
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.kept.budgets import Budgets
from prefillshare.router.kept.holding import Wanted
from prefillshare.router.kept.keeper import Keeper
from prefillshare.router.kept.kept import Kept
from prefillshare.router.kept.memory import MemoryKept
from prefillshare.router.tenants import Tenants


class NoReplicas:
    """In the place of Holding and Upkeep. `wanted`: what replicas would keep."""

    def __init__(self):
        self.wanted: list[Wanted] = []

    def hold(self, wanted: Wanted) -> None:
        self.wanted.append(wanted)

    def let_go(self, kept: Kept) -> None: ...

    def turn(self, key):
        return nullcontext()

    def keeps(self, tenant: str) -> None: ...

    def may_keep(self, tenant: str) -> bool:
        return False

    async def stop(self) -> None: ...


class KeepingSurface(ChatSurface):
    """At most `capacity` blocks are kept."""

    def __init__(self, model: str, **config):
        super().__init__(model, **config)
        self.capacity, self.replicas, self.store = 1000, NoReplicas(), MemoryKept()
        budgets = Budgets(Router(max_kept_share=1), self.base.block_size, Tenants(), lambda: self.capacity)
        metrics = Metrics(CollectorRegistry())
        self.keeper = Keeper(self.store, budgets, self.replicas, self.replicas, self.base, metrics)
