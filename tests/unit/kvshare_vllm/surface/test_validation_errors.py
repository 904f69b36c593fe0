"""A body that a route cannot take is refused by the field that its client sent, with one problem of the likeliest kind."""

import pytest
from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from prefillshare.kvshare_vllm.surface.validation_errors import told


def refused(kind, body) -> tuple[str | None, str]:
    with pytest.raises(ValidationError) as caught:
        kind(**body)
    return told([{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()])


TOOL = {"type": "function", "name": "look"}
CALL = {"type": "function_call", "call_id": "c", "name": "look"}


@pytest.mark.parametrize(
    ("body", "field", "what"),
    [
        ({}, "input", "missing"),
        ({"input": 3}, "input", "valid string"),
        ({"input": [3]}, "input.0", "valid dictionary"),
        ({"input": [{"role": "user"}]}, "input.0.content", "missing"),
        ({"input": [{"type": "moon"}]}, "input.0", "none of the types"),
        ({"input": [CALL]}, "input.0.arguments", "missing"),
        ({"input": [CALL | {"arguments": {}}]}, "input.0.arguments", "valid string"),
        ({"input": [{"type": "function_call_output", "call_id": 3, "output": "x"}]}, "input.0.call_id", "valid string"),
        ({"input": "x", "tools": [TOOL | {"parameters": "x"}]}, "tools.0.parameters", "valid dictionary"),
        ({"input": "x", "tools": [{"type": "moon"}]}, "tools.0", "none of the types"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.name", "missing"),
        ({"input": "x", "store": 3, "stream": "x"}, "store", "valid boolean"),
    ],
)
def test_a_response_that_cannot_be_asked_for(body, field, what):
    place, text = refused(ResponsesRequest, body)
    assert place == field
    assert what in text
    assert len(text) < 200


@pytest.mark.parametrize(
    ("body", "field", "what"),
    [
        ({"messages": [3]}, "messages.0", "valid dictionary"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "valid string"),
        ({"messages": [], "stop": 3}, "stop", "valid string"),
        ({"messages": [], "temperature": "hot"}, "temperature", "valid number"),
    ],
)
def test_a_chat_that_cannot_be_asked_for(body, field, what):
    place, text = refused(ChatCompletionRequest, body)
    assert place == field
    assert what in text


def test_what_is_no_json_has_no_field():
    error = {"type": "json_invalid", "loc": ("body", 3), "msg": "JSON decode error", "ctx": {"error": "Expecting value"}}
    assert told([error]) == (None, "the body is not JSON: Expecting value (fix: send a JSON object)")


def test_what_is_wrong_in_the_address_is_named_without_its_place():
    error = {"type": "int_parsing", "loc": ("query", "limit"), "msg": "Input should be a valid integer"}
    assert told([error]) == ("limit", "Input should be a valid integer")


def test_a_body_that_is_none_at_all_is_told_as_such():
    assert told([{"type": "missing", "loc": ("body",), "msg": "Field required"}]) == (None, "it is missing (fix: send it)")
