"""What makes turns, whatever surface they come by: the fleet of pools, the decoders served, orchestrator and canary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from prefillshare.kvshare import decoders as served_decoders
from prefillshare.kvshare.config import Base, Deployment
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.admission.grant import TenantShare
from prefillshare.router.pools.fleet import Fleet
from prefillshare.router.turn.canary import Canary
from prefillshare.router.turn.orchestrator import Orchestrator

logger = logging.getLogger(__name__)


class Core:
    """`handle_of`: name of a Serve deployment -> its handle. `start` comes first, `stop` last, whatever became of the start."""

    def __init__(self, base: Base, handle_of: Callable[[str], object]):
        self.metrics = Metrics()
        self.fleet = Fleet(base.block_size, handle_of, self.metrics)
        #: Adapters of what is served that engines could not load, and why.
        self.left_out: dict[str, str] = {}

    async def start(self, deployment: Deployment, tenants: Mapping[str, TenantShare]) -> None:
        """Waits for the pools. Raises Unavailable if one has no replica in time."""
        routes = await self.fleet.adopt(deployment)
        self.orchestrator = Orchestrator(
            deployment.router,
            deployment.base,
            await self._loaded(deployment),
            routes,
            self.metrics,
            tenants,
            deployment.cluster.kv_load_timeout_s,
        )
        self.canary = Canary(self.orchestrator, self.metrics, deployment.router.canary_share)
        self._expect()

    @property
    def decoders(self) -> dict[str, served_decoders.Decoder]:
        """What is served, by name; changed in place."""
        return self.orchestrator.decoders

    async def take_over(self, deployment: Deployment) -> set[str]:
        """From now on serve this. Returns the decoders that are served no more; turns in progress go on (`let_go`)."""
        routes = await self.fleet.adopt(deployment)
        loaded = await self._loaded(deployment)
        before = set(self.decoders)
        self.orchestrator.serve(loaded, routes, deployment.router)
        self._expect()
        return before - set(self.decoders)

    async def let_go(self, decoders: set[str], deployment: Deployment, grace_s: float) -> None:
        """Wait until the turns of these have ended, at most `grace_s`, and close the pools that the deployment has no more."""
        await self.orchestrator.services.in_progress.ended(decoders, grace_s)
        await self.fleet.forget(deployment)

    async def stop(self) -> None:
        if hasattr(self, "canary"):
            await self.canary.stop()
        await self.fleet.stop()

    async def _loaded(self, deployment: Deployment) -> dict[str, served_decoders.Decoder]:
        """What can be served of the deployment: all but adapters that a replica could not load."""
        self.left_out = await self.fleet.adapter_problems(deployment)
        for name, why in self.left_out.items():
            logger.error("decoder %s is not served: %s", name, why)
        return served_decoders.served(deployment, but=self.left_out)

    def _expect(self) -> None:
        self.canary.expect(self.decoders)
        self.metrics.expect(self.decoders, self.fleet.pools)
