"""The router replica: Serve's ingress deployment. Builds the surfaces and owns everything that must be stopped.

A turn's life here: a surface (vLLM's OpenAI app, or gRPC) -> Frontend (text <-> tokens) -> Orchestrator (prefill,
handoff, decode) -> replicas. Sessions live between gRPC and Frontend.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

from fastapi import Response
from ray import serve

from prefillshare.kvshare import decoders as served_decoders
from prefillshare.kvshare import tracing
from prefillshare.kvshare.caller import ANONYMOUS
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.live_changes import taken_over
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare_vllm.engine import quick_start, ray_node
from prefillshare.kvshare_vllm.patches import vllm_logging
from prefillshare.router import clock
from prefillshare.router.tenants import Tenants

logger = logging.getLogger(__name__)

PROBE_DEADLINE_S = 60.0
#: How long a stopping router lets running turns go on; less than Serve's own patience with the replica.
GRACE_S = 30.0


@serve.ingress()
class RouterIngress:
    """`handles`: of the engine deployments, by name. What changes while it runs comes through `reconfigure`."""

    async def __init__(self, deployment: Deployment, handles: Mapping[str, object], tenants: Tenants):
        vllm_logging.set_up(deployment.logs.level, deployment.logs.format)
        ray_node.join()
        with quick_start.paused():
            from prefillshare.kvshare_vllm.surface.openai_app import build_openai_app
            from prefillshare.router.ahead.eager import EagerPrefill
            from prefillshare.router.ahead.pull_back import PullBack
            from prefillshare.router.ahead.response_kv import ResponseKV
            from prefillshare.router.pools.fleet import Fleet
            from prefillshare.router.sessions import SessionGauge, open_sessions
            from prefillshare.router.sessions.turns import Turns
            from prefillshare.router.surfaces.cors import cors
            from prefillshare.router.surfaces.grpc_api import GrpcServer, Servicer
            from prefillshare.router.surfaces.http_auth import ApiKeys
            from prefillshare.router.surfaces.http_limits import HttpLimits
            from prefillshare.router.surfaces.readiness import Readiness
            from prefillshare.router.surfaces.request_limits import RequestLimits
            from prefillshare.router.telemetry.node_metrics import NodeMetrics, agent_of_this_node
            from prefillshare.router.telemetry.ray_metrics import RayMetrics
            from prefillshare.router.telemetry.trace_context import HttpTraces
            from prefillshare.router.turn.canary import Canary
            from prefillshare.router.turn.orchestrator import Orchestrator

        config, metrics, self._tenants = deployment.router, Metrics(), tenants
        bounds = RequestLimits.of(config, deployment.base)
        self._ray_metrics = RayMetrics()
        self._ray_metrics.start()
        self._traces = None
        if deployment.tracing:
            instance = serve.get_replica_context().replica_id.unique_id
            self._traces = tracing.set_up(deployment.tracing, "prefillshare-router", instance)
        self._sessions = await open_sessions(config, tenants.max_sessions(config.max_sessions))
        self._deployment = deployment
        self._fleet = Fleet(deployment.base.block_size, lambda name: handles.get(name) or _handle_of(name), metrics)
        routes = await self._fleet.adopt(deployment)
        self._decoders = await self._loaded(deployment)
        self._orchestrator = Orchestrator(
            config,
            deployment.base,
            self._decoders,
            routes,
            metrics,
            tenants.shares(),
            deployment.cluster.kv_load_timeout_s,
        )
        self._canary = Canary(self._orchestrator, metrics, config.canary_share)
        self._canary.expect(self._decoders)
        self._metrics = metrics
        metrics.expect(self._decoders, self._fleet.pools)
        self._app, self._frontend = await build_openai_app(
            deployment.base,
            [d for d in self._decoders if d != deployment.base.name],
            self._canary.turn,
            self._orchestrator.admit,
            middleware=[
                partial(ApiKeys, tenants=tenants),
                partial(NodeMetrics, agent=agent_of_this_node()),
                HttpTraces,
                partial(HttpLimits, limits=bounds),
                *cors(config.cors_origins),
            ],
            grammar_cpu_s=config.grammar_cpu_s,
        )
        self._session_gauge = SessionGauge(self._sessions, metrics["sessions"])
        eager = pull_back = None
        shared, base = self._fleet.shared_prefill, deployment.base
        if config.eager_prefill:
            limits = {"limit": config.eager_prefill_max, "stride_tokens": config.eager_prefill_stride_tokens}
            eager = EagerPrefill(shared, base, metrics, **limits)
        # What a decode engine lends has no hidden states beside it.
        if config.pull_back != "never" and not served_decoders.ecache_layers(deployment.decode):
            rate, limits = self._orchestrator.services.compute_s, {"when": config.pull_back, "limit": config.pull_back_max}
            pull_back = PullBack(shared, base, metrics, compute_s=lambda: rate.value, **limits)
        self._response_kv = ResponseKV(eager, pull_back)
        turns = Turns(base, self._decoders, self._frontend, self._sessions, self._response_kv)
        orchestrator = self._orchestrator
        self._readiness = Readiness(self._decoders, self._sessions, lambda: orchestrator.draining, self._probe)
        servicer = Servicer(turns, self._readiness.not_ready_because)
        self._grpc = GrpcServer(servicer, config.host, config.grpc_port, tenants, config.tls, config.replicas > 1, bounds)
        _add_readiness(self._app, self._readiness.not_ready_because)
        await self._grpc.start()
        await self._first_turns(deployment.cluster.start_timeout_s)
        await self._grpc.set_ready(True)

    async def _first_turns(self, timeout_s: float) -> None:
        """A turn on every pool. Where the engines are being replaced, too, it may take some. Raises RuntimeError."""
        until = clock.now() + timeout_s
        while reason := await self._readiness.not_ready_because():
            if clock.now() > until:
                raise RuntimeError(f"the first turn failed: {reason}")
            logger.warning("not ready yet: %s", reason)
            await asyncio.sleep(1)

    def __serve_build_asgi_app__(self):
        return self._app

    async def reconfigure(self, plain: dict) -> None:
        """Serve calls this at the start, and when decoders, pools, or what may change of the router have changed."""
        from prefillshare.kvshare_vllm.surface.openai_app import set_decoders

        deployment = taken_over(self._deployment, Deployment.model_validate(plain))
        if deployment == self._deployment:
            return
        vllm_logging.set_level(deployment.logs.level)
        routes = await self._fleet.adopt(deployment)
        loaded = await self._loaded(deployment)
        self._deployment = deployment
        before = set(self._decoders)
        self._orchestrator.serve(loaded, routes, deployment.router)
        self._canary.expect(self._decoders)
        self._metrics.expect(self._decoders, self._fleet.pools)
        set_decoders(self._app, [d for d in self._decoders if d != deployment.base.name])
        # Only then may engines drop what these turns still need.
        await self._orchestrator.services.in_progress.ended(before - set(self._decoders), GRACE_S)
        await self._fleet.forget(deployment)

    async def _loaded(self, deployment: Deployment) -> dict[str, served_decoders.Decoder]:
        """What can be served of the deployment: all but adapters that a replica could not load."""
        problems = await self._fleet.adapter_problems(deployment)
        for name, why in problems.items():
            logger.error("decoder %s is not served: %s", name, why)
        self._left_out = problems
        return served_decoders.served(deployment, but=problems)

    async def left_out(self) -> dict[str, str]:
        """Adapters of what is served that engines could not load, and why."""
        return self._left_out

    async def adapter_problems(self, plain: dict) -> dict[str, str]:
        """Adapters of a deployment, given as plain data, whose replicas all run: those that one cannot serve, and why."""
        return await self._fleet.adapter_problems(Deployment.model_validate(plain), of_all=True)

    async def deployment(self) -> dict:
        """What is served now, as plain data: what cannot be taken over is as it was at the start."""
        return self._deployment.model_dump(mode="json")

    async def tenants(self) -> Tenants:
        """Who may call. Of keys it has digests only."""
        return self._tenants

    async def _probe(self, decoder: str) -> None:
        """A turn of one token. Raises what a client would get."""
        from prefillshare.kvshare_vllm.sampling import make_prompt, make_sampling_params
        from prefillshare.router.turn.terms import Terms

        sampling, name = make_sampling_params(max_tokens=1, temperature=0.0), f"probe-{uuid.uuid4().hex}"
        request = self._frontend.prepare(make_prompt([1, 2, 3]), sampling, name, decoder)
        run = self._frontend.run(request, decoder, ANONYMOUS, terms=Terms(deadline_s=PROBE_DEADLINE_S))
        async for _ in run.outputs():
            pass

    async def replica_stats(self) -> dict[str, dict[str, dict[str, float]]]:
        """Pool -> replica -> figures of those that answer, asked for now; for tests and operators."""
        pools = list(self._fleet.pools.values())
        told = await asyncio.gather(*(pool.replicas.stats_now() for pool in pools))
        return {
            pool.name: {replica: asdict(stats) for replica, stats in one.items()}
            for pool, one in zip(pools, told, strict=True)
        }

    async def replica_info(self) -> dict[str, dict[str, dict[str, object]]]:
        """Pool -> replica -> what it is, and whether it may get work."""
        return {
            pool.name: {
                r.id: asdict(r.info) | {"usable": r.health.usable, "reason": r.health.reason}
                for r in pool.replicas.members.values()
            }
            for pool in self._fleet.pools.values()
        }

    async def drain(self, timeout_s: float) -> None:
        """Refuse new turns, finish running ones, at most `timeout_s`."""
        await self._grpc.set_ready(False)
        await asyncio.gather(self._grpc.stop(timeout_s), self._orchestrator.drain(timeout_s))

    async def __del__(self):
        if hasattr(self, "_grpc"):
            await self.drain(GRACE_S)
        for background in (getattr(self, "_response_kv", None), getattr(self, "_canary", None)):
            if background:
                await background.stop()
        if hasattr(self, "_frontend"):
            await asyncio.to_thread(self._frontend.shutdown)
        if hasattr(self, "_fleet"):
            await self._fleet.stop()
        if hasattr(self, "_session_gauge"):
            await self._session_gauge.stop()
        if hasattr(self, "_sessions"):
            await self._sessions.close()
        if hasattr(self, "_ray_metrics"):
            await self._ray_metrics.stop()
        if getattr(self, "_traces", None):
            await asyncio.to_thread(self._traces.shutdown)  # it exports what is left, with a deadline


def _handle_of(name: str):
    return serve.get_deployment_handle(name, serve.get_replica_context().app_name)


def _add_readiness(app, not_ready_because) -> None:
    @app.get("/ready", include_in_schema=True)
    async def ready(response: Response) -> dict[str, object]:
        """200 if a turn on every pool would succeed now, else 503 with the reason."""
        reason = await not_ready_because()
        if reason:
            response.status_code = 503
        return {"ready": not reason, "reason": reason}
