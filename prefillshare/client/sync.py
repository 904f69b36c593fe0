"""The client for code without an event loop; prefillshare/client/aio.py is the one for code with one. Both do the same steps
(prefillshare/client/flows.py)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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


class Client(ClientBase):
    _channels = grpc.insecure_channel, grpc.secure_channel

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def decoders(self) -> list[pb.Decoder]:
        return list((self._do(calls.decoders())).decoders)

    def not_ready_because(self) -> str:
        """Empty if a turn on every pool would succeed, else the reason."""
        return (self._do(calls.readiness())).reason

    def create_session(
        self,
        session_id: str = "",
        *,
        messages: Sequence[Message] | None = None,
        text: str | None = None,
        token_ids: Sequence[int] | None = None,
        cache_domain: str = "",
        ttl_s: float | None = None,
    ) -> RemoteSession:
        """Make a session. `cache_domain`: share KV with the sessions and requests of this domain; default: the tenant's own.
        `ttl_s`: seconds without use after which it is forgotten; default: the deployment's."""
        made = self._do(calls.create(session_id, messages, text, token_ids, cache_domain, ttl_s))
        return RemoteSession(self, made.session_id, made.turns)

    def session(self, session_id: str) -> RemoteSession:
        """A session that exists already."""
        return RemoteSession(self, session_id)

    def sessions(self, page_size: int = 0) -> Iterator[pb.Session]:
        """All of the caller's sessions, asked for page by page; those that would be forgotten first come first."""
        token, is_last = "", False
        while not is_last:
            page = self._do(calls.page(page_size, token))
            yield from page.sessions
            token, is_last = page.next_page_token, not page.next_page_token

    def kept(self) -> pb.ListKeptResponse:
        """What the tenant keeps in the engines' caches, and its budget."""
        return self._do(calls.kept())

    def let_go(self, kept_id: str) -> None:
        """Keep this no longer than the caches do by themselves: a session or the beginning of a prompt, by the `id` that `kept`
        tells. Raises NotFound if nothing is kept under it."""
        self._do(calls.let_go_kept(kept_id))

    def _do(self, call: Call) -> Any:
        return self._run(answered(call, self.retries, self.timeout_s))

    def _run(self, steps: Steps[T]) -> T:
        go_on, outcome = steps.send, None
        while True:
            try:
                step = go_on(outcome)
            except StopIteration as end:
                return end.value
            try:
                go_on, outcome = steps.send, self._step(step)
            except PrefillShareError as error:
                go_on, outcome = steps.throw, error

    def _step(self, step: Ask | Collect | Pause) -> Any:
        match step:
            case Pause(seconds):
                return time.sleep(seconds)
            case Ask(call, timeout_s):
                with typed_errors():
                    method = getattr(self._stub, call.method)
                    return method(call.request, timeout=timeout_s, metadata=self.metadata())
            case Collect(taking):
                collected = Collected()
                for piece in self._pieces(taking):
                    collected.add(piece)
                return collected

    def _pieces(self, taking: Taking) -> Iterator[pb.GenerateResponse]:
        with typed_errors():
            call = self._stub.Generate(taking.request, timeout=taking.left_s, metadata=self.metadata())
            try:
                yield from call
            finally:
                call.cancel()


class RemoteSession(SessionBase[Client]):
    def get(self, with_token_ids: bool = False) -> pb.Session:
        return self._noted(self._client._do(calls.get(self.session_id, with_token_ids)))

    def fork(self, new_session_id: str = "") -> RemoteSession:
        made = self._client._do(calls.fork(self.session_id, new_session_id))
        return RemoteSession(self._client, made.session_id, made.turns)

    def update(self, *, truncate_to: int | None = None, ttl_s: float | None = None) -> pb.Session:
        """Keep only the first `truncate_to` tokens of the context; give the session a time to live of its own, in seconds (0:
        the deployment's)."""
        return self._noted(self._client._do(calls.update(self.session_id, truncate_to, ttl_s)))

    def keep(self, ttl_s: float = 0.0, priority: int | None = None) -> pb.KeptContext:
        """Keep the KV of the session's context in the engines' caches, for `ttl_s` seconds from now and from the end of each
        turn on; 0: as long as an unused session lives. `priority`: 0 to 100; what has a higher one is given up later.
        Raises Overloaded or InvalidInput beyond the tenant's budget."""
        return self._client._do(calls.keep(self.session_id, ttl_s, priority))

    def let_go(self) -> None:
        """Keep the session's context no longer than the caches do by themselves."""
        self._client._do(calls.let_go(self.session_id))

    def delete(self) -> None:
        self._client._do(calls.delete(self.session_id))

    def stream(self, decoder: str, **asked: Unpack[TurnArguments]) -> Iterator[pb.GenerateResponse]:
        """One turn, streamed. Closing the iterator cancels the turn. Once a piece has come, nothing is tried again."""
        taking = self._taking(decoder, asked)
        while True:
            begun = False
            try:
                for piece in self._client._pieces(taking):
                    begun = True
                    yield self._noted_piece(piece)
                return
            except PrefillShareError as error:
                if begun:
                    raise
                pause_s = taking.pause_s(error)
            self._client._run(before_next(taking, pause_s))

    def turn(self, decoder: str, **asked: Unpack[TurnArguments]) -> TurnResult:
        """One turn, returned when it is complete."""
        self._check_one(asked)
        return (self.choices(decoder, **asked))[0]

    def choices(self, decoder: str, **asked: Unpack[TurnArguments]) -> list[TurnResult]:
        """`n` responses to the same, returned when all are complete. With `n` above 1, nothing is kept in the session."""
        results = self._client._run(taken(self._taking(decoder, asked)))
        self._turns = results[0].turns or None
        return results

    def _taking(self, decoder: str, asked: TurnArguments) -> Taking:
        request = self._request(decoder, asked)
        if self._must_be_known:
            self.get()
        return self._tries_of(request, asked)
