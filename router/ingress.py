"""The router replica: Serve's ingress deployment. Starts and stops its parts, and answers Serve and operators.

A turn's life here: a surface (vLLM's OpenAI app, or gRPC) -> Frontend (text <-> tokens) -> Orchestrator (prefill,
handoff, decode) -> replicas. Sessions live between gRPC and Frontend.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import date
from functools import partial

from ray import serve

from prefillshare.kvshare import tracing
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.live_changes import taken_over
from prefillshare.kvshare_vllm.engine import quick_start, ray_node
from prefillshare.kvshare_vllm.patches import vllm_logging
from prefillshare.router import clock
from prefillshare.router.accounts.figures import Row
from prefillshare.router.telemetry.figures import figures
from prefillshare.router.tenants import Tenants

logger = logging.getLogger(__name__)

#: Seconds that a stopping router lets running turns go on; less than Serve gives the replica to stop.
GRACE_S = 30.0


@serve.ingress()
class RouterIngress:
    """`handles`: Serve handles of the engine deployments, by name. Changes at run time come through `reconfigure`."""

    async def __init__(self, deployment: Deployment, handles: Mapping[str, object], tenants: Tenants):
        vllm_logging.set_up(deployment.logs.level, deployment.logs.format)
        ray_node.join()
        with quick_start.paused():
            from prefillshare.router.accounts.accounts import Accounts
            from prefillshare.router.ahead.response_kv import ResponseKV
            from prefillshare.router.core import Core
            from prefillshare.router.kept.keeper import Keeper
            from prefillshare.router.kept.lifecycle import open_kept
            from prefillshare.router.sessions import SessionGauge, open_sessions, open_threads
            from prefillshare.router.sessions.kept_sessions import context_of
            from prefillshare.router.surfaces.surfaces import Surfaces
            from prefillshare.router.telemetry.ray_metrics import RayMetrics

        self._deployment, self._tenants = deployment, tenants
        #: Stops the started parts in reverse order.
        self._stopping = AsyncExitStack()
        at_end = self._stopping.push_async_callback
        ray_metrics = RayMetrics()
        ray_metrics.start()
        at_end(ray_metrics.stop)
        if deployment.tracing:
            instance = serve.get_replica_context().replica_id.unique_id
            traces = tracing.set_up(deployment.tracing, "prefillshare-router", instance)
            at_end(asyncio.to_thread, traces.shutdown)  # it exports what is left, with a deadline
        config = deployment.router
        sessions = await open_sessions(config, deployment.base, tenants.max_sessions(config.max_sessions))
        at_end(sessions.close)
        threads = await open_threads(config, deployment.base, tenants.names)
        at_end(threads.close)
        self._core = Core(deployment.base, lambda name: handles.get(name) or _handle_of(name))
        self._accounts = Accounts.of(deployment, self._core.metrics)
        at_end(self._accounts.close)
        at_end(self._core.stop)
        await self._core.start(deployment, tenants.shares(), self._accounts)
        at_end(SessionGauge(sessions, self._core.metrics["sessions"]).stop)
        fleet, metrics, compute_s = self._core.fleet, self._core.metrics, self._core.orchestrator.services.compute_s
        keeper = Keeper.of(deployment, fleet, metrics, tenants, open_kept(config), partial(context_of, sessions))
        at_end(keeper.stop)
        keeper.start()
        response_kv = ResponseKV.of(deployment, fleet, metrics, lambda: compute_s.value, keeper)
        at_end(response_kv.stop)
        self._surfaces = await Surfaces.over(self._core, deployment, tenants, sessions, threads, response_kv)
        at_end(self._surfaces.stop)
        await self._surfaces.grpc.start()
        at_end(self.drain, GRACE_S)
        await self._first_turns(deployment.cluster.start_timeout_s)
        await self._surfaces.grpc.set_ready(True)

    async def _first_turns(self, timeout_s: float) -> None:
        """Wait until a turn on every pool succeeds, which may take several tries while engines are being replaced.

        Raises RuntimeError after `timeout_s` seconds.
        """
        until = clock.now() + timeout_s
        while reason := await self._surfaces.readiness.not_ready_because():
            if clock.now() > until:
                raise RuntimeError(f"the first turn failed: {reason}")
            logger.warning("not ready yet: %s", reason)
            await asyncio.sleep(1)

    def __serve_build_asgi_app__(self):
        return self._surfaces.app

    async def reconfigure(self, plain: dict) -> None:
        """Called by Serve at the start, and when decoders, pools or changeable settings of the router have changed."""
        deployment = taken_over(self._deployment, Deployment.model_validate(plain))
        if deployment == self._deployment:
            return
        vllm_logging.set_level(deployment.logs.level)
        dropped = await self._core.take_over(deployment)
        self._deployment = deployment
        self._surfaces.list_decoders()
        # Engines may drop what these turns need only after this has returned.
        await self._core.let_go(dropped, deployment, GRACE_S)

    async def left_out(self) -> dict[str, str]:
        """Adapters of the served deployment that engines could not load -> the reason."""
        return self._core.left_out

    async def adapter_problems(self, plain: dict) -> dict[str, str]:
        """Adapters that some replica cannot serve -> the reason. `plain`: a deployment, all replicas of which run."""
        return await self._core.fleet.adapter_problems(Deployment.model_validate(plain), of_all=True)

    async def deployment(self) -> dict:
        """The deployment served now, as plain data. Settings that cannot change at run time are as they were at the start."""
        return self._deployment.model_dump(mode="json")

    async def tenants(self) -> Tenants:
        """Who may call. Of API keys, only digests are in it."""
        return self._tenants

    async def usage(self, since: date | None = None, until: date | None = None) -> list[Row]:
        """The ledger, day by day; with Redis, that of all routers. Raises Unavailable."""
        return await self._accounts.ledger.rows(since, until)

    async def replica_stats(self) -> dict[str, dict[str, dict[str, float]]]:
        """Pool -> replica -> current figures, for the replicas that answer; for tests and operators."""
        return await self._core.fleet.stats_now()

    async def replica_info(self) -> dict[str, dict[str, dict[str, object]]]:
        """Pool -> replica -> what it is, and whether it may get work."""
        return self._core.fleet.info()

    async def figures(self) -> dict[str, object]:
        """What this router has counted since it was started (router/telemetry/figures.py)."""
        return figures(self._core.metrics)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new turns and let running ones finish, for at most `timeout_s` seconds."""
        grpc = self._surfaces.grpc
        await grpc.set_ready(False)
        await asyncio.gather(grpc.stop(timeout_s), self._core.orchestrator.drain(timeout_s))

    async def __del__(self):
        if hasattr(self, "_stopping"):
            await self._stopping.aclose()


def _handle_of(name: str):
    return serve.get_deployment_handle(name, serve.get_replica_context().app_name)
