"""The router replica: Serve's ingress deployment. Builds the surfaces and owns everything that must be stopped.

A turn's life here: a surface (vLLM's OpenAI app, or gRPC) -> Frontend (text <-> tokens) -> Orchestrator (prefill,
handoff, decode) -> replicas. Sessions live between gRPC and Frontend.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from functools import partial

from fastapi import Response
from ray import serve

from kvshare import decoders as served_decoders
from kvshare.config import Deployment
from kvshare.engine_settings import SHARED_PREFILL, own_prefill
from kvshare.errors import PrefillShareError
from kvshare.handoff import TurnContext
from kvshare.metrics import Metrics
from router.tenants import Tenants

logger = logging.getLogger(__name__)

#: A successful probe is believed for so long.
PROBE_TTL_S = 10.0
PROBE_DEADLINE_S = 60.0
#: How long a stopping router lets running turns go on; less than Serve's own patience with the replica.
GRACE_S = 30.0


@serve.ingress()
class RouterIngress:
    """`prefill` and `decode`: handles by the names of kvshare.engine_settings and of the pools."""

    async def __init__(
        self, deployment: Deployment, prefill: Mapping[str, object], decode: Mapping[str, object], tenants: Tenants
    ):
        from kvshare_vllm.openai_app import build_openai_app
        from router.grpc_api import GrpcServer, Servicer
        from router.http_auth import ApiKeys
        from router.orchestrator import Orchestrator, Pool
        from router.replicas import ReplicaSet
        from router.sessions import SessionStore
        from router.turns import Turns

        config = deployment.router
        prefills = {name: ReplicaSet(name, handle) for name, handle in prefill.items()}
        decodes = {name: ReplicaSet(name, handle) for name, handle in decode.items()}
        self._replica_sets = [*prefills.values(), *decodes.values()]
        await asyncio.gather(*(replicas.start(deployment.cluster.start_timeout_s) for replicas in self._replica_sets))
        pools = {
            name: Pool(replicas, prefills.get(own_prefill(name), prefills.get(SHARED_PREFILL)))
            for name, replicas in decodes.items()
        }
        metrics = Metrics()
        self._decoders = served_decoders.served(deployment)
        self._orchestrator = Orchestrator(config, self._decoders, pools, metrics)
        self._app, self._frontend = await build_openai_app(
            deployment.base,
            [d for d in self._decoders if d != deployment.base.name],
            self._orchestrator.run,
            self._orchestrator.admit,
            middleware=[partial(ApiKeys, tenants=tenants)],
        )
        self._sessions = SessionStore(config.max_sessions, config.session_ttl_s)
        metrics["sessions"].set_function(lambda: len(self._sessions))
        turns = Turns(deployment.base, self._decoders, self._frontend, self._sessions)
        self._probed: dict[str, float] = {}
        self._probe_lock = asyncio.Lock()
        servicer = Servicer(turns, self.not_ready_because)
        self._grpc = GrpcServer(servicer, config.host, config.grpc_port, tenants, config.tls)
        _add_readiness(self._app, self.not_ready_because)
        await self._grpc.start()
        if reason := await self.not_ready_because():
            raise RuntimeError(f"the first turn failed: {reason}")
        await self._grpc.set_ready(True)

    def __serve_build_asgi_app__(self):
        return self._app

    async def not_ready_because(self) -> str:
        """Empty if a turn on every pool succeeds now (believed for PROBE_TTL_S), else why not."""
        from kvshare_vllm.sampling import make_prompt, make_sampling_params

        if self._orchestrator.draining:
            return "the router is stopping"
        async with self._probe_lock:
            by_pool = {decoder.pool: name for name, decoder in self._decoders.items()}
            for pool, name in by_pool.items():
                if time.monotonic() - self._probed.get(pool, -PROBE_TTL_S) < PROBE_TTL_S:
                    continue
                try:
                    request = self._frontend.prepare(
                        make_prompt([1, 2, 3]),
                        make_sampling_params(max_tokens=1, temperature=0.0),
                        f"probe-{uuid.uuid4().hex}",
                        name,
                    )
                    async for _ in self._frontend.run(request, name, TurnContext(deadline_s=PROBE_DEADLINE_S)):
                        pass
                except PrefillShareError as error:
                    return f"pool {pool}: {error}"
                self._probed[pool] = time.monotonic()
        return ""

    async def replica_stats(self) -> dict[str, dict[str, dict[str, float]]]:
        """Pool -> replica -> engine figures; for tests and operators."""
        return {
            replicas.name: {replica: await replicas.on(replica).stats.remote() for replica in replicas.ids}
            for replicas in self._replica_sets
        }

    async def drain(self, timeout_s: float) -> None:
        """Refuse new turns, finish running ones, at most `timeout_s`."""
        await self._grpc.set_ready(False)
        await asyncio.gather(self._grpc.stop(timeout_s), self._orchestrator.drain(timeout_s))

    async def __del__(self):
        if hasattr(self, "_grpc"):
            await self.drain(GRACE_S)
        for replicas in getattr(self, "_replica_sets", ()):
            await replicas.stop()


def _add_readiness(app, not_ready_because) -> None:
    @app.get("/ready", include_in_schema=True)
    async def ready(response: Response) -> dict[str, object]:
        """200 if a turn on every pool would succeed now, else 503 with the reason."""
        reason = await not_ready_because()
        if reason:
            response.status_code = 503
        return {"ready": not reason, "reason": reason}
