"""A small typed client of the gRPC surface; docs/client.md explains it. It needs gRPC and protobuf only.

with Client("127.0.0.1:9000") as client:
    session = client.create_session()
    turn = session.turn("planner", messages=[{"role": "user", "content": "Plan a trip."}])
    print(turn.text, turn.usage.cached_tokens)
    for piece in session.stream("coder", text=" Now the code:"):
        print(piece.text, end="")

AsyncClient is the same with `await` and `async for`. Calls carry the current OpenTelemetry trace of the calling code, if it has
one. With API keys and TLS: Client("router.example:9000", api_key=KEY, ca_file="ca.pem").
"""

from prefillshare.client.aio import AsyncClient, AsyncRemoteSession
from prefillshare.client.arguments import Message, Sampling, TurnArguments
from prefillshare.client.connection import API_KEY_VARIABLE
from prefillshare.client.results import ToolCall, TurnResult, collect
from prefillshare.client.retries import Retries
from prefillshare.client.sync import Client, RemoteSession
from prefillshare.kvshare import errors

__all__ = [
    "API_KEY_VARIABLE",
    "AsyncClient",
    "AsyncRemoteSession",
    "Client",
    "Message",
    "RemoteSession",
    "Retries",
    "Sampling",
    "ToolCall",
    "TurnArguments",
    "TurnResult",
    "collect",
    "errors",
]
