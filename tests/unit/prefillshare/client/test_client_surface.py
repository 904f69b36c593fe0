"""Both clients have the same surface, tell who they are, and need nothing but gRPC and protobuf."""

import inspect
import subprocess
import sys

import pytest
from scripted_router import ScriptedRouter, client_of, serving

from prefillshare.client import AsyncClient, AsyncRemoteSession, Client, RemoteSession, TurnResult
from prefillshare.client.failures import typed
from prefillshare.kvshare import errors
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import rpc_status_pb2 as rpc_pb

BOTH = pytest.mark.parametrize("kind", ["sync", "async"])
PUBLIC = {
    Client: {"close", "create_session", "decoders", "kept", "let_go", "metadata", "not_ready_because", "session", "sessions"},
    RemoteSession: {"choices", "delete", "fork", "get", "keep", "let_go", "stream", "turn", "update"},
}


def public(kind: type) -> dict[str, inspect.Signature]:
    found = inspect.getmembers(kind, inspect.isfunction)
    return {name: inspect.signature(function) for name, function in found if not name.startswith("_")}


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (RemoteSession, AsyncRemoteSession)])
def test_the_async_client_has_the_surface_of_the_sync_one(one, other):
    theirs, ours = public(one), public(other)
    assert theirs.keys() == ours.keys() == PUBLIC[one]
    for name, signature in theirs.items():
        assert signature.parameters == ours[name].parameters, name


@BOTH
async def test_a_client_and_what_it_makes_say_who_they_are(kind):
    router = ScriptedRouter()
    async with serving(router) as (_, port), client_of(kind, port) as client:
        session = await client.create_session("s")
        turn = await session.turn("planner", text="hi")
        made, start = (session.of, "") if kind == "sync" else (session, "Async")
        assert repr(made) == f"{start}RemoteSession('s', {start}Client('127.0.0.1:{port}'))"
        assert repr(turn) == (
            "TurnResult('Paris.', finish_reason='stop', tokens=2, prompt_tokens=0, cached_tokens=0, context_tokens=9)"
        )


def test_a_long_text_is_cut_and_calls_are_shown():
    done = ("tool_calls", 9, pb.Usage())
    told = repr(TurnResult("x" * 500, list(range(500)), [], *done, [pb.ToolCall(name="look")]))
    assert len(told) < 250
    assert "look" in told


@BOTH
async def test_all_sessions_are_listed_page_by_page(kind):
    router = ScriptedRouter()
    router.turns = {f"s{number}": number for number in range(7)}
    async with serving(router) as (_, port), client_of(kind, port) as client:
        found = [(session.session_id, session.turns) async for session in client.sessions(page_size=3)]
    assert found == [(f"s{number}", number) for number in range(7)]
    assert router.count("ListSessions") == 3


@BOTH
async def test_a_turn_has_one_result(kind):
    async with serving(ScriptedRouter()) as (_, port), client_of(kind, port) as client:
        session = await client.create_session()
        with pytest.raises(errors.InvalidInput, match=r"n: .*choices"):
            await session.turn("planner", text="x", n=2)


class Refusal(Exception):
    def __init__(self, code, *details):
        super().__init__()
        status = rpc_pb.RpcStatus(code=8)
        for name, message in details:
            status.details.add(type_url=f"type.googleapis.com/{name}", value=message.SerializeToString())
        self._code, self._packed = code, status.SerializeToString()

    def code(self):
        return self._code

    def details(self):
        return "said"

    def trailing_metadata(self):
        return (("other", "x"), ("grpc-status-details-bin", self._packed))


def test_a_hint_of_the_standard_alone_is_taken():
    """As a proxy before the router gives it."""
    import grpc

    hint = rpc_pb.RpcRetryInfo()
    hint.retry_delay.FromMilliseconds(1500)
    error = typed(Refusal(grpc.StatusCode.UNAVAILABLE, ("google.rpc.RetryInfo", hint)))
    assert (type(error), error.retry_after_s) == (errors.ConnectionLost, 1.5)
    ours = pb.ErrorDetail(kind="os", message="x")
    assert type(typed(Refusal(grpc.StatusCode.INTERNAL, ("prefillshare.v1.ErrorDetail", ours)))) is errors.PrefillShareError


def test_nothing_is_imported_but_grpc_and_protobuf():
    """And typing_extensions, which gRPC imports."""
    program = """
import sys
class Others:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top == "google":
            allowed = name == "google" or name.startswith(("google.protobuf", "google._upb"))
        else:
            allowed = top in {"grpc", "prefillshare", "typing_extensions"} or top in sys.stdlib_module_names
        if not allowed:
            raise ImportError(name)
sys.meta_path.insert(0, Others())
import prefillshare.client as client
with client.Client("127.0.0.1:1") as one:
    assert one.metadata() == ()
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("imported\n", "")
