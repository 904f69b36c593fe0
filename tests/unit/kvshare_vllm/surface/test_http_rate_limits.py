"""Answers and refusals over HTTP say how the tenant stands, streams too, and OpenAI's client finds its hint there."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from prefillshare.kvshare import rate_limits
from prefillshare.kvshare.errors import Overloaded
from prefillshare.kvshare.rate_limits import REQUESTS, TOKENS, Allowance
from prefillshare.kvshare_vllm.surface.http_rate_limits import RateLimitHeaders
from prefillshare.kvshare_vllm.surface.http_refusals import HttpRefusals, note_begun, note_failure

STANDING = (Allowance(REQUESTS, 60, 0, 12.0), Allowance(TOKENS, 600, 150, 45.0))
OPENAI, ANTHROPIC = "/v1/chat/completions", "/v1/messages"
LEFT = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-remaining-tokens": "150", "x-ratelimit-reset-tokens": "45s"}


def app(*, standing=STANDING, refused=False, stream=False):
    """As vLLM's app behaves: it begins a stream before the turn is admitted, or refused."""

    async def turn():
        rate_limits.note(standing)
        if refused:
            note_failure(Overloaded("not left", field="tenants.acme.turns_per_minute", retry_after_s=11.2))
        else:
            note_begun()

    async def events():
        yield "data: {}\n\n"
        await asyncio.create_task(turn())
        yield "data: {}\n\n"

    async def answer(request):
        if stream:
            return StreamingResponse(events(), media_type="text/event-stream")
        await asyncio.create_task(turn())
        return JSONResponse({"error": {"message": "x", "code": 429}} if refused else {}, 429 if refused else 200)

    routes = [Route(path, answer, methods=["POST"]) for path in (OPENAI, ANTHROPIC)]
    return RateLimitHeaders(HttpRefusals(Starlette(routes=routes)))


async def ask(path=OPENAI, **how) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app(**how)), base_url="http://here") as http:
        return await http.post(path)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refused", [False, True])
async def test_answers_and_refusals_say_what_is_left(stream, refused):
    answer = await ask(stream=stream, refused=refused)
    assert answer.status_code == (429 if refused else 200)
    assert LEFT.items() <= dict(answer.headers).items()
    assert answer.headers.get("retry-after") == ("12" if refused else None)
    assert not any(name.startswith("anthropic") for name in answer.headers)


async def test_anthropics_clients_find_their_own_headers_too():
    answer = await ask(ANTHROPIC)
    assert answer.headers["anthropic-ratelimit-tokens-remaining"] == "150"
    assert LEFT.items() <= dict(answer.headers).items()


async def test_without_limits_nothing_is_said():
    answer = await ask(standing=())
    assert not any("ratelimit" in name for name in answer.headers)


async def test_openais_client_raises_its_own_error_with_the_headers_and_waits_as_long_as_it_is_told(monkeypatch):
    openai = pytest.importorskip("openai")
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app(refused=True)), base_url="http://here")
    client = openai.AsyncOpenAI(api_key="k", base_url="http://here/v1", max_retries=1, http_client=http)
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr("anyio.sleep", sleep)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model="m", messages=[])
    assert pauses == [12.0]
    assert LEFT.items() <= dict(caught.value.response.headers).items()
    assert "tenants.acme.turns_per_minute: not left" in str(caught.value)
