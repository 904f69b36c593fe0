"""A refused stream is a refusal, not a 200 with an error in it."""

import asyncio
import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from kvshare_vllm.http_refusals import HttpRefusals, note_retry_after

ERROR = {"error": {"message": "no room", "type": "Overloaded", "code": 429}}


def stream(*events: str):
    async def answer(request):
        async def body():
            if "error" in events[0]:
                await asyncio.create_task(refuse())
            for event in events:
                yield f"data: {event}\n\n"

        return StreamingResponse(body(), media_type="text/event-stream")

    return answer


async def refuse():
    note_retry_after(6.2)


async def refused(request):
    note_retry_after(2)
    return JSONResponse(ERROR, 429)


@pytest.fixture
async def client():
    app = Starlette(routes=[
        Route("/refused-stream", stream(json.dumps(ERROR), "[DONE]")),
        Route("/stream", stream('{"a": 1}', json.dumps(ERROR), "[DONE]")),
        Route("/refused", refused),
    ])  # fmt: skip
    async with httpx.AsyncClient(transport=httpx.ASGITransport(HttpRefusals(app)), base_url="http://here") as client:
        yield client


async def test_a_stream_that_is_refused_has_the_refusals_status_body_and_hint(client):
    answer = await client.get("/refused-stream")
    assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (429, ERROR, "7")
    assert answer.headers["content-type"] == "application/json"


async def test_a_stream_that_fails_later_keeps_its_status_and_tells_in_an_event(client):
    answer = await client.get("/stream")
    assert answer.status_code == 200
    assert "retry-after" not in answer.headers
    assert answer.text == f'data: {{"a": 1}}\n\ndata: {json.dumps(ERROR)}\n\ndata: [DONE]\n\n'


async def test_a_refusal_that_is_no_stream_gets_the_hint(client):
    answer = await client.get("/refused")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
