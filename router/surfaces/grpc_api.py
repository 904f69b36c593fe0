"""The gRPC surface (protos/prefillshare/v1). Only translates; sessions, text and turns are elsewhere.

A server of our own in the router replica, not Serve's gRPC proxy: the proxy hides the client's deadline, drops the
trailing metadata of errors raised before the first message, and cannot be bound to one address.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from contextlib import aclosing

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from prefillshare.kvshare import addresses, rate_limits
from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.config.access import Tls
from prefillshare.kvshare.errors import ConfigError, DeadlineExceeded, Internal, PrefillShareError
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc
from prefillshare.router.kept.kept import Kept
from prefillshare.router.sessions.listing import Place, per_page
from prefillshare.router.sessions.sampling import fields_of, named_as_sent, to_sampling_params
from prefillshare.router.sessions.tools import tool_fields
from prefillshare.router.sessions.turns import Turns
from prefillshare.router.surfaces import grpc_messages
from prefillshare.router.surfaces.grpc_auth import ApiKeys
from prefillshare.router.surfaces.grpc_errors import abort as _abort
from prefillshare.router.surfaces.grpc_keepalive import server_options
from prefillshare.router.surfaces.grpc_tls import credentials
from prefillshare.router.surfaces.request_limits import LEAST, RequestLimits
from prefillshare.router.telemetry.trace_context import GrpcTraces
from prefillshare.router.tenants import Tenants

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["PrefillShare"].full_name
#: The largest answers hold a session's token ids, if they are asked for.
_MAX_ANSWER_BYTES = 16 << 20


class GrpcServer:
    """Owns the listening port. `start` raises ConfigError if it is taken."""

    def __init__(
        self,
        servicer: Servicer,
        host: str,
        port: int,
        tenants: Tenants | None = None,
        tls: Tls | None = None,
        shared_port: bool = False,
        limits: RequestLimits = LEAST,
        keepalive: Sequence[tuple[str, int]] = tuple(server_options()),
    ):
        self._address, self._port = addresses.joined(host, port), port
        self._credentials = credentials(tls) if tls else None
        options = [
            ("grpc.max_receive_message_length", limits.body_bytes),
            ("grpc.max_metadata_size", limits.header_bytes),
            ("grpc.absolute_max_metadata_size", limits.header_bytes),
            ("grpc.max_send_message_length", _MAX_ANSWER_BYTES),
            # Several routers on one machine share the port: the kernel spreads connections over those that live.
            ("grpc.so_reuseport", int(shared_port)),
            *keepalive,
        ]
        self._server = grpc.aio.server(options=options, interceptors=[GrpcTraces(), ApiKeys(tenants or Tenants())])
        self._health = health.aio.HealthServicer()
        pb_grpc.add_PrefillShareServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    async def start(self) -> None:
        try:
            if self._listen() != self._port:
                raise RuntimeError("not bound")
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {self._address}: {error}", field="router.grpc_port", fix="choose a free port"
            ) from error
        await self._server.start()

    def _listen(self) -> int:
        if self._credentials is None:
            return self._server.add_insecure_port(self._address)
        return self._server.add_secure_port(self._address, self._credentials)

    async def set_ready(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)


class Servicer(pb_grpc.PrefillShareServicer):
    def __init__(self, turns: Turns, readiness):
        self._turns, self._readiness = turns, readiness

    async def ListDecoders(self, request, context):
        decoders = self._turns.decoders.values()
        return pb.ListDecodersResponse(
            decoders=[pb.Decoder(name=d.name, pool=d.pool, sharing=d.sharing, kind=d.kind) for d in decoders]
        )

    async def GetReadiness(self, request, context):
        reason = await self._answer(context, self._readiness())
        return pb.GetReadinessResponse(ready=not reason, reason=reason or "")

    async def CreateSession(self, request, context):
        return await self._answer(context, self._described(self._create(request)))

    async def GetSession(self, request, context):
        found = self._turns.sessions.get(request.session_id, tenant=_tenant())
        return await self._answer(context, self._described(found, request.include_token_ids))

    async def ForkSession(self, request, context):
        made = self._turns.fork(request.session_id, request.new_session_id, _tenant())
        return await self._answer(context, self._described(made))

    async def DeleteSession(self, request, context):
        await self._answer(context, self._turns.delete(request.session_id, _tenant()))
        return pb.DeleteSessionResponse()

    async def ListSessions(self, request, context):
        return await self._answer(context, self._list(request))

    async def UpdateSession(self, request, context):
        asked = {name: getattr(request, name) for name in ("truncate_to", "ttl_s") if request.HasField(name)}
        changed = self._turns.update(request.session_id, _tenant(), **asked)
        return await self._answer(context, self._described(changed))

    async def KeepSession(self, request, context):
        priority = request.priority if request.HasField("priority") else None
        kept = self._turns.kept.keep(current_caller.get(), request.session_id, request.ttl_s, priority)
        return self._kept_context(await self._answer(context, kept), 0)

    async def LetGoSession(self, request, context):
        await self._answer(context, self._turns.kept.let_go(current_caller.get(), request.session_id))
        return pb.LetGoSessionResponse()

    async def LetGoKept(self, request, context):
        await self._answer(context, self._turns.kept.let_go_kept(current_caller.get(), request.id))
        return pb.LetGoKeptResponse()

    async def ListKept(self, request, context):
        listed = await self._answer(context, self._turns.kept.listed(current_caller.get()))
        kept = [self._kept_context(one, listed.held[one.name]) for one in listed.kept]
        return pb.ListKeptResponse(kept=kept, tokens=listed.tokens, max_tokens=listed.max_tokens)

    def _kept_context(self, kept: Kept, held_tokens: int) -> pb.KeptContext:
        return pb.KeptContext(
            id=kept.name,
            session_id=kept.session_id,
            tokens=self._turns.kept.tokens(kept),
            held_tokens=held_tokens,
            ends_in_s=kept.left_s,
            priority=kept.priority,
        )

    async def Generate(self, request, context):
        request_id = uuid.uuid4().hex
        rate_limits.listen()
        try:
            tools = self._tools(request)
            turn = self._turns.take(
                request.session_id,
                request.decoder,
                grpc_messages.turn_input(request.input, "input"),
                grpc_messages.turn_input(request.suffix, "suffix"),
                tools.sampling if tools else to_sampling_params(request.sampling),
                request_id,
                current_caller.get().behind(request.priority),
                _deadline_s(context),
                tools=tools,
                expected_turns=request.expected_turns if request.HasField("expected_turns") else None,
            )
            async with aclosing(turn) as events:
                async for event in events:
                    if event.finish_reason:
                        context.set_trailing_metadata(rate_limits.headers_now())
                    yield grpc_messages.response(event)
        except PrefillShareError as error:
            await _abort(context, error)
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("request %s failed", request_id, extra={"request_id": request_id})
            await _abort(context, _unexpected(f"request {request_id}"))

    async def _create(self, request):
        caller = current_caller.get().in_domain(request.cache_domain)
        given = grpc_messages.turn_input(request.input, "input")
        ttl_s = request.ttl_s if request.HasField("ttl_s") else None
        return await self._turns.create(request.session_id, given, caller.tenant, caller.cache_domain, ttl_s)

    async def _list(self, request) -> pb.ListSessionsResponse:
        after = Place.of(request.page_token)
        page = await self._turns.sessions.listed(per_page(request.page_size), after, tenant=_tenant())
        made = pb.ListSessionsResponse(next_page_token=page.next.token() if page.next else "")
        made.sessions.extend(grpc_messages.listed(session) for session in page.sessions)
        return made

    def _tools(self, request):
        """What the turn's tools ask for; None if it has none."""
        if not (fields := tool_fields(request)):
            return None
        with named_as_sent():
            return self._turns.asked_tools(fields_of(request.sampling) | fields, request.sampling.max_tokens or None)

    async def _described(self, work, with_tokens: bool = False) -> pb.Session:
        session, sessions = await work, self._turns.sessions
        return grpc_messages.described(session, await sessions.expires_in_s(session), sessions.ttl_s, with_tokens)

    async def _answer(self, context, work):
        try:
            return await work
        except PrefillShareError as error:
            await _abort(context, error)
        except Exception:
            call = uuid.uuid4().hex
            logger.exception("call %s failed", call)
            await _abort(context, _unexpected(f"call {call}"))


def _unexpected(what: str) -> Internal:
    """An error that says where to look, without details that are not for clients."""
    return Internal(f"{what} failed in the router", fix="if it lasts, have the router's log searched for it")


def _tenant() -> str:
    """The tenant whose sessions this call sees."""
    return current_caller.get().tenant


def _deadline_s(context) -> float | None:
    """Seconds the client still waits; None if it set no deadline, for which gRPC may give a very large number."""
    left = context.time_remaining()
    if left is None or left > 10 * 365 * 86400:
        return None
    if left <= 0:
        raise DeadlineExceeded("the deadline passed before the turn began")
    return left


__all__ = ["SERVICE", "GrpcServer", "Servicer"]
