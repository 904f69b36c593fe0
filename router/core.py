"""The part of a router that runs the turns of all surfaces: the fleet of pools, the served decoders, orchestrator, canary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from prefillshare.kvshare import decoders as served_decoders
from prefillshare.kvshare.config import Base, Deployment
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.modes import get_mode
from prefillshare.router.accounts.accounts import Accounts
from prefillshare.router.admission.grant import TenantShare
from prefillshare.router.pools.fleet import Fleet
from prefillshare.router.turn.canary import Canary
from prefillshare.router.turn.orchestrator import Orchestrator

logger = logging.getLogger(__name__)


class Core:
    """`handle_of`: name of a Serve deployment -> its handle. Call `start` first and `stop` last, even if `start` failed."""

    def __init__(self, base: Base, handle_of: Callable[[str], object]):
        self.metrics = Metrics()
        self.fleet = Fleet(base.block_size, handle_of, self.metrics)
        #: Adapters of the served deployment that engines could not load -> the reason.
        self.left_out: dict[str, str] = {}

    async def start(self, deployment: Deployment, tenants: Mapping[str, TenantShare], accounts: Accounts) -> None:
        """Wait for the pools. Raises Unavailable if one of them has no replica in time."""
        routes = await self.fleet.adopt(deployment)
        self.orchestrator = Orchestrator(
            deployment.router,
            deployment.base,
            await self._loaded(deployment),
            routes,
            self.metrics,
            tenants,
            deployment.cluster.kv_load_timeout_s,
            accounts,
        )
        self.canary = Canary(self.orchestrator, self.metrics, deployment.router.canary_share)
        self._expect()

    @property
    def decoders(self) -> dict[str, served_decoders.Decoder]:
        """The served decoders by name. The dict is changed in place."""
        return self.orchestrator.decoders

    async def take_over(self, deployment: Deployment) -> set[str]:
        """Serve this deployment from now on. Returns the decoders that are no longer served; their turns go on (`let_go`)."""
        routes = await self.fleet.adopt(deployment)
        loaded = await self._loaded(deployment)
        before = set(self.decoders)
        self.orchestrator.serve(loaded, routes, deployment.router)
        self._expect()
        return before - set(self.decoders)

    async def let_go(self, decoders: set[str], deployment: Deployment, grace_s: float) -> None:
        """Wait until the turns of these decoders have ended, at most `grace_s`; then close pools that are no longer used, and
        export nothing any more of those that are gone."""
        await self.orchestrator.services.in_progress.ended(decoders, grace_s)
        await self.fleet.forget(deployment)
        self.metrics.forget(decoders=decoders - self.decoders.keys())

    async def stop(self) -> None:
        if hasattr(self, "canary"):
            await self.canary.stop()
        await self.fleet.stop()

    async def _loaded(self, deployment: Deployment) -> dict[str, served_decoders.Decoder]:
        """The deployment's decoders, except for adapters that a replica could not load."""
        self.left_out = await self.fleet.adapter_problems(deployment)
        for name, why in self.left_out.items():
            logger.error("decoder %s is not served: %s", name, why)
        return served_decoders.served(deployment, but=self.left_out)

    def _expect(self) -> None:
        self.canary.expect(self.decoders)
        own_layers = [name for name, decoder in self.decoders.items() if get_mode(decoder.sharing).recomputes]
        self.metrics.expect(self.decoders, self.fleet.pools, own_layers)
