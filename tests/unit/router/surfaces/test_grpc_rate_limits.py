"""Over gRPC the trailing metadata say how the tenant stands; a refusal is RESOURCE_EXHAUSTED with RetryInfo."""

from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from ports import free_port
from prometheus_client import CollectorRegistry

from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.usage import TurnUsage
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc
from prefillshare.router.accounts.limits import MemoryLimits
from prefillshare.router.admission.grant import Demand, TenantShare
from prefillshare.router.sessions.turn_responses import TurnEvent
from prefillshare.router.surfaces.grpc_api import GrpcServer, Servicer

TENANT = TenantShare("acme", tokens_per_minute=600, turns_per_minute=60)


@pytest.fixture
async def stub():
    limits = MemoryLimits(Metrics(CollectorRegistry()))

    async def take(*_, **__):
        await limits.take(Demand("agents", 300, tenant=TENANT), 20)
        yield TurnEvent("x", [1])
        yield TurnEvent("", [], finish_reason="stop", usage=TurnUsage(), context_tokens=1)

    port = free_port()
    server = GrpcServer(Servicer(SimpleNamespace(take=take), None), "127.0.0.1", port)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield pb_grpc.PrefillShareStub(channel)
    await server.stop(0)


async def test_an_answer_and_a_refusal_tell_what_is_left(stub):
    call = stub.Generate(pb.GenerateRequest(session_id="s"), timeout=10)
    assert len([piece async for piece in call]) == 2
    told = dict(await call.trailing_metadata())
    assert told["x-ratelimit-limit-tokens"] == "600"
    assert told["x-ratelimit-remaining-tokens"] == "280"
    assert told["x-ratelimit-remaining-requests"] == "59"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [piece async for piece in stub.Generate(pb.GenerateRequest(session_id="s"), timeout=10)]
    error = caught.value
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["x-ratelimit-limit-tokens"] == "600"
    info = error_details_pb2.RetryInfo()
    assert any(packed.Unpack(info) for packed in rpc_status.from_call(error).details)
    assert info.retry_delay.ToTimedelta().total_seconds() == pytest.approx(4, abs=0.5)  # 40 tokens at 10 a second
