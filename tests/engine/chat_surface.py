"""vLLM's app with calls tied to contexts, over turns that answer what a test tells them. No engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx
from ports import free_port
from stub_turn import StubTurn

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.router.ahead.response_kv import ResponseKV
from prefillshare.router.responses.threads import Threads
from prefillshare.router.sessions.memory import MemorySessions

DECODERS = ("planner", "coder")
END = 2


async def _ready() -> str:
    return ""


class ChatSurface:
    """`answers`: the texts of the next responses, the last of them again and again. `prompts`: those of all turns, as text;
    `ids`: as token ids; `samplings`: their sampling parameters. `ending`: how the responses end."""

    def __init__(self, model: str, **config):
        self.base = Base(model=model, dtype="float32", max_model_len=1024, tool_call_parser="hermes")
        self.config, self.sessions = config, MemorySessions(100, 100)
        self.threads = MemorySessions(40, 100, {"": 20, "me": 20}, evicts=True)
        self.answers: list[str] = ["Yes."]
        self.prompts: list[str] = []
        self.ids: list[list[int]] = []
        self.samplings: list = []
        self.ending = "stop"

    async def start(self) -> None:
        from prefillshare.kvshare_vllm.surface.openai_app import build_openai_app
        from prefillshare.router.sessions.http_calls import HttpCalls
        from prefillshare.router.sessions.turns import Turns
        from prefillshare.router.surfaces.grpc_api import GrpcServer, Servicer
        from prefillshare.router.surfaces.http_sessions import HttpSessions, serve_chats

        self.app, self.frontend = await build_openai_app(
            self.base, DECODERS, self._turn, lambda *_: None, middleware=[HttpSessions]
        )
        decoders = {name: Decoder(name, "agents", "prefillshare", name, "lora") for name in DECODERS}
        calls = HttpCalls(self.base, decoders, self.frontend, self.sessions, ResponseKV(), **self.config)
        serve_chats(self.app, calls, Threads(self.threads))
        self.tokenizer = self.frontend.renderer.tokenizer
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://router")
        self.turns = Turns(self.base, decoders, self.frontend, self.sessions, ResponseKV(), **self.config)
        port = free_port()
        self.grpc_address = f"127.0.0.1:{port}"
        self.grpc = GrpcServer(Servicer(self.turns, _ready), "127.0.0.1", port)
        await self.grpc.start()

    async def stop(self) -> None:
        await self.http.aclose()
        await self.grpc.stop(0)
        self.frontend.shutdown()

    def _turn(self, call) -> StubTurn:
        self.ids.append(call.prompt)
        self.samplings.append(call.sampling)
        self.prompts.append(self.tokenizer.decode(call.prompt))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return StubTurn(self._chunks(self.encode(answer)))

    async def _chunks(self, ids: Sequence[int]):
        cut_off, ids = self.ending != "stop", list(ids)
        for token in ids[: len(ids) - cut_off]:
            yield TokenChunk([token])
            await asyncio.sleep(0)  # its client may read what there is
        yield TokenChunk(ids[-1:] if cut_off else [END], finish_reason=self.ending)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
