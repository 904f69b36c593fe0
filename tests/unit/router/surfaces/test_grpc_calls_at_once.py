"""A router takes so many gRPC calls at once, of whatever kind; further ones are refused, and nothing waits."""

import asyncio

import grpc
from ports import free_port

from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc
from prefillshare.router.surfaces.grpc_api import GrpcServer


class Slow(pb_grpc.PrefillShareServicer):
    def __init__(self):
        self.answer = asyncio.Event()

    async def ListDecoders(self, request, context):
        await self.answer.wait()
        return pb.ListDecodersResponse()


async def test_calls_beyond_the_bound_are_refused_at_once():
    servicer, port = Slow(), free_port()
    server = GrpcServer(servicer, "127.0.0.1", port, most_calls=3)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = pb_grpc.PrefillShareStub(channel).ListDecoders
        calls = [ask(pb.ListDecodersRequest(), timeout=10) for _ in range(5)]
        done, _ = await asyncio.wait([asyncio.ensure_future(call.code()) for call in calls], timeout=5)
        assert {code.result() for code in done} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        servicer.answer.set()
        codes = await asyncio.gather(*(call.code() for call in calls))
        assert codes.count(grpc.StatusCode.OK) == 5 - len(done) == 3
        assert await ask(pb.ListDecodersRequest(), timeout=10) == pb.ListDecodersResponse()
    await server.stop(0)
