"""The HTTP surface over turns that answer what they are told: what would reach engines can be looked at. No engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import httpx

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare.usage import TurnUsage
from prefillshare.router.ahead.response_kv import ResponseKV, ResponseOfTurn
from prefillshare.router.kept.keeper import Keeper
from prefillshare.router.responses.threads import Threads
from prefillshare.router.sessions import MemorySessions, SessionStore

DECODERS = ("planner", "coder")
END = 2


class _Turn:
    def __init__(self, chunks: AsyncIterator[TokenChunk]):
        self._chunks, self.usage = chunks, TurnUsage()
        self.lent = self.salt = None

    def chunks(self) -> AsyncIterator[TokenChunk]:
        return self._chunks

    def text_has_ended(self) -> None: ...


class _Noted(ResponseKV):
    """Makes no KV ahead. `contexts`: those that turns have ended with, as its base KV would be made."""

    def __init__(self, keeper: Keeper | None):
        super().__init__(keeper=keeper)
        self.contexts: list[list[int]] = []

    @contextmanager
    def of_turn(self, *given, **how) -> Iterator[ResponseOfTurn]:
        with super().of_turn(*given, **how) as response:
            yield response
        self.contexts.append(response.context)


class ChatSurface:
    """`answers`: the texts of the next responses, the last of them again and again. `prompts`, `ids`: those of all turns, as
    text and as token ids. `kept`: what the base's KV would be made of ahead. `base`: further settings of the base. `config`:
    further arguments of HttpCalls."""

    #: How many tokens of each prompt are found cached, and who keeps contexts.
    cached_tokens = 0
    keeper: Keeper | None = None
    #: Number of the token in place of which a turn fails; 0: none.
    fails_at = 0
    #: Number of the token before which turns wait for `go_on`; 0: none. `waiting` is set when one waits.
    waits_at = 0

    def __init__(self, model: str, threads: SessionStore | None = None, base: dict | None = None, **config):
        usual = {"dtype": "float32", "max_model_len": 1024, "tool_call_parser": "hermes"}
        self.base = Base(model=model, **(usual | (base or {})))
        self.config, self.sessions = config, MemorySessions(100, 100)
        self.threads = threads or MemorySessions(40, 100, {"": 20, "me": 20}, evicts=True)
        self.answers: list[str] = ["Yes."]
        self.prompts: list[str] = []
        self.ids: list[list[int]] = []
        self.waiting, self.go_on = asyncio.Event(), asyncio.Event()

    async def start(self) -> None:
        from prefillshare.kvshare_vllm.surface.openai_app import build_openai_app
        from prefillshare.router.sessions.http_calls import HttpCalls
        from prefillshare.router.surfaces.http_sessions import HttpSessions, serve_chats

        self.app, self.frontend = await build_openai_app(
            self.base, DECODERS, self._turn, lambda *_: None, middleware=[HttpSessions]
        )
        names, noted = (*DECODERS, self.base.name), _Noted(self.keeper)
        self.decoders = {name: Decoder(name, "agents", "prefillshare", name, "lora") for name in names}
        calls = HttpCalls(self.base, self.decoders, self.frontend, self.sessions, noted, **self.config)
        self.kept = noted.contexts
        serve_chats(self.app, calls, Threads(self.threads))
        self.tokenizer = self.frontend.renderer.tokenizer
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://router")

    async def stop(self) -> None:
        await self.http.aclose()
        self.frontend.shutdown()

    def _turn(self, call) -> _Turn:
        self.ids.append(call.prompt)
        self.prompts.append(self.tokenizer.decode(call.prompt))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        turn = _Turn(self._chunks(self.encode(answer), call.sampling.max_tokens))
        turn.usage.cached_tokens = self.cached_tokens
        return turn

    async def _chunks(self, ids: Sequence[int], most: int) -> AsyncIterator[TokenChunk]:
        for number, token in enumerate([*ids, END][:most], 1):
            if number == self.waits_at:
                self.waiting.set()
                await self.go_on.wait()
            if number == self.fails_at:
                raise Unavailable("the engine is gone")
            reason = "stop" if token == END else "length" if number == most else None
            yield TokenChunk([token], finish_reason=reason)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
