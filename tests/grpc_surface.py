"""Both surfaces over turns that answer what a test tells them. No engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ports import free_port

from benchmarks.chats.surface import END, ChatSurface
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.router.ahead.response_kv import ResponseKV


class GrpcSurface(ChatSurface):
    """`samplings`: the sampling parameters of all turns. `ending`: how the responses end. `pace`: a token is made for each of
    its releases; None: all at once. `keeper`: KeepingSurface's, for one that is both."""

    keeper = None

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.samplings: list = []
        self.ending = "stop"
        self.pace: asyncio.Semaphore | None = None

    async def start(self) -> None:
        from prefillshare.router.sessions.turns import Turns
        from prefillshare.router.surfaces.grpc_api import GrpcServer, Servicer

        await super().start()
        turns = Turns(self.base, self.decoders, self.frontend, self.sessions, ResponseKV(keeper=self.keeper), **self.config)
        port = free_port()
        self.grpc_address = f"127.0.0.1:{port}"
        self.grpc = GrpcServer(Servicer(turns, None), "127.0.0.1", port)
        await self.grpc.start()

    async def stop(self) -> None:
        await self.grpc.stop(0)
        await super().stop()

    def _turn(self, call):
        self.samplings.append(call.sampling)
        return super()._turn(call)

    async def _chunks(self, ids: Sequence[int], most: int):
        cut_off, ids = self.ending != "stop", list(ids)
        for token in ids[: len(ids) - cut_off]:
            if self.pace:
                await self.pace.acquire()
            yield TokenChunk([token])
            await asyncio.sleep(0)  # its client may read what there is
        yield TokenChunk(ids[-1:] if cut_off else [END], finish_reason=self.ending)
