"""Pings over gRPC: clients may send them as they like, and a client that is gone is noticed by the router's own."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from ports import free_port

from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc
from prefillshare.router.surfaces.grpc_api import GrpcServer
from prefillshare.router.surfaces.grpc_keepalive import server_options

pytestmark = pytest.mark.slow

#: gRPC sends at most one ping a second. By default a server closes a connection at the third.
PINGS = [("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0)]
SEVERAL_PINGS_S = 6.0


class Silent(pb_grpc.PrefillShareServicer):
    """A turn that is silent until `answer` is set."""

    def __init__(self):
        self.running, self.answer, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def ListDecoders(self, request, context):
        return pb.ListDecodersResponse()

    async def Generate(self, request, context):
        self.running.set()
        try:
            await self.answer.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        yield pb.GenerateResponse(text="at last")


@asynccontextmanager
async def router(servicer, **options):
    """Yields the port."""
    port = free_port()
    server = GrpcServer(servicer, "127.0.0.1", port, **options)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@asynccontextmanager
async def connected(port: int):
    options = [*PINGS, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stub = pb_grpc.PrefillShareStub(channel)
        await stub.ListDecoders(pb.ListDecodersRequest(), timeout=10)
        yield channel, stub


async def changes_within(channel, seconds: float) -> bool:
    try:
        await asyncio.wait_for(channel.wait_for_state_change(grpc.ChannelConnectivity.READY), seconds)
    except TimeoutError:
        return False
    return True


async def test_a_client_that_pings_every_second_keeps_its_idle_channel_and_its_silent_stream():
    servicer = Silent()
    async with router(servicer) as port, connected(port) as (idle, _), connected(port) as (busy, stub):
        turn = stub.Generate(pb.GenerateRequest(), timeout=30)
        first = asyncio.create_task(turn.read())
        cut = await asyncio.gather(changes_within(idle, SEVERAL_PINGS_S), changes_within(busy, SEVERAL_PINGS_S))
        assert cut == [False, False]
        servicer.answer.set()
        assert (await first).text == "at last"


class Wire:
    """Carries bytes between a client and the router until `cut`; both sides' sockets stay open, as where power is lost."""

    def __init__(self, port: int):
        self._port, self._is_cut = port, False
        self._tasks: list[asyncio.Task] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> int:
        """Returns the client's port."""
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    async def __aexit__(self, *exc) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    def cut(self) -> None:
        self._is_cut = True

    async def _connect(self, reader, writer) -> None:
        up, down = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, down]
        self._tasks += [asyncio.create_task(self._pump(reader, down)), asyncio.create_task(self._pump(up, writer))]

    async def _pump(self, reader, writer) -> None:
        while data := await reader.read(1 << 16):
            if not self._is_cut:
                writer.write(data)


async def test_a_client_that_is_gone_without_a_word_ends_its_turn():
    servicer = Silent()
    async with router(servicer, keepalive=server_options(1, 1)) as port:
        wire = Wire(port)
        async with wire as clients_port, connected(clients_port) as (_, stub):
            turn = stub.Generate(pb.GenerateRequest(), timeout=60)
            await asyncio.wait_for(servicer.running.wait(), 10)
            wire.cut()
            await asyncio.wait_for(servicer.cancelled.wait(), 20)
            turn.cancel()
