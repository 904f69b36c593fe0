"""The surfaces of a router, HTTP and gRPC, over the same turns, with the same keys and limits."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import FastAPI, Response

from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare_vllm.surface.openai_app import build_openai_app, set_decoders
from prefillshare.router.ahead.response_kv import ResponseKV
from prefillshare.router.core import Core
from prefillshare.router.responses.threads import Threads
from prefillshare.router.sessions import SessionStore
from prefillshare.router.sessions.http_calls import HttpCalls
from prefillshare.router.sessions.turns import Turns
from prefillshare.router.surfaces.cors import cors
from prefillshare.router.surfaces.grpc_api import GrpcServer, Servicer
from prefillshare.router.surfaces.http_auth import ApiKeys, shows_all
from prefillshare.router.surfaces.http_limits import HttpLimits
from prefillshare.router.surfaces.http_sessions import HttpSessions, serve_chats
from prefillshare.router.surfaces.known_host import known_host
from prefillshare.router.surfaces.readiness import Readiness, probe
from prefillshare.router.surfaces.request_limits import RequestLimits
from prefillshare.router.telemetry.node_metrics import NodeMetrics, agent_of_this_node
from prefillshare.router.telemetry.trace_context import HttpTraces
from prefillshare.router.tenants import Tenants
from prefillshare.router.ui.feed import Feed
from prefillshare.router.ui.page import page_routes


class Surfaces:
    """`app` answers HTTP requests; Serve listens for it."""

    def __init__(self, core: Core, base: str, app: FastAPI, shutdown, readiness: Readiness, grpc: GrpcServer):
        self.app, self.readiness, self.grpc = app, readiness, grpc
        self._core, self._base, self._shutdown = core, base, shutdown

    @classmethod
    async def over(
        cls,
        core: Core,
        deployment: Deployment,
        tenants: Tenants,
        sessions: SessionStore,
        threads: SessionStore,
        response_kv: ResponseKV,
    ) -> Surfaces:
        """Nothing listens before `grpc.start`."""
        config, base = deployment.router, deployment.base
        bounds = RequestLimits.of(config, base)
        app, frontend = await build_openai_app(
            base,
            _beside(base.name, core),
            core.canary.turn,
            core.orchestrator.admit,
            middleware=[
                HttpSessions,
                partial(ApiKeys, tenants=tenants),
                partial(
                    NodeMetrics,
                    agent=agent_of_this_node(),
                    replicas=core.fleet.replica_ids,
                    shows_all=partial(shows_all, tenants),
                ),
                HttpTraces,
                partial(HttpLimits, limits=bounds),
                *cors(config.cors_origins),
                *known_host(config, tenants),
            ],
            grammar_cpu_s=config.grammar_cpu_s,
            most_bodies=config.max_queued,
        )
        readiness = Readiness(core.decoders, sessions, lambda: core.orchestrator.draining, partial(probe, frontend))
        _add_readiness(app, readiness)
        calls = HttpCalls(base, core.decoders, frontend, sessions, response_kv, config.own_prompt)
        serve_chats(app, calls, Threads(threads))
        app.router.routes += page_routes(Feed(core, deployment), config)
        turns = Turns(
            base, core.decoders, frontend, sessions, response_kv, config.own_prompt, config.longest_session_ttl_s
        )
        servicer = Servicer(turns, readiness.not_ready_because)
        grpc = GrpcServer(servicer, config.host, config.grpc_port, tenants, config.tls, config.replicas > 1, bounds)
        return cls(core, base.name, app, frontend.shutdown, readiness, grpc)

    def list_decoders(self) -> None:
        """Make the HTTP surface accept and list the decoders that the core serves now."""
        set_decoders(self.app, _beside(self._base, self._core))

    async def stop(self) -> None:
        await asyncio.to_thread(self._shutdown)


def _beside(base: str, core: Core) -> list[str]:
    return [name for name in core.decoders if name != base]


def _add_readiness(app: FastAPI, readiness: Readiness) -> None:
    @app.get("/ready", include_in_schema=True)
    async def ready(response: Response) -> dict[str, object]:
        """200 if a turn on every pool would succeed now, else 503 with the reason."""
        reason = await readiness.not_ready_because()
        if reason:
            response.status_code = 503
        return {"ready": not reason, "reason": reason}
