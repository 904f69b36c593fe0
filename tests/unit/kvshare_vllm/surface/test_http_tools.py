"""Tools over vLLM's app, with turns that say what a test tells them: a call is read alike in every way. No engine runs."""

from __future__ import annotations

import json

import pytest
import pytest_asyncio
from stub_turn import StubTurn
from surface_clients import openai_client, started

from benchmarks.chats.surface import END, ChatSurface
from prefillshare.kvshare.config import Base
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.router.sessions.chat import ChatLayout

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ASK = [{"role": "user", "content": "Weather in Bern?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}


def tool(name: str, parameters: dict | None = None, **more) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters or SCHEMA, **more}}


WEATHER, NOW = tool("weather"), tool("now", {"type": "object", "properties": {}})
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>'
ODD = '<tool_call>{"name":"now","arguments":{ "x":1.50,"y":"\\u00e9" }}</tool_call>'
ARGUMENTS = '{"city": "Bern", "days": 2}'


class ToolSurface(ChatSurface):
    """`says`: text of the next responses, `reason`: how they end, `at_once`: tokens per chunk. `formats`: of the turns."""

    def __init__(self, model: str, **base):
        super().__init__(model)
        self.base = Base(model=model, dtype="float32", max_model_len=1024, tool_call_parser="hermes",
                         chat_template="smollm2_tools", **base)  # fmt: skip
        self.says, self.reason, self.at_once, self.formats = "", "stop", 1, []

    async def start(self) -> None:
        await super().start()
        self.client = openai_client(self.http)

    def _turn(self, call) -> StubTurn:
        self.prompts.append(self.tokenizer.decode(call.prompt))
        self.formats.append(call.sampling.structured_outputs)
        return StubTurn(self._pieces())

    async def _pieces(self):
        ids = [*self.encode(self.says), *([END] if self.reason == "stop" else [])]
        for first in range(0, len(ids), self.at_once):
            reason = self.reason if first + self.at_once >= len(ids) else None
            yield TokenChunk(ids[first : first + self.at_once], finish_reason=reason)

    async def ask(self, says: str, reason: str = "stop", *, at_once: int = 1, **body) -> tuple:
        """(finish reason, content, [(id's beginning, type, name, arguments)]) of the answer, streamed or not."""
        self.says, self.reason, self.at_once, self.formats, self.prompts = says, reason, at_once, [], []
        body = {"model": "planner", "messages": ASK, "tools": [WEATHER, NOW]} | body
        if body.get("stream"):
            async with self.client.chat.completions.stream(**{k: v for k, v in body.items() if k != "stream"}) as stream:
                answer = await final(stream)
        else:
            answer = await self.client.chat.completions.create(**body)
        (choice,) = answer.choices
        calls = [(c.id[:14], c.type, c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]
        return choice.finish_reason, choice.message.content or "", calls


async def final(stream):
    """The client raises for answers that were cut off, which it has put together all the same."""
    async for _ in stream:
        pass
    return stream.current_completion_snapshot


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def surface(smollm):
    async with started(ToolSurface(str(smollm))) as surface:
        yield surface


def called(name: str, arguments: str) -> tuple:
    return "chatcmpl-tool-", "function", name, arguments


ANSWERS = [
    ("It rains.", "stop", ("stop", "It rains.", [])),
    ("a <", "stop", ("stop", "a <", [])),
    (CALL, "stop", ("tool_calls", "", [called("weather", ARGUMENTS)])),
    (f"I look.\n{CALL}", "stop", ("tool_calls", "I look.\n", [called("weather", ARGUMENTS)])),
    (f"\n{CALL}\n{ODD} So.", "stop",
     ("tool_calls", "", [called("weather", ARGUMENTS), called("now", '{ "x":1.50,"y":"\\u00e9" }')])),
    (CALL, "length", ("length", "", [called("weather", ARGUMENTS)])),
    (CALL[:60], "length", ("length", "", [called("weather", '{"city": "Bern"')])),
    (CALL[:35], "length", ("length", "", [called("weather", "")])),
    (CALL[:20], "length", ("length", CALL[:20], [])),
    (f"{CALL}\n{ODD[:39]}", "length", ("length", "", [called("weather", ARGUMENTS), called("now", "{ ")])),
    ("<tool_call>no</tool_call>", "stop", ("stop", "<tool_call>no</tool_call>", [])),
]  # fmt: skip


@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
@pytest.mark.parametrize(("says", "reason", "expected"), ANSWERS)
async def test_an_answer_is_the_same_streamed_or_not_and_however_its_tokens_come(surface, choice, says, reason, expected):
    reason_, content, calls = expected
    if choice is NAMED and reason_ == "tool_calls":
        reason_ = "stop"  # as OpenAI has it
    for how in ({}, {"stream": True}, {"stream": True, "at_once": 7}, {"stream": True, "at_once": 1000}):
        assert await surface.ask(says, reason, tool_choice=choice, **how) == (reason_, content, calls), how


async def test_without_a_choice_of_tools_calls_are_text(surface):
    for how in ({}, {"stream": True}):
        assert await surface.ask(CALL, tool_choice="none", **how) == ("stop", CALL, [])


async def test_several_choices_are_read_apart(surface):
    surface.says, surface.reason = f"{CALL}\n{ODD}", "stop"
    answer = await surface.client.chat.completions.create(model="planner", messages=ASK, tools=[WEATHER], n=2)
    assert [[call.function.name for call in choice.message.tool_calls] for choice in answer.choices] == [["weather", "now"]] * 2
    assert len({call.id for choice in answer.choices for call in choice.message.tool_calls}) == 4


async def test_one_call_only_if_the_client_does_not_take_parallel_ones(surface):
    for how in ({}, {"stream": True}):
        _, _, calls = await surface.ask(f"{CALL}\n{CALL}", parallel_tool_calls=False, **how)
        assert calls == [called("weather", ARGUMENTS)]
        assert tags(surface)["stop_after_first"] is True


async def test_messages_of_anthropics_give_a_cut_off_call_with_what_is_whole_of_it(surface):
    surface.says, surface.reason = CALL[:62], "length"
    body = {"model": "planner", "messages": ASK, "max_tokens": 40, "tools": [{"name": "weather", "input_schema": SCHEMA}]}
    answer = (await surface.http.post("/v1/messages", json=body)).json()
    (block,) = answer["content"]
    assert (answer["stop_reason"], block["type"], block["input"]) == ("max_tokens", "tool_use", {"city": "Bern"})
    streamed = (await surface.http.post("/v1/messages", json=body | {"stream": True})).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    pieces = [e["delta"]["partial_json"] for e in events if e.get("delta", {}).get("type") == "input_json_delta"]
    assert "".join(pieces) == '{"city": "Bern", '
    assert [e["delta"]["stop_reason"] for e in events if e["type"] == "message_delta"] == ["max_tokens"]


# The template


async def test_tools_are_in_the_prompt_where_requests_have_them_and_nothing_changes_where_they_have_none(surface):
    counts = {}
    for name, more in (("without", {}), ("with", {"tools": [WEATHER]})):
        body = {"model": "planner", "messages": ASK, **more}
        counts[name] = (await surface.http.post("/tokenize", json=body)).json()["count"]
    own = len(ChatLayout(surface.tokenizer).opening(ASK))
    assert counts["without"] == own
    assert counts["with"] > own + 40
    await surface.ask("It rains.")
    assert '<tools>\n{"name": "weather", "parameters": ' in surface.prompts[-1]


async def test_sessions_and_http_lay_conversations_out_alike(surface):
    function = {"name": "weather", "arguments": ARGUMENTS}
    calls = [{"id": "chatcmpl-tool-1", "type": "function", "function": function}]
    answer, result = {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "rain"}
    await surface.ask("It rains.", messages=[*ASK, answer, result | {"tool_call_id": "chatcmpl-tool-1"}], tools=[WEATHER])
    layout = ChatLayout(surface.tokenizer, [WEATHER])
    context = layout.opening(ASK) + layout.ids(CALL)
    assert surface.prompts[-1] == surface.tokenizer.decode(context + layout.appended(context, True, [result]))


# What calls are held to


def tags(surface) -> dict:
    return json.loads(surface.formats[-1].structural_tag)["format"]


def schemas(surface) -> list:
    return [tag["content"]["json_schema"] for tag in tags(surface)["tags"]]


async def test_forced_calls_obey_their_schemas_unless_a_tool_says_that_it_is_not_strict(surface):
    for choice in ("required", NAMED):
        await surface.ask(CALL, tool_choice=choice, tools=[WEATHER])
        assert schemas(surface) == [SCHEMA] * 2  # with and without a line break behind the tag
        await surface.ask(CALL, tool_choice=choice, tools=[tool("weather", strict=False)])
        assert schemas(surface) == [True] * 2
    await surface.ask(CALL, tools=[WEATHER])
    assert surface.formats == [None]
    await surface.ask(CALL, tools=[tool("weather", strict=True)])
    assert (schemas(surface), tags(surface)["type"]) == ([SCHEMA] * 2, "triggered_tags")


async def test_a_format_of_the_text_asks_for_nothing_where_a_call_is_forced(surface):
    """As OpenAI has it; agent frameworks send the format of their last answer with every call."""
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": {"type": "object"}}}
    for choice in ("required", NAMED):
        plain = await surface.ask(CALL, tool_choice=choice)
        asked = surface.formats
        assert await surface.ask(CALL, tool_choice=choice, response_format=form) == plain
        assert surface.formats == asked


async def test_forced_calls_stand_in_lines_of_their_own(surface):
    await surface.ask(CALL, tool_choice="required")
    assert tags(surface)["separator"] == "\n"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"type": "dict"}, 'Unsupported type "dict"'),
        ({"type": "object", "properties": {"a": {"type": "number", "multipleOf": 0.1}}}, "multipleOf is not supported"),
    ],
)
async def test_a_schema_that_a_forced_call_cannot_be_held_to_is_refused_by_name(surface, parameters, why, stream):
    body = {"model": "planner", "messages": ASK, "tools": [tool("f", parameters)], "stream": stream}
    refused = await surface.http.post("/v1/chat/completions", json=body | {"tool_choice": "required"})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "tools")
    assert why in error["message"]
    assert '"strict": false' in error["message"]
    body["tools"] = [tool("f", parameters, strict=False)]
    surface.says = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert (await surface.http.post("/v1/chat/completions", json=body | {"tool_choice": "required"})).status_code == 200


@pytest.mark.parametrize(
    ("level", "forced", "auto"),
    [("auto", [True] * 2, None), ("function", [True] * 2, [True] * 2), ("parameter", [SCHEMA] * 2, [SCHEMA] * 2)],
)
async def test_other_levels_are_vllms(smollm, level, forced, auto):
    surface = ToolSurface(str(smollm), tool_strict_level=level)
    await surface.start()
    try:
        await surface.ask(CALL, tools=[WEATHER], tool_choice="required")
        assert schemas(surface) == forced
        await surface.ask(CALL, tools=[WEATHER])
        assert (schemas(surface) if surface.formats[-1] else None) == auto
    finally:
        await surface.stop()
