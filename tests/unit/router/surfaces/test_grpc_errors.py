"""What was not foreseen is INTERNAL over gRPC, whichever call it was: its text goes to the log, not to the client."""

import asyncio
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from ports import free_port

from prefillshare.client import Client
from prefillshare.kvshare.errors import InvalidInput, NotFound, Overloaded
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc
from prefillshare.router.sessions.turn_responses import TurnEvent
from prefillshare.router.surfaces.grpc_api import GrpcServer, Servicer
from prefillshare.router.surfaces.grpc_errors import MOST_CHARS

SECRET = "redis://user:secret@10.0.0.1/0"
CALLS = {
    "CreateSession": pb.CreateSessionRequest(),
    "GetSession": pb.GetSessionRequest(session_id="s"),
    "ForkSession": pb.ForkSessionRequest(session_id="s"),
    "DeleteSession": pb.DeleteSessionRequest(session_id="s"),
    "ListSessions": pb.ListSessionsRequest(),
    "UpdateSession": pb.UpdateSessionRequest(session_id="s", truncate_to=0),
    "GetReadiness": pb.GetReadinessRequest(),
    "Generate": pb.GenerateRequest(session_id="s"),
}


async def fails(*args, **kwargs):
    raise RuntimeError(SECRET)


async def breaks_off(*args, **kwargs):
    yield TurnEvent("x", [1])
    raise RuntimeError(SECRET)


@pytest.fixture
async def stub():
    sessions = SimpleNamespace(get=fails, listed=fails)
    turns = SimpleNamespace(sessions=sessions, create=fails, fork=fails, delete=fails, update=fails, take=breaks_off)
    port = free_port()
    server = GrpcServer(Servicer(turns, fails), "127.0.0.1", port)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield pb_grpc.PrefillShareStub(channel)
    await server.stop(0)


@pytest.mark.parametrize("name", CALLS)
async def test_the_client_is_told_where_to_look_and_nothing_of_the_inside(stub, name, caplog):
    async def whole_answer():
        call = getattr(stub, name)(CALLS[name], timeout=10)
        return [piece async for piece in call] if name == "Generate" else await call

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await whole_answer()
    assert refused.value.code() == grpc.StatusCode.INTERNAL
    told = f"{refused.value.details()} {refused.value.trailing_metadata()}"
    assert "failed in the router" in told
    assert "secret" not in told
    assert SECRET in caplog.text


@pytest.mark.parametrize(
    ("error", "field", "delay_s"),
    [
        (InvalidInput("too long", field="sampling.stop", fix="send fewer"), "sampling.stop", None),
        (Overloaded("full", retry_after_s=2.5), None, 2.5),
        (NotFound("no session 'ä'"), None, None),
    ],
)
async def test_details_come_the_standard_way_and_the_client_has_the_error_again(error, field, delay_s):
    async def raises(*args, **kwargs):
        raise error

    turns = SimpleNamespace(create=raises)
    port = free_port()
    server = GrpcServer(Servicer(turns, raises), "127.0.0.1", port)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await pb_grpc.PrefillShareStub(channel).CreateSession(pb.CreateSessionRequest(), timeout=10)
        found = {}
        for packed in rpc_status.from_call(refused.value).details:
            for message in (pb.ErrorDetail(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()):
                if packed.Unpack(message):
                    found[message.DESCRIPTOR.name] = message
        assert found["ErrorDetail"].kind == type(error).__name__
        assert [v.field for v in found["BadRequest"].field_violations] == [field] if field else "BadRequest" not in found
        if delay_s:
            assert found["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == delay_s
        else:
            assert "RetryInfo" not in found
        with pytest.raises(type(error)) as typed:
            await asyncio.to_thread(ask, port)
        assert (typed.value.message, typed.value.field, typed.value.fix) == (error.message, error.field, error.fix)
    finally:
        await server.stop(0)


def ask(port: int) -> None:
    with Client(f"127.0.0.1:{port}", retries=None) as client:
        client.create_session()


async def test_a_long_message_arrives_cut_in_what_clients_take_of_metadata():
    async def raises(*args, **kwargs):
        raise InvalidInput("x" * 50_000, field="f", fix="y" * 50_000)

    port = free_port()
    server = GrpcServer(Servicer(SimpleNamespace(create=raises), raises), "127.0.0.1", port)
    await server.start()
    try:
        with pytest.raises(InvalidInput, match=f"{'x' * MOST_CHARS} \\.\\.\\."):
            await asyncio.to_thread(ask, port)
    finally:
        await server.stop(0)
