"""What the clients are alike in, whichever way they wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from prefillshare.client import settings
from prefillshare.client.arguments import TurnArguments, generate_request
from prefillshare.client.building import built
from prefillshare.client.connection import OPTIONS, Connection
from prefillshare.client.retries import NONE, Retries
from prefillshare.client.taking import Taking
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc

C = TypeVar("C", bound="ClientBase")


class ClientBase:
    """One connection. `timeout_s`: deadline, in seconds, of calls that set none; tries of a call share it.

    `api_key`: by default from the environment variable PREFILLSHARE_API_KEY; without either, calls carry no key.
    `tls`: trust the roots that gRPC comes with; `ca_file`: TLS that trusts the PEM file's roots instead.
    `cert_file`, `key_file`: the client's own certificate and its key, for servers that ask for one.
    `retries`: see Retries; None: no call is tried again.
    """

    #: What makes a channel without TLS, and one with it.
    _channels: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]

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
        retries: Retries | None = Retries(),  # noqa: B008 - it is immutable
    ):
        self.timeout_s = settings.seconds(timeout_s, "timeout_s")
        if retries is not None:
            settings.one_of(retries, Retries, "retries", "give Retries(most=...), or None")
        self.retries = NONE if retries is None else retries
        self._connection = Connection(address, api_key, tls, ca_file, cert_file, key_file)
        insecure, secure = type(self)._channels
        if self._connection.credentials is None:
            self._channel = insecure(address, options=OPTIONS)
        else:
            self._channel = secure(address, self._connection.credentials, options=OPTIONS)
        self._stub = pb_grpc.PrefillShareStub(self._channel)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.address!r})"

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of a call: the key, and the current OpenTelemetry trace, which the server continues."""
        return self._connection.metadata()


class SessionBase(Generic[C]):
    """A session on the server. Turns extend its context. `turns`: how many it has had; below 0: not known."""

    def __init__(self, client: C, session_id: str, turns: int = -1):
        self._client, self.session_id = client, session_id
        self._turns = turns if turns >= 0 else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.session_id!r}, {self._client!r})"

    @property
    def _must_be_known(self) -> bool:
        """How many turns there were must be asked first, for a turn that may have to be taken again."""
        return self._turns is None and self._client.retries.most > 0

    def _request(self, decoder: str, asked: TurnArguments) -> pb.GenerateRequest:
        self._timeout_s(asked)
        return generate_request(self.session_id, decoder, asked)

    def _tries_of(self, request: pb.GenerateRequest, asked: TurnArguments) -> Taking:
        return Taking(request, self._client.retries, self._timeout_s(asked), self._turns)

    def _timeout_s(self, asked: TurnArguments) -> float:
        given = asked.get("timeout_s")
        return self._client.timeout_s if given is None else settings.seconds(given, "timeout_s")

    def _noted(self, session: pb.Session) -> pb.Session:
        self._turns = session.turns
        return session

    def _noted_piece(self, piece: pb.GenerateResponse) -> pb.GenerateResponse:
        if piece.HasField("done"):
            self._turns = piece.done.turns or None
        return piece

    @staticmethod
    def _check_one(asked: TurnArguments) -> None:
        if built(pb.SamplingParams, {"n": asked.get("n")}).n > 1:
            raise InvalidInput("a turn has one result", field="n", fix="call `choices`, or `stream`")
