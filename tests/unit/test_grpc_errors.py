"""What was not foreseen is INTERNAL over gRPC, whichever call it was: its text goes to the log, not to the client."""

from types import SimpleNamespace

import grpc
import pytest
from ports import free_port

from protos.prefillshare.v1 import prefillshare_pb2 as pb
from protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc
from router.surfaces.grpc_api import GrpcServer, Servicer

SECRET = "redis://user:secret@10.0.0.1/0"
CALLS = {
    "CreateSession": pb.CreateSessionRequest(),
    "GetSession": pb.GetSessionRequest(session_id="s"),
    "ForkSession": pb.ForkSessionRequest(session_id="s"),
    "DeleteSession": pb.DeleteSessionRequest(session_id="s"),
    "GetReadiness": pb.GetReadinessRequest(),
    "Generate": pb.GenerateRequest(session_id="s"),
}


async def fails(*args, **kwargs):
    raise RuntimeError(SECRET)


async def breaks_off(*args, **kwargs):
    yield SimpleNamespace(text="x", token_ids=[1], logprobs=None, finish_reason=None)
    raise RuntimeError(SECRET)


@pytest.fixture
async def stub():
    sessions = SimpleNamespace(get=fails, fork=fails)
    turns = SimpleNamespace(sessions=sessions, create=fails, delete=fails, take=breaks_off)
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
