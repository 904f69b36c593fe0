"""A gRPC server in the place of a router, which answers what a test tells it, and clients of both kinds for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from prefillshare.client import AsyncClient, Client, RemoteSession
from prefillshare.kvshare.errors import AlreadyExists, Conflict, NotFound, PrefillShareError
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc
from prefillshare.router.surfaces.grpc_errors import abort


class Dies(Exception):
    """The connection breaks. `after`: the call has been done by then."""

    def __init__(self, after: bool = False):
        self.after = after


class ScriptedRouter(pb_grpc.PrefillShareServicer):
    """`turns`: of each session. `plan`: what happens to the next calls, first to last: None, an error, or Dies.
    `asked`: the requests that came."""

    def __init__(self) -> None:
        self.turns: dict[str, int] = {}
        self.plan: list[Exception | None] = []
        self.asked: list[Any] = []
        #: Ids of what is kept.
        self.kept: set[str] = set()
        #: What a turn says before its end, and the tools that it calls.
        self.pieces = [pb.GenerateResponse(text="Par", token_ids=[1]), pb.GenerateResponse(text="is.", token_ids=[2])]
        self.calls: list[pb.ToolCall] = []

    def count(self, method: str) -> int:
        return sum(type(request).__name__ == f"{method}Request" for request in self.asked)

    async def ListDecoders(self, request, context):
        return await self._do(request, context, lambda: pb.ListDecodersResponse(decoders=[pb.Decoder(name="planner")]))

    async def GetReadiness(self, request, context):
        return await self._do(request, context, pb.GetReadinessResponse)

    async def CreateSession(self, request, context):
        return await self._do(request, context, lambda: self._made(request.session_id, 0))

    async def ForkSession(self, request, context):
        return await self._do(request, context, lambda: self._made(request.new_session_id, self._of(request.session_id)))

    async def GetSession(self, request, context):
        return await self._do(request, context, lambda: self._session(request.session_id))

    async def LetGoKept(self, request, context):
        def let_go():
            if request.id not in self.kept:
                raise NotFound(f"nothing is kept under {request.id!r}", field="id")
            self.kept.discard(request.id)
            return pb.LetGoKeptResponse()

        return await self._do(request, context, let_go)

    async def UpdateSession(self, request, context):
        return await self._do(request, context, lambda: self._session(request.session_id))

    async def DeleteSession(self, request, context):
        def deleted():
            self._of(request.session_id)
            del self.turns[request.session_id]
            return pb.DeleteSessionResponse()

        return await self._do(request, context, deleted)

    async def ListSessions(self, request, context):
        def page():
            begin, size = int(request.page_token or 0), request.page_size or 100
            end = begin + size
            names = sorted(self.turns)
            token = str(end) if end < len(names) else ""
            return pb.ListSessionsResponse(sessions=map(self._session, names[begin:end]), next_page_token=token)

        return await self._do(request, context, page)

    async def Generate(self, request, context):
        several = request.sampling.n or 1

        def end():
            turns = self._of(request.session_id)
            if request.HasField("expected_turns") and request.expected_turns != turns:
                raise Conflict(f"it has had {turns} turns", field="expected_turns")
            self.turns[request.session_id] = turns + (several == 1)
            return pb.Done(finish_reason="stop", context_tokens=9, turns=turns + (several == 1), tool_calls=self.calls)

        planned = self.plan[0] if self.plan else None
        if isinstance(planned, Dies):
            for piece in self.pieces:
                yield piece
        done = await self._do(request, context, end)
        for index in range(several):
            for piece in self.pieces:
                yield pb.GenerateResponse(text=piece.text, token_ids=piece.token_ids, index=index)
            yield pb.GenerateResponse(index=index, done=done)

    async def _do(self, request, context, work: Callable[[], Any]) -> Any:
        self.asked.append(type(request).FromString(request.SerializeToString()))
        planned = self.plan.pop(0) if self.plan else None
        try:
            if isinstance(planned, PrefillShareError):
                raise planned
            answer = work() if planned is None or planned.after else None
        except PrefillShareError as error:
            await abort(context, error)
        if planned is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        return answer

    def _made(self, name: str, turns: int) -> pb.Session:
        if name in self.turns:
            raise AlreadyExists(f"session {name!r} exists already", field="session_id")
        self.turns[name] = turns
        return self._session(name)

    def _of(self, name: str) -> int:
        if name not in self.turns:
            raise NotFound(f"no session {name!r}", field="session_id")
        return self.turns[name]

    def _session(self, name: str) -> pb.Session:
        return pb.Session(session_id=name, turns=self._of(name))


class Threaded:
    """A sync client or session whose calls run in a thread each, so that they are awaited as those of an async one are."""

    def __init__(self, of: Any):
        self.of = of

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.of, name)
        if not callable(found):
            return found
        if name == "session":
            return lambda *given, **more: Threaded(found(*given, **more))
        if name in ("stream", "sessions"):
            return lambda *given, **more: self._pieces(found(*given, **more))

        async def called(*given, **more):
            result = await asyncio.to_thread(found, *given, **more)
            return Threaded(result) if isinstance(result, RemoteSession) else result

        return called

    async def _pieces(self, pieces):
        end = object()
        try:
            while (piece := await asyncio.to_thread(next, pieces, end)) is not end:
                yield piece
        finally:
            await asyncio.to_thread(pieces.close)


@asynccontextmanager
async def serving(router: pb_grpc.PrefillShareServicer, port: int = 0):
    """Yields (the server, its port)."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_PrefillShareServicer_to_server(router, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield server, port
    finally:
        await server.stop(None)


@asynccontextmanager
async def client_of(kind: str, port: int, **options):
    """`kind`: "sync" or "async". Both are awaited."""
    address = f"127.0.0.1:{port}"
    if kind == "async":
        async with AsyncClient(address, **options) as client:
            yield client
    else:
        with Client(address, **options) as client:
            yield Threaded(client)
