"""vLLM's parsers, as its server uses them: what a stream's pieces tell is what the whole answer gives, whatever the parser."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager

from prefillshare.kvshare_vllm.patches import same_tool_answers, tool_constraints

pytestmark = pytest.mark.slow

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
    for name in ("f", "g")
]
TOKENIZER = SimpleNamespace(get_vocab=lambda: {"<|python_tag|>": 1}, decode=lambda ids: "")
F, G = {"a": 1}, {"a": "x}", "b": [1.50, {}]}
HERMES = "<tool_call>\n" + json.dumps({"name": "f", "arguments": F}) + "\n</tool_call>"
HERMES += '\n<tool_call>{"name":"g","arguments":{"a":"x}", "b":[1.50,{}]}}</tool_call>'
LLAMA = json.dumps({"name": "f", "parameters": F}) + '; {"name":"g","parameters":{"a":"x}", "b":[1.50,{}]}}'
#: A parser without a format of its own for forced calls: they come as one JSON array.
ARRAY = '[{"name": "f", "parameters": {"a": 1}}, {"name":"g","parameters":{"a":"x}", "b":[1.50,{}]}}]'
WRITTEN = {
    ("hermes", "auto"): HERMES,
    ("hermes", "required"): HERMES,
    ("longcat", "auto"): HERMES.replace("tool_call>", "longcat_tool_call>"),
    ("llama3_json", "auto"): LLAMA,
    ("llama3_json", "required"): f"<|python_tag|>{LLAMA}",
    ("llama4_json", "auto"): LLAMA,
    ("xlam", "required"): ARRAY,
}


@pytest.fixture(scope="module", autouse=True)
def _patched():
    same_tool_answers.install()
    tool_constraints.install()


def parser_of(name: str):
    made = ParserManager.get_parser(tool_parser_name=name, enable_auto_tools=True)
    return made(TOKENIZER, None)


def request_of(choice: str) -> ChatCompletionRequest:
    return ChatCompletionRequest(messages=[{"role": "user", "content": "?"}], tools=TOOLS, tool_choice=choice)


def whole(name: str, choice: str, text: str):
    _, content, calls = parser_of(name).parse(text, request_of(choice), enable_auto_tools=True)
    return content or "", [(call.name, call.arguments) for call in calls or ()]


def streamed(name: str, choice: str, text: str, size: int):
    parser, request, content, calls = parser_of(name), request_of(choice), "", {}
    pieces = [text[at : at + size] for at in range(0, len(text), size)] or [""]
    for number, piece in enumerate([*pieces, ""]):
        ended = number == len(pieces)
        delta = parser.parse_delta(piece, [0] * bool(piece), request, prompt_token_ids=[0], finished=ended)
        content += (delta.content or "") if delta else ""
        for call in (delta.tool_calls or ()) if delta else ():
            assert (call.id is not None) == (call.index not in calls)
            known = calls.setdefault(call.index, ["", ""])
            known[0] += call.function.name or ""
            known[1] += call.function.arguments or ""
    return content, [tuple(call) for _, call in sorted(calls.items())]


@pytest.mark.parametrize(("name", "choice"), WRITTEN)
def test_pieces_of_any_size_and_of_an_answer_cut_off_anywhere_give_the_whole(name, choice):
    text = WRITTEN[name, choice]
    content, calls = whole(name, choice, text)
    assert (content, [call for call, _ in calls]) == ("", ["f", "g"])
    assert [json.loads(arguments) for _, arguments in calls] == [F, G]
    assert calls[1][1] == '{"a":"x}", "b":[1.50,{}]}'
    for end in (*range(0, len(text), 3), len(text)):
        expected = whole(name, choice, text[:end])
        for size in (1, 4, 1000):
            assert streamed(name, choice, text[:end], size) == expected, (text[:end], size)


ENGINES = {
    "qwen3_coder": "I look.\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "glm45": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">1</parameter>\n</invoke>\n</minimax:tool_call>',
}


@pytest.mark.parametrize("name", ENGINES)
def test_parsers_with_an_engine_of_vllms_read_whole_answers_as_streams(name):
    text = ENGINES[name]
    _, calls = whole(name, "auto", text)
    assert [(called, json.loads(arguments)) for called, arguments in calls] == [("f", {"a": 1})]
    for end in (*range(1, len(text), 3), len(text)):
        for size in (1, 1000):
            assert streamed(name, "auto", text[:end], size) == whole(name, "auto", text[:end]), (text[:end], size)


@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
def test_where_no_tool_may_be_called_the_answer_is_text(name):
    text = WRITTEN[name, "auto"]
    assert whole(name, "none", text) == streamed(name, "none", text, 5) == (text, [])


def test_patches_are_made_once():
    made = [same_tool_answers.DelegatingParser._extract_tool_calls, tool_constraints.DelegatingParser.adjust_request]
    same_tool_answers.install()
    tool_constraints.install()
    assert made == [
        same_tool_answers.DelegatingParser._extract_tool_calls, tool_constraints.DelegatingParser.adjust_request
    ]  # fmt: skip
