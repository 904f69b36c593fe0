"""A small typed client of the gRPC surface.

with Client("127.0.0.1:9000") as client:
    session = client.create_session()
    turn = session.turn("planner", messages=[{"role": "user", "content": "Plan a trip."}])
    print(turn.text, turn.usage.cached_tokens)
    for piece in session.stream("coder", text=" Now the code:"):
        print(piece.text, end="")

Calls carry the current OpenTelemetry trace of the calling code.

With API keys and TLS: Client("router.example:9000", api_key=KEY, ca_file="ca.pem").
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_status import rpc_status
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from prefillshare.kvshare import errors
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc

API_KEY_VARIABLE = "PREFILLSHARE_API_KEY"
_MAX_MESSAGE_BYTES = 64 << 20

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class TurnResult:
    """A complete turn. `logprobs`: those of the generated tokens, one per token, if asked for."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    context_tokens: int
    usage: pb.Usage


class Client:
    """One connection. `timeout_s`: deadline, in seconds, of calls that set none.

    `api_key`: by default from the environment variable PREFILLSHARE_API_KEY; without either, calls carry no key.
    `tls`: trust the roots that gRPC comes with; `ca_file`: TLS that trusts the PEM file's roots instead.
    `cert_file`, `key_file`: the client's own certificate and its key, for servers that ask for one.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:9000",
        timeout_s: float = 300.0,
        *,
        api_key: str | None = None,
        tls: bool = False,
        ca_file: str | Path | None = None,
        cert_file: str | Path | None = None,
        key_file: str | Path | None = None,
    ):
        options = [
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.use_local_subchannel_pool", 1),  # else a process's channels share a connection, to one router
            # To find routers at once that are back after an outage; gRPC's own pause between tries grows to 2 minutes.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            # To notice during a silent turn that a router is gone, and to have load balancers in between keep idle connections.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.ping_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        ]
        self._metadata = _metadata(api_key or os.environ.get(API_KEY_VARIABLE))
        if tls or ca_file or cert_file or key_file:
            self._channel = grpc.secure_channel(address, _credentials(ca_file, cert_file, key_file), options=options)
        else:
            self._channel = grpc.insecure_channel(address, options=options)
        self._stub = pb_grpc.PrefillShareStub(self._channel)
        self.timeout_s = timeout_s

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def decoders(self) -> list[pb.Decoder]:
        return list(self._call(self._stub.ListDecoders, pb.ListDecodersRequest()).decoders)

    def not_ready_because(self) -> str:
        """Empty if a turn on every pool would succeed, else the reason."""
        return self._call(self._stub.GetReadiness, pb.GetReadinessRequest()).reason

    def create_session(
        self,
        session_id: str = "",
        *,
        messages: Messages | None = None,
        text: str | None = None,
        token_ids: Sequence[int] | None = None,
        cache_domain: str = "",
    ) -> RemoteSession:
        """Make a session. `cache_domain`: share KV with the sessions and requests of this domain; default: the tenant's own."""
        request = pb.CreateSessionRequest(
            session_id=session_id, input=_input(messages, text, token_ids), cache_domain=cache_domain
        )
        return RemoteSession(self, self._call(self._stub.CreateSession, request).session_id)

    def session(self, session_id: str) -> RemoteSession:
        """A session that exists already."""
        return RemoteSession(self, session_id)

    def kept(self) -> pb.ListKeptResponse:
        """What the tenant keeps in the engines' caches, and its budget."""
        return self._call(self._stub.ListKept, pb.ListKeptRequest())

    def _call(self, method, request):
        with _typed_errors():
            return method(request, timeout=self.timeout_s, metadata=self.metadata())

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of a call: the key, and the current OpenTelemetry trace, which the server continues."""
        trace: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(trace)
        return (*self._metadata, *trace.items())


class RemoteSession:
    """A session on the server. Turns extend its context."""

    def __init__(self, client: Client, session_id: str):
        self._client, self.session_id = client, session_id

    def get(self, with_token_ids: bool = False) -> pb.Session:
        stub = self._client._stub
        return self._client._call(
            stub.GetSession, pb.GetSessionRequest(session_id=self.session_id, include_token_ids=with_token_ids)
        )

    def fork(self, new_session_id: str = "") -> RemoteSession:
        stub = self._client._stub
        request = pb.ForkSessionRequest(session_id=self.session_id, new_session_id=new_session_id)
        return RemoteSession(self._client, self._client._call(stub.ForkSession, request).session_id)

    def keep(self, ttl_s: float = 0.0, priority: int | None = None) -> pb.KeptContext:
        """Keep the KV of the session's context in the engines' caches, for `ttl_s` seconds from now and from the end of each
        turn on; 0: as long as an unused session lives. `priority`: 0 to 100; what has a higher one is given up later.
        Raises Overloaded or InvalidInput beyond the tenant's budget."""
        request = pb.KeepSessionRequest(session_id=self.session_id, ttl_s=ttl_s, priority=priority)
        return self._client._call(self._client._stub.KeepSession, request)

    def let_go(self) -> None:
        """Keep the session's context no longer than the caches do by themselves."""
        self._client._call(self._client._stub.LetGoSession, pb.LetGoSessionRequest(session_id=self.session_id))

    def delete(self) -> None:
        self._client._call(self._client._stub.DeleteSession, pb.DeleteSessionRequest(session_id=self.session_id))

    def stream(
        self,
        decoder: str,
        *,
        messages: Messages | None = None,
        text: str | None = None,
        token_ids: Sequence[int] | None = None,
        suffix_messages: Messages | None = None,
        suffix_text: str | None = None,
        suffix_token_ids: Sequence[int] | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        **sampling,
    ) -> Iterator[pb.GenerateResponse]:
        """One turn, streamed. `priority`: how far it goes behind the tenant's other turns. `sampling`: fields of
        pb.SamplingParams. Closing the iterator cancels the turn."""
        request = pb.GenerateRequest(
            session_id=self.session_id,
            decoder=decoder,
            input=_input(messages, text, token_ids),
            suffix=_input(suffix_messages, suffix_text, suffix_token_ids),
            sampling=pb.SamplingParams(**sampling),
            priority=priority,
        )
        with _typed_errors():
            client = self._client
            call = client._stub.Generate(request, timeout=timeout_s or client.timeout_s, metadata=client.metadata())
            try:
                yield from call
            finally:
                call.cancel()

    def turn(self, decoder: str, **kwargs) -> TurnResult:
        """One turn, returned when it is complete. Arguments as for `stream`."""
        return collect(self.stream(decoder, **kwargs))


def collect(pieces: Iterable[pb.GenerateResponse], seen: Callable[[str], None] = lambda text: None) -> TurnResult:
    """Collect a streamed turn. `seen` is called with the text so far after every piece."""
    text, tokens, logprobs, done = "", [], [], None
    for piece in pieces:
        text += piece.text
        tokens += piece.token_ids
        logprobs += [row.entries[0].logprob for row in piece.logprobs]
        done = piece.done if piece.HasField("done") else done
        seen(text)
    if done is None:
        raise errors.ConnectionLost("the server ended the stream without a result", fix="check whether the session has grown")
    return TurnResult(text, tokens, logprobs, done.finish_reason, done.context_tokens, done.usage)


def _input(messages: Messages | None, text: str | None, token_ids: Sequence[int] | None) -> pb.Input | None:
    given = [x is not None for x in (messages, text, token_ids)]
    if sum(given) > 1:
        raise errors.InvalidInput("messages, text and token_ids exclude each other", fix="give one of them")
    if messages is not None:
        return pb.Input(messages=pb.Messages(messages=[pb.Message(role=m["role"], content=m["content"]) for m in messages]))
    if text is not None:
        return pb.Input(text=text)
    return pb.Input(token_ids=pb.TokenIds(ids=token_ids)) if token_ids is not None else None


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    if not api_key:
        return ()
    if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        raise errors.InvalidInput("a key is ASCII text without spaces", field="api_key", fix="check it for a line break")
    return (("authorization", f"Bearer {api_key}"),)


def _credentials(*files: str | Path | None) -> grpc.ChannelCredentials:
    def content(name: str, file: str | Path | None) -> bytes | None:
        try:
            return None if file is None else Path(file).read_bytes()
        except OSError as error:
            raise errors.ConfigError(f"cannot read {file}: {error.strerror}", field=name, fix="give a PEM file") from None

    roots, certificate, key = map(content, ("ca_file", "cert_file", "key_file"), files)
    if (certificate is None) != (key is None):
        raise errors.ConfigError("cert_file and key_file go together", field="cert_file", fix="give both, or neither")
    return grpc.ssl_channel_credentials(roots, key, certificate)


@contextmanager
def _typed_errors():
    """gRPC errors as the exceptions of kvshare.errors."""
    try:
        yield
    except grpc.RpcError as error:
        raise _typed(error) from error


def _typed(error: grpc.RpcError) -> errors.PrefillShareError:
    status, detail = rpc_status.from_call(error), pb.ErrorDetail()
    for packed in status.details if status else ():
        if packed.Unpack(detail):
            kind = getattr(errors, detail.kind, errors.PrefillShareError)
            more = {"retry_after_s": detail.retry_after_s} if issubclass(kind, errors.Overloaded) else {}
            return kind(detail.message, field=detail.field or None, fix=detail.fix or None, **more)
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or ""):
        # gRPC itself refuses a message that is too large, before the router sees it: waiting would not help.
        return errors.InvalidInput(error.details(), fix="send less, or raise router.max_request_bytes")
    by_code = {
        grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
        grpc.StatusCode.UNAVAILABLE: errors.ConnectionLost,  # the router's own has details
        grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
        grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
        grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    }
    return by_code.get(error.code(), errors.PrefillShareError)(f"{error.code().name}: {error.details()}")
