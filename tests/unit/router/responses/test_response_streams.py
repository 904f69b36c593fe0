"""The events of a streamed response are those that OpenAI's API documents, however it ends. No engine runs."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
import pytest_asyncio
from openai.types.responses import ResponseErrorEvent, ResponseFailedEvent, ResponseIncompleteEvent
from surface_clients import with_openai

from benchmarks.chats.surface import ChatSurface

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

CALLED = '<tool_call>\n{"name": "look", "arguments": {"at": "map"}}\n</tool_call>'
PATIENCE_S = 20
SAID = "Let me see.\n"
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
#: Event that begins something of an item -> the one that ends it.
ENDS = {
    "response.output_item.added": "response.output_item.done",
    "response.content_part.added": "response.content_part.done",
    "response.output_text.delta": "response.output_text.done",
    "response.function_call_arguments.delta": "response.function_call_arguments.done",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(smollm):
    async with with_openai(ChatSurface(str(smollm))) as surface:
        yield surface


@pytest.fixture
def surface(started):
    started.answers, started.fails_at, started.waits_at = ["Yes."], 0, 0
    return started


async def streamed(surface, client=None, **asked) -> list:
    """The events, checked against the order that every response keeps, up to where it breaks off."""
    responses = (client or surface.client).responses
    events = [event async for event in await responses.create(model="planner", stream=True, **asked)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    of_items = [event for event in events if hasattr(event, "output_index")]
    assert [event.output_index for event in of_items] == sorted(event.output_index for event in of_items)
    types = [(event.type, event.output_index) for event in of_items]
    for begins, ends in ENDS.items() if events[-1].type != "response.failed" else ():
        assert {index for kind, index in types if kind == begins} <= {index for kind, index in types if kind == ends}
    return events


def items(response) -> list[dict]:
    return [item.model_dump(exclude={"id", "call_id"}) for item in response.output]


def most(surface, text: str) -> dict:
    """Has an answer end after this text."""
    return {"input": "Look.", "tools": [TOOL], "max_output_tokens": len(surface.encode(text))}


@pytest.mark.parametrize(
    ("answer", "until", "statuses"),
    [
        ("Yes, it is.", "Yes,", ["incomplete"]),
        (CALLED, CALLED[:20], ["incomplete"]),  # within the name: it is text yet
        (CALLED, CALLED[:45], ["incomplete"]),  # before the arguments
        (CALLED, CALLED[:54], ["incomplete"]),  # within the arguments
        (CALLED, CALLED.removesuffix("</tool_call>"), ["completed"]),  # the call is whole
        (SAID + CALLED, SAID + CALLED[:54], ["completed", "incomplete"]),
        (SAID + CALLED + CALLED, SAID + CALLED + CALLED[:54], ["completed", "completed", "incomplete"]),
    ],
)
async def test_a_response_that_is_cut_off_is_incomplete_streamed_or_not_and_so_is_the_item(surface, answer, until, statuses):
    surface.answers = [answer]
    asked = most(surface, until)
    whole = await surface.client.responses.create(model="planner", **asked)
    events = await streamed(surface, **asked)
    assert isinstance(events[-1], ResponseIncompleteEvent)
    for response in (whole, events[-1].response):
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert "error" in response.model_fields_set
        assert [item.status for item in response.output] == statuses
    assert items(events[-1].response) == items(whole)
    ended = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.model_dump() for item in ended] == [item.model_dump() for item in events[-1].response.output]
    kept = await surface.client.responses.retrieve(events[-1].response.id)
    assert kept.model_dump() == events[-1].response.model_dump()


async def test_what_is_cut_off_is_gone_on_from(surface):
    surface.answers = [CALLED]
    first = await surface.client.responses.create(model="planner", **most(surface, CALLED[:54]))
    surface.answers = ["Yes."]
    await surface.client.responses.create(model="planner", input="Again.", previous_response_id=first.id)
    assert CALLED[:54].rstrip() in surface.prompts[-1]


async def test_a_response_that_came_to_its_end_is_completed_with_all_its_items(surface):
    for answer, kinds in ((SAID + CALLED + CALLED, ["message", "function_call", "function_call"]), ("", [])):
        surface.answers = [answer]
        events = await streamed(surface, input="Look.", tools=[TOOL])
        assert events[-1].type == "response.completed"
        assert [(item.type, item.status) for item in events[-1].response.output] == [(kind, "completed") for kind in kinds]


async def test_a_stream_that_breaks_off_ends_with_an_error_and_a_failed_response_and_keeps_nothing(surface):
    async def app(scope, receive, send):
        async def sent(message):
            await send(message)
            if b"output_text.delta" in message.get("body", b""):
                surface.go_on.set()

        await surface.app(scope, receive, sent)

    before = await surface.threads.count()
    surface.answers, surface.fails_at, surface.waits_at = ["One. Two. Three."], 4, 4
    async with asyncio.timeout(PATIENCE_S), httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
        events = await streamed(surface, surface.client.with_options(http_client=http), input="Count.")
    assert "response.output_text.delta" in [event.type for event in events]
    error, failed = events[-2:]
    assert isinstance(error, ResponseErrorEvent)
    assert isinstance(failed, ResponseFailedEvent)
    assert (error.code, error.message) == ("Service Unavailable", "the engine is gone")
    assert failed.response.id == events[0].response.id
    assert (failed.response.status, failed.response.error.code) == ("failed", "server_error")
    assert failed.response.model_extra["store"] is False
    assert await surface.threads.count() == before
    with pytest.raises(openai.NotFoundError):
        await surface.client.responses.retrieve(failed.response.id)


async def test_openais_own_helper_for_streams_takes_a_response_that_was_cut_off(surface):
    surface.answers = ["Yes, it is."]
    asked = most(surface, "Yes,") | {"tools": openai.omit}
    async with surface.client.responses.stream(model="planner", **asked) as stream:
        kinds = [event.type async for event in stream]
    assert kinds[-1] == "response.incomplete"
    assert kinds.count("response.output_item.done") == 1
