"""A body that lists more than a model can use is refused before vLLM's request models see it."""

import asyncio
import json
from dataclasses import replace
from functools import partial

import httpx
import pytest
from pydantic import ValidationError
from virtual_time import clock, on_virtual_time

from prefillshare.kvshare.caller import ANONYMOUS, current_caller
from prefillshare.kvshare_vllm.surface.asked_fields import AskedFields
from prefillshare.kvshare_vllm.surface.request_shape import (
    BODY_S,
    MOST_ENTRIES,
    MOST_PARTS,
    MOST_TOGETHER,
    PIECE_S,
    RequestShape,
    stop_at_the_first_wrong_item,
    too_much,
)

MOST_NUMBERS, MOST_BODIES = 5000, 50
ASKED = {"role": "user", "content": "a"}


def problem(body) -> str | None:
    found = too_much(json.dumps(body).encode(), MOST_NUMBERS)
    return found and found.field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": [ASKED] * (MOST_ENTRIES + 1)}, "messages"),
        ({"input": [ASKED] * (MOST_ENTRIES + 1)}, "input"),
        ({"prompt": [[1]] * (MOST_ENTRIES + 1)}, "prompt"),
        ({"prompt": ["a"] * (MOST_ENTRIES + 1)}, "prompt"),
        ({"prompt": [1] * (MOST_NUMBERS + 1)}, "prompt"),
        ({"prompt": [[1], [1] * (MOST_NUMBERS + 1)]}, "prompt"),
        ({"tools": [{"type": "function"}] * (MOST_ENTRIES + 1)}, "tools"),
        ({"stop": ["a"] * (MOST_ENTRIES + 1)}, "stop"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}] * (MOST_PARTS + 1)}]}, "messages.content"),
        ({"a": [{"b": ["c"] * MOST_ENTRIES}] * (MOST_TOGETHER // MOST_ENTRIES)}, ""),
    ],
)
def test_lists_of_too_many_are_refused_with_their_field(body, field):
    assert problem(body) == field


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [ASKED] * MOST_ENTRIES},
        {"prompt": [1] * MOST_NUMBERS},
        {"prompt": [[1] * 100] * MOST_ENTRIES},
        {"messages": [{"role": "user", "content": "[{,}]" * 10_000}]},
        {"logit_bias": {str(n): 1 for n in range(MOST_NUMBERS)}},
        {"response_format": {"json_schema": {"schema": {"enum": ["a"] * MOST_ENTRIES}}}},
    ],
)
def test_what_a_model_can_use_is_taken(body):
    assert problem(body) is None


def test_what_is_no_json_is_left_to_the_app():
    assert too_much(b"{" * 5000, MOST_NUMBERS) is None
    assert too_much(b"[" * 500_000, MOST_NUMBERS) is None


def test_a_refused_body_does_not_reach_the_app_and_another_reaches_it_whole():
    seen = []

    async def app(scope, receive, send):
        message = await receive()
        assert message["more_body"] is False
        seen.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def post(content):
        transport = httpx.ASGITransport(RequestShape(app, MOST_NUMBERS, AskedFields(())))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            return await client.post("/v1/completions", content=content)

    async def pieces(body):
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    good, bad = (json.dumps({"prompt": ["a"] * count}).encode() for count in (MOST_ENTRIES, MOST_ENTRIES + 1))
    refused = asyncio.run(post(pieces(bad)))
    assert (refused.status_code, seen) == (400, [])
    assert refused.json()["error"]["param"] == "prompt"
    assert asyncio.run(post(pieces(good))).status_code == 200
    assert seen == [good]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (r'{"prompt": "a \ud83d"}', "prompt"),
        (r'{"messages": [{"content": "\uD83D\ude00"}, {"content": "\uDE00"}]}', "messages.1.content"),
        (r'{"metadata": {"\ud83d": "x"}}', "metadata"),
        (r'{"prompt": "\ud83d\ude00", "user": "\\ud83d"}', None),
    ],
)
def test_a_text_that_is_no_text_is_refused_by_its_field(body, field):
    assert asyncio.run(answer(body)).get("error", {}).get("param") == field


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        (b'{"\xed\xa0\xbd": 1}', True),
        (b'{"prompt": "\xed\xa0\xbd"}', True),
        ('{"prompt": "\\ud83d"}'.encode("utf-16"), True),
        ('{"prompt": "a"}'.encode("utf-16-le"), True),
        ('{"prompt": "\N{GRINNING FACE}"}'.encode(), False),
        (b"", False),
    ],
)
def test_a_body_that_is_not_in_utf8_is_refused_even_where_python_reads_it(body, refused):
    assert ("UTF-8" in asyncio.run(answer(body)).get("error", {}).get("message", "")) == refused


async def answer(body: str | bytes):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    transport = httpx.ASGITransport(RequestShape(app, MOST_NUMBERS, AskedFields(())))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        return (await client.post("/v1/completions", content=body)).json()


class Surface:
    """RequestShape around an app that answers, without a client between."""

    def __init__(self):
        self.shape = RequestShape(self._app, MOST_NUMBERS, AskedFields(()), MOST_BODIES)
        self.served = 0

    async def _app(self, scope, receive, send):
        await receive()
        self.served += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def status(self, tenant: str, more) -> int:
        """Of a body in two pieces. `more()`: awaited before the second."""
        pieces = iter((b"{", b"}"))

        async def receive():
            body = next(pieces)
            if body == b"}":
                await more()
            return {"type": "http.request", "body": body, "more_body": body == b"{"}

        token = current_caller.set(replace(ANONYMOUS, tenant=tenant))
        try:
            return await self.answered(receive)
        finally:
            current_caller.reset(token)

    async def answered(self, receive) -> int:
        statuses = []

        async def send(message):
            statuses.append(message.get("status"))

        await self.shape({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send)
        return statuses[0]


@on_virtual_time
async def test_a_body_that_does_not_come_is_waited_for_only_so_long():
    surface, began = Surface(), clock()
    assert await surface.status("one", asyncio.Event().wait) == 408
    assert (clock() - began, surface.served) == (PIECE_S, 0)
    assert await surface.status("one", partial(asyncio.sleep, PIECE_S - 1)) == 200


@on_virtual_time
async def test_a_body_that_comes_in_ever_more_pieces_is_waited_for_only_so_long():
    surface, began = Surface(), clock()

    async def drop():
        await asyncio.sleep(PIECE_S / 2)
        return {"type": "http.request", "body": b" ", "more_body": True}

    assert await surface.answered(drop) == 408
    assert (clock() - began, surface.served) == (BODY_S, 0)


@on_virtual_time
async def test_a_tenant_has_only_so_many_bodies_on_their_way_and_others_are_served():
    surface, goes_on = Surface(), asyncio.Event()
    held = [asyncio.create_task(surface.status("one", goes_on.wait)) for _ in range(MOST_BODIES)]
    await asyncio.sleep(1)
    assert await surface.status("one", goes_on.wait) == 429
    assert await surface.status("other", partial(asyncio.sleep, 0)) == 200
    goes_on.set()
    assert set(await asyncio.gather(*held)) == {200}
    assert await surface.status("one", goes_on.wait) == 200


def test_one_wrong_item_of_a_responses_request_is_enough():
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    def errors(count: int) -> int:
        with pytest.raises(ValidationError) as caught:
            ResponsesRequest.model_validate({"input": [{"bogus": 1}] * count})
        return caught.value.error_count()

    stop_at_the_first_wrong_item()
    stop_at_the_first_wrong_item()
    assert errors(50) == errors(1)
    assert len(ResponsesRequest.model_validate({"input": [ASKED] * 50}).input) == 50
