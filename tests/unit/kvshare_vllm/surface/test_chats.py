"""Tools need a parser; a response's calls are put together from the pieces that vLLM's parser tells."""

from types import SimpleNamespace

import pytest
from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaMessage, DeltaToolCall

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.chat_request import chat_request
from prefillshare.kvshare_vllm.surface.chats import Answer, Chats, ToolCallDelta

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def service(parser_cls=None):
    return SimpleNamespace(parser_cls=parser_cls, online_renderer=SimpleNamespace(parser=parser_cls))


@pytest.mark.parametrize("parser_cls", [None, SimpleNamespace(tool_parser_cls=None)])
def test_without_a_parser_tools_are_refused_unless_no_call_is_wanted(parser_cls):
    for choice in ("auto", "required", {"type": "function", "function": {"name": "look"}}):
        with pytest.raises(InvalidInput, match=r"tools: tools need base\.tool_call_parser"):
            Chats(service(parser_cls)).asked_tools({"tools": TOOLS, "tool_choice": choice, "temperature": 0.0}, 5)
    asked = Chats(service()).asked_tools({"tools": TOOLS, "tool_choice": "none", "temperature": 0.0}, 5)
    assert asked.definitions[0]["function"]["name"] == "look"
    assert (asked.sampling.max_tokens, asked.sampling.structured_outputs) == (5, None)
    answer = asked.answer()
    assert answer.read(piece("hi"), [1]) == ("hi", [])


def piece(text, reason=None):
    return SimpleNamespace(text=text, token_ids=[1], finish_reason=reason)


def delta(content=None, *calls) -> DeltaMessage:
    told = [
        DeltaToolCall(index=index, id=given, type="function", function=DeltaFunctionCall(name=name, arguments=arguments))
        for index, given, name, arguments in calls
    ]
    return DeltaMessage(content=content, tool_calls=told)


class Parser:
    def __init__(self, *told):
        self._told = list(told)

    def parse_delta(self, text, token_ids, request, prompt_token_ids, *, finished):
        return self._told.pop(0)


def test_calls_are_put_together_and_a_call_without_an_id_gets_one():
    parser = Parser(delta("Hm."), None, delta(None, (0, "a", "look", None)), delta(None, (0, None, None, '{"at"')),
                    delta("!", (0, None, None, ": 1}"), (1, None, "jump", "{}")))  # fmt: skip
    answer = Answer(parser, chat_request({"tools": TOOLS, "tool_choice": "auto"}))
    told = [answer.read(piece("x"), [1]) for _ in range(5)]
    assert [text for text, _ in told] == ["Hm.", "", "", "", "!"]
    assert [calls for _, calls in told[:4]] == [[], [], [ToolCallDelta(0, "a", "look")], [ToolCallDelta(0, arguments='{"at"')]]
    first, second = answer.calls.values()
    assert (first.id, first.name, first.arguments, second.name) == ("a", "look", '{"at": 1}', "jump")
    assert second.id == told[4][1][1].id != ""
    message = answer.message
    assert (message["content"], [call["id"] for call in message["tool_calls"]]) == ("Hm.!", ["a", second.id])
    assert [answer.finish_reason(reason) for reason in ("stop", "length")] == ["tool_calls", "length"]


def test_one_call_is_told_where_one_is_asked_for():
    parser = Parser(delta(None, (0, "a", "look", "{}"), (1, "b", "jump", "{}")))
    answer = Answer(parser, chat_request({"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": False}))
    assert answer.read(piece("x"), [1]) == ("", [ToolCallDelta(0, "a", "look", "{}")])


def test_without_tools_all_of_it_is_text():
    answer = Answer()
    assert answer.read(piece("<tool_call>"), [1]) == ("<tool_call>", [])
    assert (answer.message, answer.finish_reason("stop")) == ({"role": "assistant", "content": "<tool_call>"}, "stop")
