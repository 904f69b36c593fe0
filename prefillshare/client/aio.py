"""The client for code with an event loop; prefillshare/client/sync.py is the one for code without, and says what calls do. Both
do the same steps (prefillshare/client/flows.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Unpack

import grpc

from prefillshare.client import calls
from prefillshare.client.arguments import Message, TurnArguments
from prefillshare.client.common import ClientBase, SessionBase
from prefillshare.client.failures import typed_errors
from prefillshare.client.flows import Ask, Collect, Pause, Steps, T, answered, before_next, taken
from prefillshare.client.results import Collected, TurnResult
from prefillshare.client.retries import Call
from prefillshare.client.taking import Taking
from prefillshare.kvshare.errors import PrefillShareError
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb


class AsyncClient(ClientBase):
    _channels = grpc.aio.insecure_channel, grpc.aio.secure_channel

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def decoders(self) -> list[pb.Decoder]:
        return list((await self._do(calls.decoders())).decoders)

    async def not_ready_because(self) -> str:
        """Empty if a turn on every pool would succeed, else the reason."""
        return (await self._do(calls.readiness())).reason

    async def create_session(
        self,
        session_id: str = "",
        *,
        messages: Sequence[Message] | None = None,
        text: str | None = None,
        token_ids: Sequence[int] | None = None,
        cache_domain: str = "",
        ttl_s: float | None = None,
    ) -> AsyncRemoteSession:
        """As of Client."""
        made = await self._do(calls.create(session_id, messages, text, token_ids, cache_domain, ttl_s))
        return AsyncRemoteSession(self, made.session_id, made.turns)

    def session(self, session_id: str) -> AsyncRemoteSession:
        """A session that exists already."""
        return AsyncRemoteSession(self, session_id)

    async def sessions(self, page_size: int = 0) -> AsyncIterator[pb.Session]:
        """All of the caller's sessions, asked for page by page; those that would be forgotten first come first."""
        token, is_last = "", False
        while not is_last:
            page = await self._do(calls.page(page_size, token))
            for session in page.sessions:
                yield session
            token, is_last = page.next_page_token, not page.next_page_token

    async def kept(self) -> pb.ListKeptResponse:
        """What the tenant keeps in the engines' caches, and its budget."""
        return await self._do(calls.kept())

    async def let_go(self, kept_id: str) -> None:
        """Keep this no longer than the caches do by themselves: a session or the beginning of a prompt, by the `id` that `kept`
        tells. Raises NotFound if nothing is kept under it."""
        await self._do(calls.let_go_kept(kept_id))

    async def _do(self, call: Call) -> Any:
        return await self._run(answered(call, self.retries, self.timeout_s))

    async def _run(self, steps: Steps[T]) -> T:
        go_on, outcome = steps.send, None
        while True:
            try:
                step = go_on(outcome)
            except StopIteration as end:
                return end.value
            try:
                go_on, outcome = steps.send, await self._step(step)
            except PrefillShareError as error:
                go_on, outcome = steps.throw, error

    async def _step(self, step: Ask | Collect | Pause) -> Any:
        match step:
            case Pause(seconds):
                return await asyncio.sleep(seconds)
            case Ask(call, timeout_s):
                with typed_errors():
                    method = getattr(self._stub, call.method)
                    return await method(call.request, timeout=timeout_s, metadata=self.metadata())
            case Collect(taking):
                collected = Collected()
                async with aclosing(self._pieces(taking)) as pieces:
                    async for piece in pieces:
                        collected.add(piece)
                return collected

    async def _pieces(self, taking: Taking) -> AsyncGenerator[pb.GenerateResponse, None]:
        with typed_errors():
            call = self._stub.Generate(taking.request, timeout=taking.left_s, metadata=self.metadata())
            try:
                async for piece in call:
                    yield piece
            finally:
                call.cancel()


class AsyncRemoteSession(SessionBase[AsyncClient]):
    async def get(self, with_token_ids: bool = False) -> pb.Session:
        return self._noted(await self._client._do(calls.get(self.session_id, with_token_ids)))

    async def fork(self, new_session_id: str = "") -> AsyncRemoteSession:
        made = await self._client._do(calls.fork(self.session_id, new_session_id))
        return AsyncRemoteSession(self._client, made.session_id, made.turns)

    async def update(self, *, truncate_to: int | None = None, ttl_s: float | None = None) -> pb.Session:
        """As of RemoteSession."""
        return self._noted(await self._client._do(calls.update(self.session_id, truncate_to, ttl_s)))

    async def keep(self, ttl_s: float = 0.0, priority: int | None = None) -> pb.KeptContext:
        """Keep the KV of the session's context in the engines' caches, for `ttl_s` seconds from now and from the end of each
        turn on; 0: as long as an unused session lives. `priority`: 0 to 100; what has a higher one is given up later.
        Raises Overloaded or InvalidInput beyond the tenant's budget."""
        return await self._client._do(calls.keep(self.session_id, ttl_s, priority))

    async def let_go(self) -> None:
        """Keep the session's context no longer than the caches do by themselves."""
        await self._client._do(calls.let_go(self.session_id))

    async def delete(self) -> None:
        await self._client._do(calls.delete(self.session_id))

    async def stream(self, decoder: str, **asked: Unpack[TurnArguments]) -> AsyncIterator[pb.GenerateResponse]:
        """One turn, streamed. Closing the iterator cancels the turn. Once a piece has come, nothing is tried again."""
        taking = await self._taking(decoder, asked)
        while True:
            begun = False
            try:
                async with aclosing(self._client._pieces(taking)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield self._noted_piece(piece)
                return
            except PrefillShareError as error:
                if begun:
                    raise
                pause_s = taking.pause_s(error)
            await self._client._run(before_next(taking, pause_s))

    async def turn(self, decoder: str, **asked: Unpack[TurnArguments]) -> TurnResult:
        """One turn, returned when it is complete."""
        self._check_one(asked)
        return (await self.choices(decoder, **asked))[0]

    async def choices(self, decoder: str, **asked: Unpack[TurnArguments]) -> list[TurnResult]:
        """`n` responses to the same, returned when all are complete. With `n` above 1, nothing is kept in the session."""
        results = await self._client._run(taken(await self._taking(decoder, asked)))
        self._turns = results[0].turns or None
        return results

    async def _taking(self, decoder: str, asked: TurnArguments) -> Taking:
        request = self._request(decoder, asked)
        if self._must_be_known:
            await self.get()
        return self._tries_of(request, asked)
