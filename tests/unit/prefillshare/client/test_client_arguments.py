"""What callers write, flat or as OpenAI has it, becomes messages of the contract; what cannot be meant is refused by name."""

import json

import pytest
from pydantic import BaseModel

from prefillshare.client import calls
from prefillshare.client.arguments import Sampling, generate_request, turn_input
from prefillshare.client.building import built
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
FUNCTION = {"name": "look", "description": "Looks.", "parameters": SCHEMA, "strict": True}


def asked(**given) -> pb.GenerateRequest:
    return generate_request("s", "planner", given)


def refused(**given) -> str:
    with pytest.raises(InvalidInput) as raised:
        asked(**given)
    assert raised.value.fix
    return f"{raised.value.field}: {raised.value.fix}"


def test_every_sampling_field_of_the_contract_can_be_given():
    assert set(Sampling.__annotations__) == set(pb.SamplingParams.DESCRIPTOR.fields_by_name)


def test_formats_are_given_as_python_has_them():
    class Trip(BaseModel):
        city: str

    for given in (SCHEMA, json.dumps(SCHEMA)):
        sampling = asked(json_schema=given).sampling
        assert json.loads(sampling.json_schema) == SCHEMA
        assert list(json.loads(sampling.json_schema)["properties"]) == ["b", "a"], "in the order in which they are written"
    assert json.loads(asked(json_schema=Trip).sampling.json_schema)["required"] == ["city"]
    assert list(asked(choice=["yes", "no"]).sampling.choice.texts) == ["yes", "no"]
    assert asked(regex="a+").sampling.WhichOneof("format") == "regex"
    repetition = asked(repetition_detection={"max_pattern_size": 4, "min_count": 3}).sampling.repetition_detection
    assert (repetition.max_pattern_size, repetition.min_count) == (4, 3)
    assert dict(asked(logit_bias={5: -1.5}).sampling.logit_bias) == {5: -1.5}
    assert refused(regex="a+", choice=["a"]).startswith("choice: give one")


@pytest.mark.parametrize("tool", [FUNCTION, {"type": "function", "function": FUNCTION}, {"type": "function", **FUNCTION}])
def test_tools_may_be_written_in_each_way_that_openai_has(tool):
    (made,) = asked(tools=[tool]).tools
    assert (made.name, made.description, made.strict, json.loads(made.parameters)) == ("look", "Looks.", True, SCHEMA)


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("auto", {"mode": "AUTO"}),
        ("none", {"mode": "NONE"}),
        ("required", {"mode": "REQUIRED"}),
        ("look", {"function": "look"}),
        ({"type": "function", "function": {"name": "look"}}, {"function": "look"}),
        ({"type": "function", "name": "look"}, {"function": "look"}),
    ],
)
def test_tool_choices(given, made):
    assert asked(tools=[FUNCTION], tool_choice=given).tool_choice == pb.ToolChoice(**made)


@pytest.mark.parametrize(
    "call",
    [
        {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "map"}'}},
        {"id": "1", "name": "look", "arguments": {"at": "map"}},
        {"id": "1", "index": 0, "type": "function", "function": {"name": "look", "arguments": '{"at": "map"}'}, "name": None},
    ],
)
def test_messages_of_a_conversation_with_tools(call):
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    first, second = turn_input([answer, result], None, None).messages.messages
    (made,) = first.tool_calls
    assert (made.id, made.name, json.loads(made.arguments), first.content) == ("1", "look", {"at": "map"}, "")
    assert (second.role, second.tool_call_id, second.content) == ("tool", "1", "a\nb")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_token": 5}, "max_token: write max_tokens"),
        ({"quux": 5}, "quux: use allowed_token_ids, "),
        ({"max_tokens": "five"}, "max_tokens: "),
        ({"temperature": [1]}, "temperature: "),
        ({"seed": 2**64}, "seed: "),
        ({"token_ids": ["a"]}, "token_ids.ids: "),
        ({"token_ids": b"ab"}, "token_ids.ids: give a list"),
        ({"suffix_token_ids": {5: "five"}}, "suffix_token_ids.ids: give a list"),
        ({"choice": "abc"}, "choice.texts: give a list"),
        ({"choice": {"yes": 1, "no": 2}}, "choice.texts: give a list"),
        ({"bad_words": "no"}, "bad_words: give a list"),
        ({"stop": {"END": True}}, "stop: give a list"),
        ({"stop": ["x", 5]}, "stop: "),
        ({"logit_bias": "ab"}, "logit_bias: "),
        ({"ignore_eos": 2**70}, "ignore_eos: "),
        ({"priority": 2**40}, "priority: "),
        ({"text": "a", "messages": []}, "text: give one"),
        ({"suffix_text": "a", "suffix_token_ids": [1]}, "suffix_token_ids: give one"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role: "),
        ({"messages": ["hi"]}, "messages.0: "),
        ({"suffix_messages": [{"role": "user", "contents": "hi"}]}, "suffix_messages.0.contents: write content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content: "),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
        ({"tools": [{"name": "look", "parameter": {}}]}, "tools.0.parameter: write parameters"),
        ({"messages": 5}, "messages: give a list"),
        ({"messages": {"role": "user", "content": "hi"}}, "messages: give a list"),
        ({"messages": [{"role": "assistant", "tool_calls": ["look"]}]}, "messages.0.tool_calls.0: "),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": {5}}]}]}, "messages.0.tool_calls.0.arg"),
        ({"tools": [{"name": 5}]}, "tools.0.name: "),
        (
            {"tools": [{"type": "function", "function": FUNCTION, "strict": True}]},
            "tools.0.strict: write it within tools.0.fun",
        ),
        ({"tools": [{"function": FUNCTION, "cache_control": {}}]}, "tools.0.cache_control: "),
        ({"tools": [{"function": {"name": "look", "parameter": {}}}]}, "tools.0.function.parameter: write parameters"),
        ({"tools": [{"function": {"name": 5}}]}, "tools.0.function.name: "),
        ({"tools": [{"type": "custom", "name": "look"}]}, 'tools.0.type: write "function"'),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "a", "args": {}}]}]}, "messages.0.tool_calls.0.args: "),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a"}, "arguments": "{}"}]}]},
            "messages.0.tool_calls.0.arguments: write it within messages.0.tool_calls.0.function",
        ),
        ({"tool_choice": {"name": "look", "mode": "auto"}}, "tool_choice.mode: "),
        ({"tool_choice": {"function": {"name": "look"}, "name": "look"}}, "tool_choice.name: write it within"),
        ({"tools": "look"}, "tools: give a list"),
        ({"tools": [{"name": "look", "parameters": object()}]}, "tools.0.parameters: give plain data"),
        ({"tools": [{"function": "look"}]}, "tools.0.function: "),
        ({"tool_choice": {"function": "look"}}, "tool_choice.function: "),
        ({"json_schema": object()}, "json_schema: give plain data"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_field(given, told):
    assert refused(**given).startswith(told)


LISTS = [
    (kind, field.name)
    for kind in (pb.SamplingParams, pb.Choice, pb.TokenIds, pb.Message, pb.GenerateRequest)
    for field in kind.DESCRIPTOR.fields
    if field.is_repeated and not (field.message_type and field.message_type.GetOptions().map_entry)
]


def test_one_stop_text_is_a_list_of_one_as_openai_has_it():
    assert list(asked(stop="END").sampling.stop) == ["END"]
    assert list(asked(stop=("END", "STOP")).sampling.stop) == ["END", "STOP"]


@pytest.mark.parametrize("given", ["no", b"no", {"no": 1}, {5: 1}])
@pytest.mark.parametrize(("kind", "name"), LISTS)
def test_what_is_no_list_is_not_split_into_one(kind, name, given):
    with pytest.raises(InvalidInput) as raised:
        built(kind, {name: given}, "here.")
    assert (raised.value.field, raised.value.fix) == (f"here.{name}", "give a list")


def test_all_lists_of_a_turn_are_looked_at():
    assert {"stop", "bad_words", "texts", "ids", "stop_token_ids"} <= {name for _, name in LISTS}


@pytest.mark.parametrize("value", ["ab", b"ab", 5, 1.5, True, object(), {"a": 1}, [1], [[1]], [None], "\ud800", 2**70, ()])
@pytest.mark.parametrize("name", Sampling.__annotations__)
def test_a_value_fits_its_field_or_is_refused_by_its_name(name, value):
    fields = {name}
    try:
        asked(**{name: value})
    except InvalidInput as error:
        fields.add(error.field.partition(".")[0])
    assert fields == {name}


def test_what_is_none_asks_for_nothing():
    assert asked(messages=None, text="a", seed=None, tools=None, tool_choice=None, nonsense=None) == pb.GenerateRequest(
        session_id="s", decoder="planner", input=pb.Input(text="a"), sampling=pb.SamplingParams()
    )


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: calls.create(5, None, "x", None, "", None), "session_id"),
        (lambda: calls.create("", None, "x", None, "", "soon"), "ttl_s"),
        (lambda: calls.fork("s", 2), "new_session_id"),
        (lambda: calls.get(None, with_token_ids="all"), "include_token_ids"),
        (lambda: calls.delete(7), "session_id"),
        (lambda: calls.page("many", ""), "page_size"),
        (lambda: calls.update("s", 1.5, None), "truncate_to"),
        (lambda: calls.keep("s", 0.0, "huge"), "priority"),
        (lambda: calls.let_go(["s"]), "session_id"),
        (lambda: calls.let_go_kept(3), "id"),
        (lambda: generate_request(3, "planner", {}), "session_id"),
        (lambda: generate_request("s", 3, {}), "decoder"),
    ],
)
def test_every_call_refuses_what_a_field_cannot_be_by_its_name(call, field):
    with pytest.raises(InvalidInput) as raised:
        call()
    assert raised.value.field == field
    assert raised.value.fix
