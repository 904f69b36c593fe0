"""Client libraries as they are, each with tools over one session of two decoders. Answers are scripted: no engine runs.

The OpenAI Agents SDK is in test_agents_sdk.py; what instructor gets of a real decoder is in smollm/test_tools.py.
"""

from __future__ import annotations

import json

import anthropic
import httpx2
import instructor
import openai
import pytest
import pytest_asyncio
from anthropic import beta_async_tool
from pydantic import BaseModel
from surface_clients import openai_client

from benchmarks.chats.surface import ChatSurface

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

STATE = "x-prefillshare-session-state"
OPENING = "<|im_start|>assistant\n"
ASK = {"role": "user", "content": "How far is it from Oban?"}
AGAIN = {"role": "user", "content": "And in miles?"}


class Way(BaseModel):
    """A way to go."""

    port: str
    miles: int


def call(name: str, **arguments) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


DISTANCE = call("distance", port="Oban")
FOUND = "27 km to Oban."
WAY = {"port": "Oban", "miles": 17}


@beta_async_tool
async def distance(port: str) -> str:
    """The distance to a port."""
    return FOUND


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def surface(smollm):
    surface = ChatSurface(str(smollm), base={"chat_template": "smollm2_tools", "max_model_len": 2048})
    await surface.start()
    surface.http2 = httpx2.AsyncClient(transport=httpx2.ASGITransport(surface.app), base_url="http://router")
    yield surface
    await surface.http2.aclose()
    await surface.stop()


@pytest.fixture(autouse=True)
def _anew(surface):
    surface.prompts, surface.ids, surface.kept[:] = [], [], []


def of_anthropic(surface, session: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url="http://router",
        api_key="none",
        http_client=surface.http2,
        max_retries=0,
        default_headers={"x-prefillshare-session": session},
    )


def of_openai(surface, session: str) -> openai.AsyncOpenAI:
    return openai_client(surface.http2, default_headers={"x-prefillshare-session": session})


async def context(surface, session: str) -> list[int]:
    return list((await surface.sessions.get(session, tenant="")).token_ids)


def begins(token_ids: list[int], beginning: list[int]) -> bool:
    return token_ids[: len(beginning)] == beginning


async def test_anthropics_tool_runner_calls_a_function_and_another_decoder_goes_on(surface):
    client = of_anthropic(surface, "runner")
    surface.answers = [DISTANCE, "It is 27 km.", "17 miles."]
    runner = client.beta.messages.tool_runner(
        model="planner", max_tokens=50, messages=[ASK], tools=[distance], system="You plan."
    )
    called, answered = [message async for message in runner]
    assert (called.stop_reason, answered.stop_reason) == ("tool_use", "end_turn")
    assert answered.content[0].text == "It is 27 km."
    assert begins(surface.ids[1], surface.ids[0]), "the planner's own part stays where it was"
    shared = await context(surface, "runner")
    history = [
        ASK,
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": called.content[0].id, "content": FOUND}]},
        {"role": "assistant", "content": answered.content},
        AGAIN,
    ]
    asked = {"model": "coder", "max_tokens": 50, "messages": history, "tools": [distance.to_dict()], "system": "You convert."}
    async with client.messages.stream(**asked) as stream:
        assert "".join([text async for text in stream.text_stream]) == "17 miles."
        assert stream.response.headers[STATE] == "continued"
    assert begins(surface.ids[2], shared)
    last = surface.prompts[2]
    assert DISTANCE + "<|im_end|>" in last
    assert "You plan." not in last
    assert last.index(FOUND) < last.index("You convert.") < last.rindex(OPENING)


async def test_a_client_of_anthropics_threads_is_told_at_once_that_there_are_none(surface):
    client = of_anthropic(surface, "")
    thread = client.beta.messages.thread(model="planner", max_tokens=50, unsupported_request_behavior="raise")
    with pytest.raises(anthropic.BadRequestError, match="thread: it would have no effect") as refused:
        await thread.send(ASK)
    assert refused.value.body["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert surface.ids == []


@pytest.mark.parametrize("stream", [False, True])
async def test_openais_client_calls_a_tool_and_another_decoder_goes_on(surface, stream):
    client = of_openai(surface, f"openai {stream}")
    offered = [{"type": "function", "function": {"name": "distance", "parameters": distance.to_dict()["input_schema"]}}]
    surface.answers = [DISTANCE, "It is 27 km."]
    body = {"model": "planner", "max_tokens": 50, "tools": offered}
    if stream:
        async with client.chat.completions.stream(messages=[ASK], **body) as pieces:
            async for _ in pieces:
                pass
        called = pieces.current_completion_snapshot.choices[0].message
    else:
        called = (await client.chat.completions.create(messages=[ASK], **body)).choices[0].message
    (use,) = called.tool_calls
    assert (use.function.name, json.loads(use.function.arguments)) == ("distance", {"port": "Oban"})
    shared = await context(surface, f"openai {stream}")
    history = [
        {"role": "system", "content": "You convert."},
        ASK,
        called.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": use.id, "content": FOUND},
    ]
    raw = await client.chat.completions.with_raw_response.create(messages=history, **body | {"model": "coder"})
    assert (raw.headers[STATE], raw.parse().choices[0].message.content) == ("continued", "It is 27 km.")
    assert begins(surface.ids[1], shared)


async def test_instructor_gets_objects_over_either_api_on_one_session(surface):
    over_openai = instructor.from_openai(of_openai(surface, "instructor"), mode=instructor.Mode.TOOLS)
    over_anthropic = instructor.from_anthropic(of_anthropic(surface, "instructor"), mode=instructor.Mode.TOOLS)
    asked = {"response_model": Way, "max_tokens": 50}
    surface.answers = [call("Way", **WAY)]
    made, raw = await over_openai.chat.completions.create_with_completion(model="planner", messages=[ASK], **asked)
    assert made.model_dump() == WAY
    shared, (use,) = await context(surface, "instructor"), raw.choices[0].message.tool_calls
    history = [
        ASK,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": use.id, "name": use.function.name, "input": made.model_dump()}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": FOUND}]},
        AGAIN,
    ]
    made, raw = await over_anthropic.messages.create_with_completion(model="coder", messages=history, **asked)
    assert (made.model_dump(), raw.model) == (WAY, "coder")
    assert begins(surface.ids[1], shared)
