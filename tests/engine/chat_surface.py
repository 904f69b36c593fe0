"""vLLM's app with calls tied to contexts, over turns that answer what a test tells them. No engine runs."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
from stub_turn import StubTurn

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.router.ahead.response_kv import ResponseKV
from prefillshare.router.responses.threads import Threads
from prefillshare.router.sessions import MemorySessions, SessionStore

DECODERS = ("planner", "coder")
END = 2


class ChatSurface:
    """`answers`: the texts of the next responses, the last of them again and again. `prompts`: those of all turns, as text."""

    def __init__(self, model: str, threads: SessionStore | None = None, **config):
        self.base = Base(model=model, dtype="float32", max_model_len=1024, tool_call_parser="hermes")
        self.config, self.sessions = config, MemorySessions(100, 100)
        self.threads = threads or MemorySessions(40, 100, {"": 20, "me": 20}, evicts=True)
        self.answers: list[str] = ["Yes."]
        self.prompts: list[str] = []
        self.ids: list[list[int]] = []

    async def start(self) -> None:
        from prefillshare.kvshare_vllm.surface.openai_app import build_openai_app
        from prefillshare.router.sessions.http_calls import HttpCalls
        from prefillshare.router.surfaces.http_sessions import HttpSessions, serve_chats

        self.app, self.frontend = await build_openai_app(
            self.base, DECODERS, self._turn, lambda *_: None, middleware=[HttpSessions]
        )
        decoders = {name: Decoder(name, "agents", "prefillshare", name, "lora") for name in DECODERS}
        calls = HttpCalls(self.base, decoders, self.frontend, self.sessions, ResponseKV(), **self.config)
        serve_chats(self.app, calls, Threads(self.threads))
        self.tokenizer = self.frontend.renderer.tokenizer
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://router")

    async def stop(self) -> None:
        await self.http.aclose()
        self.frontend.shutdown()

    def _turn(self, call) -> StubTurn:
        self.ids.append(call.prompt)
        self.prompts.append(self.tokenizer.decode(call.prompt))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return StubTurn(self._chunks(self.encode(answer)))

    @staticmethod
    async def _chunks(ids: Sequence[int]):
        for token in ids:
            yield TokenChunk([token])
        yield TokenChunk([END], finish_reason="stop")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
