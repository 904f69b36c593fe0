"""Clients that hang up, through vLLM's whole app, over a turn runner that knows what runs. No engine runs; real clients,
proxies and engines are tested in tests/engine/smollm."""

from __future__ import annotations

import asyncio
import json

import pytest
import pytest_asyncio
from polling import until
from stub_turn import StubTurn

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare_vllm.surface import http_hang_ups

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ASK = [{"role": "user", "content": "hi"}]
KINDS = {
    "chat": ("/v1/chat/completions", {"messages": ASK}, 1),
    "chat, n = 3": ("/v1/chat/completions", {"messages": ASK, "n": 3}, 3),
    "completion": ("/v1/completions", {"prompt": "hi"}, 1),
    "completions of 2 prompts, n = 2": ("/v1/completions", {"prompt": ["hi", "ho"], "n": 2}, 4),
    "response": ("/v1/responses", {"input": "hi"}, 1),
    "message": ("/v1/messages", {"messages": ASK}, 1),
}


class Router:
    """A router without engines, whose turns do not end by themselves."""

    def __init__(self):
        #: Turns in progress; of these, those that wait for room, and those that have generated some tokens.
        self.running, self.waiting, self.generating = set(), set(), set()
        self.room = asyncio.Event()

    def run_turn(self, call) -> StubTurn:
        return StubTurn(self._chunks(call.request_id))

    async def _chunks(self, request_id: str):
        self.running.add(request_id)
        self.waiting.add(request_id)
        try:
            await self.room.wait()
            self.waiting.discard(request_id)
            for token in range(100, 8100):
                yield TokenChunk([token])
                if token == 104:
                    self.generating.add(request_id)
                await asyncio.sleep(0.005)  # as long as an engine's step
        finally:
            for those in (self.running, self.waiting, self.generating):
                those.discard(request_id)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def router(smollm):
    from prefillshare.kvshare_vllm.surface.openai_app import build_openai_app

    router = Router()
    base = Base(model=str(smollm), dtype="float32", max_model_len=8192)
    router.app, _ = await build_openai_app(base, ["planner"], router.run_turn, lambda *_: None)
    return router


def posted(app, path: str, body: dict, *, told: bool) -> asyncio.Task:
    """The request's task, as in Serve, which cancels it when the client hangs up. `told`: whether the cancellation comes just
    after the client's `http.disconnect`, or else before it."""
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    data = json.dumps({"model": "planner", limit: 8000, **body}).encode()
    messages = [{"type": "http.request", "body": data, "more_body": False}]
    hung_up = asyncio.Event()

    async def receive():
        if messages:
            return messages.pop()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
        "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    task = asyncio.create_task(app(scope, receive, send))
    task.hang_up = lambda: (hung_up.set() if told else None, task.cancel())
    return task


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("where", ["waiting", "generating"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_request_whose_client_hangs_up_leaves_no_turn_running(router, kind, stream, where, told):
    path, body, turns = KINDS[kind]
    if where == "generating":
        router.room.set()
    else:
        router.room.clear()
    task = posted(router.app, path, body | {"stream": stream}, told=told)

    async def under_way():
        assert not task.done(), task.result()
        return len(getattr(router, where)) == turns

    await until(under_way)
    task.hang_up()
    await asyncio.gather(task, return_exceptions=True)
    for _ in range(20):  # vLLM's handler has been cancelled, and needs some steps to end
        await asyncio.sleep(0)
    assert router.running == set()


@pytest.mark.parametrize("where", ["waiting", "generating"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_handler_that_is_left_behind_ends_its_turn(router, monkeypatch, kind, stream, where):
    """As on a loop so busy that the handler has begun, but does not listen yet, when its request is cancelled."""
    monkeypatch.setattr(http_hang_ups, "PATIENCE_S", 0)
    deaf = property(lambda self: False, lambda self, is_heard: None)
    monkeypatch.setattr(http_hang_ups._Client, "is_heard", deaf, raising=False)
    path, body, turns = KINDS[kind]
    router.room.set() if where == "generating" else router.room.clear()
    task = posted(router.app, path, body | {"stream": stream}, told=False)

    async def under_way():
        return len(getattr(router, where)) == turns

    async def ended():
        return not router.running

    await until(under_way)
    task.hang_up()
    await asyncio.gather(task, return_exceptions=True)
    await until(ended)
