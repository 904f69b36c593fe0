"""Anthropic's client over the same contexts. No engine runs."""

from __future__ import annotations

import anthropic
import pytest
import pytest_asyncio
from surface_clients import with_anthropic

from benchmarks.chats.surface import ChatSurface

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

TOOL = {"name": "look", "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}}}
CALLED = '<tool_call>\n{"name": "look", "arguments": {"at": "map"}}\n</tool_call>'
SESSION = {"x-prefillshare-session": "messages"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def surface(smollm):
    async with with_anthropic(ChatSurface(str(smollm))) as surface:
        yield surface


async def ask(surface, messages, **more):
    return await surface.client.messages.create(model="planner", max_tokens=50, messages=messages, **more)


async def test_a_tool_is_called_and_answered_on_one_session(surface):
    surface.answers = [CALLED, "It is Paris."]
    history = [{"role": "user", "content": "Look."}]
    called = await ask(surface, history, tools=[TOOL], system="You plan.", extra_headers=SESSION)
    (use,) = called.content
    assert (called.stop_reason, use.type, use.name, use.input) == ("tool_use", "tool_use", "look", {"at": "map"})
    history.append({"role": "assistant", "content": [use.model_dump(exclude_none=True)]})
    history.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "Paris"}]})
    raw = await surface.client.messages.with_raw_response.create(
        model="coder", max_tokens=50, messages=history, tools=[TOOL], system="You code.", extra_headers=SESSION
    )
    assert raw.headers["x-prefillshare-session-state"] == "continued"
    assert (await raw.parse()).content[0].text == "It is Paris."
    assert CALLED + "<|im_end|>" in surface.prompts[-1]
    assert "You plan." not in surface.prompts[-1]


async def test_streamed_or_not_the_message_is_the_same(surface):
    for answer in ("Paris.", CALLED):
        surface.answers = [answer]
        whole = await ask(surface, [{"role": "user", "content": "Look."}], tools=[TOOL])
        async with surface.client.messages.stream(
            model="planner", max_tokens=50, messages=[{"role": "user", "content": "Look."}], tools=[TOOL]
        ) as stream:
            streamed = await stream.get_final_message()
        told = [[block.model_dump(exclude={"id"}) for block in message.content] for message in (whole, streamed)]
        assert told[0] == told[1]
        assert whole.stop_reason == streamed.stop_reason


@pytest.mark.parametrize(
    ("asked", "error", "kind"),
    [
        ({"model": "nobody"}, anthropic.NotFoundError, "not_found_error"),
        ({"messages": []}, anthropic.BadRequestError, "invalid_request_error"),
        ({"max_tokens": 5_000}, anthropic.BadRequestError, "invalid_request_error"),
    ],
)
async def test_errors_are_of_the_types_that_its_clients_expect(surface, asked, error, kind):
    usual = {"model": "planner", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(error) as refused:
        await surface.client.messages.create(**(usual | asked))
    assert refused.value.body["type"] == "error"
    assert refused.value.body["error"]["type"] == kind
