"""The page at /ui over a system of doubles, on a port of this machine, with what its playground uses of chat completions."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from types import SimpleNamespace

import uvicorn
from char_tokenizer import Tokenizer
from ports import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from double.system import System, deployment
from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.config import Router
from prefillshare.kvshare_vllm.surface.turn_call import TurnCall
from prefillshare.router.surfaces.http_auth import ApiKeys
from prefillshare.router.tenants import Tenants
from prefillshare.router.turn.terms import Terms
from prefillshare.router.ui.feed import Feed
from prefillshare.router.ui.page import page_routes

REFUSED = "no room here"


def app_of(running: System, tenants: Tenants | None = None, **router):
    """The page's routes and `/v1/chat/completions`, behind the check of keys. A message that says REFUSED is refused."""
    wanted = deployment(1)
    wanted.router = Router(**router)
    core = SimpleNamespace(orchestrator=running.orchestrator, fleet=running.fleet, decoders=running.orchestrator.decoders)
    chat = Chat(running)
    routes = [*page_routes(Feed(core, wanted), wanted.router), Route("/v1/chat/completions", chat, methods=["POST"])]
    app = ApiKeys(Starlette(routes=routes), tenants or Tenants())
    app.chat = chat
    return app


class Chat:
    """Answers are letters; a prompt is what the tokenizer of characters makes of the messages."""

    def __init__(self, running: System):
        self._running, self._numbers, self._tokenizer = running, itertools.count(1), Tokenizer()
        #: The headers and bodies that have come.
        self.asked: list[tuple[Mapping[str, str], dict]] = []

    async def __call__(self, scope, receive, send) -> None:
        request = Request(scope, receive)
        response = await self._answer(request, await request.json())
        await response(scope, receive, send)

    async def _answer(self, request: Request, body: dict) -> Response:
        self.asked.append((request.headers, body))
        if body["messages"][-1]["content"] == REFUSED:
            return JSONResponse({"error": {"message": REFUSED, "type": "x", "param": None, "code": 429}}, 429)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict) -> AsyncIterator[str]:
        text = self._tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        prompt, name = self._tokenizer.encode(text, add_special_tokens=False), f"chatcmpl-{next(self._numbers)}"
        sampling = SimpleNamespace(max_tokens=body["max_tokens"], logprobs=None, structured_outputs=None)
        call = TurnCall(body["model"], prompt, sampling, f"{name}-0", current_caller.get(), terms=Terms())
        turn = self._running.orchestrator.turn(call)
        async with aclosing(turn.chunks()) as chunks:
            async for chunk in chunks:
                said = "".join(chr(ord("a") + token % 26) for token in chunk.token_ids)
                yield _event(id=name, choices=[{"delta": {"content": said}}])
        usage = {"prompt_tokens": len(prompt), "completion_tokens": turn.usage.completion_tokens}
        yield _event(id=name, choices=[], usage=usage | {"prompt_tokens_details": {"cached_tokens": turn.usage.cached_tokens}})
        yield "data: [DONE]\n\n"


def _event(**fields) -> str:
    return f"data: {json.dumps(fields)}\n\n"


@asynccontextmanager
async def served(app) -> AsyncIterator[str]:
    """The address at which the app is served."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off"))
    listening, startup = asyncio.Event(), server.startup

    async def started(sockets=None):
        await startup(sockets)
        listening.set()

    server.startup, server.install_signal_handlers = started, lambda: None
    server.capture_signals = suppress
    task = asyncio.create_task(server.serve())
    try:
        await listening.wait()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        await task
