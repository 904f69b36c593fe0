"""Fields of a request that nobody reads are named, misleading ones are refused, and so are messages from nobody."""

import json

import httpx
import pytest
from fastapi import FastAPI
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface import http_errors
from prefillshare.kvshare_vllm.surface.asked_fields import IGNORED_HEADER, MOST_NAMES, AskedFields, header_of
from prefillshare.kvshare_vllm.surface.request_shape import RequestShape

CHAT, RESPONSES, MESSAGES, TOKENIZE = "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"
BATCH, COUNT = "/v1/chat/completions/batch", "/v1/messages/count_tokens"
ASK = {"role": "user", "content": "hi"}
CALLS = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "look"}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "x"}
USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "look", "input": {}}]}
TOOL_RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "x"}


def app() -> FastAPI:
    made = FastAPI()

    @made.post(CHAT)
    async def chat(request: ChatCompletionRequest):
        return {}

    @made.post(RESPONSES)
    async def responses(request: ResponsesRequest):
        return {}

    @made.post(MESSAGES)
    async def messages(request: AnthropicMessagesRequest):
        return {}

    @made.post(BATCH)
    async def batch(request: BatchChatCompletionRequest):
        return {}

    @made.post(COUNT)
    async def count(request: AnthropicCountTokensRequest):
        return {}

    @made.post(TOKENIZE)
    async def tokenize(request: TokenizeCompletionRequest | TokenizeChatRequest):
        return {}

    return made


@pytest.fixture(scope="module")
def fields():
    return AskedFields(app().routes)


def refused(fields, path, **body) -> InvalidInput:
    with pytest.raises(InvalidInput) as raised:
        fields.ignored(path, body)
    assert raised.value.fix
    return raised.value


@pytest.mark.parametrize(
    ("path", "body", "ignored"),
    [
        (CHAT, {"messages": [ASK], "seed": 5, "store": True, "verbosity": "low"}, ["store", "verbosity"]),
        (CHAT, {"messages": [ASK], "store": None}, []),
        (CHAT, {"messages": [ASK], "prompt_cache_retention": "24h", "prompt_cache_key": "k"}, ["prompt_cache_key"]),
        (RESPONSES, {"input": "hi", "prompt_cache_retention": "24h"}, []),
        (MESSAGES, {"messages": [ASK], "max_tokens": 5, "cache_control": {"type": "ephemeral"}}, []),
        (RESPONSES, {"input": "hi", "conversation": "c", "text": {}, "quux": 1}, ["quux"]),
        (MESSAGES, {"messages": [ASK], "max_tokens": 5, "service_tier": "auto"}, ["service_tier"]),
        (TOKENIZE, {"prompt": "hi", "messages": [ASK], "add_generation_prompt": True, "quux": 1}, ["quux"]),
        (RESPONSES, {"input": "hi", "tools": [{"type": "function"}, {"type": "web_search"}]}, ["tools.1 (web_search)"]),
        ("/v1/conversations", {"quux": 1}, []),
    ],
)
def test_what_nobody_reads_is_named(fields, path, body, ignored):
    assert fields.ignored(path, body) == ignored


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("guided_json", "response_format"),
        ("guided_regex", "structured_outputs"),
        ("guided_choice", "structured_outputs"),
        ("guided_grammar", "structured_outputs"),
        ("guided_decoding_backend", "leave it out"),
        ("functions", "send tools"),
        ("function_call", "send tool_choice"),
        ("extra_body", "in the body itself"),
    ],
)
def test_what_would_silently_do_nothing_is_refused_with_what_to_send_instead(fields, name, fix):
    error = refused(fields, CHAT, messages=[ASK], **{name: {"type": "object"}})
    assert (error.field, fix in error.fix) == (name, True)
    assert fields.ignored(CHAT, {"messages": [ASK], name: None}) == []


def test_a_conversation_that_the_server_is_to_hold_is_refused_in_words_that_anthropics_client_reads(fields):
    error = refused(fields, MESSAGES, messages=[ASK], max_tokens=5, thread={"type": "create"})
    told = json.loads(http_errors.surface_of(MESSAGES).body(http_errors.HttpError.of(error)))["error"]
    assert (told["type"], told["details"]["error_code"]) == ("invalid_request_error", "thread_unsupported_request")
    assert fields.ignored(CHAT, {"messages": [ASK], "thread": {"type": "create"}}) == ["thread"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {"messages": [ASK, {"role": "robot", "content": "x"}]}, "messages.1.role"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": ["user"]}]}, "messages.0.role"),
        (CHAT, {"messages": [[ASK], [ASK, {"role": "robot"}]]}, "messages.1.1.role"),
        (MESSAGES, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (RESPONSES, {"input": [ASK, {"role": "robot", "content": "x"}]}, "input.1.role"),
        (RESPONSES, {"input": [{"type": "message", "content": "x"}]}, "input.0.role"),
    ],
)
def test_a_message_from_nobody_is_refused(fields, path, body, field):
    assert refused(fields, path, **body).field == field


@pytest.mark.parametrize(
    ("path", "messages", "field"),
    [
        (CHAT, [{"role": "tool", "content": "x"}], "messages.0.tool_call_id"),
        (CHAT, [CALLS, {"role": "tool", "content": "x"}], "messages.1.tool_call_id"),
        (CHAT, [RESULT, CALLS], "messages.0.tool_call_id"),
        (CHAT, [CALLS, RESULT | {"tool_call_id": ["1"]}], "messages.1.tool_call_id"),
        (BATCH, [[ASK], [ASK, RESULT]], "messages.1.1.tool_call_id"),
        (BATCH, [[CALLS], [ASK, RESULT]], "messages.1.1.tool_call_id"),
        (MESSAGES, [ASK, {"role": "user", "content": [TOOL_RESULT]}], "messages.1.content.0.tool_use_id"),
        (MESSAGES, [USE, {"role": "user", "content": [ASK, {"type": "tool_result"}]}], "messages.1.content.1.tool_use_id"),
        (COUNT, [{"role": "user", "content": [TOOL_RESULT]}], "messages.0.content.0.tool_use_id"),
    ],
)
def test_a_tools_result_without_its_call_is_refused_under_the_name_that_its_client_sent(fields, path, messages, field):
    system = {"system": "You plan."} if path == MESSAGES else {}
    assert refused(fields, path, messages=messages, **system).field == field


NAMED = {"type": "function", "function": {"name": "look"}}
ANY, TOOL = {"type": "any"}, {"type": "tool", "name": "look"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}


@pytest.mark.parametrize(
    ("path", "choices", "form", "field"),
    [
        (CHAT, ["required", NAMED], {"response_format": SCHEMA}, None),
        (CHAT, ["required", NAMED], {"response_format": {"type": "json_object"}}, None),
        (CHAT, ["required", NAMED], {"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex"),
        (CHAT, ["required"], {"structured_outputs": {"json_object": False, "regex": None}}, None),
        (RESPONSES, ["required", {"type": "function", "name": "look"}], {"text": {"format": SCHEMA}}, None),
        (RESPONSES, [{"type": "custom", "name": "look"}], {"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json"),
        (MESSAGES, [ANY, TOOL], {"output_config": {"format": SCHEMA}}, None),
        (MESSAGES, [ANY, TOOL], {"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex"),
    ],
)
def test_a_format_beside_a_forced_call_is_refused(fields, path, choices, form, field):
    body = {"messages": [ASK], "tools": [{"name": "look"}], **form}
    for choice in choices:
        if field:
            assert refused(fields, path, tool_choice=choice, **body).field == field
        else:
            fields.ignored(path, {"tool_choice": choice, **body})
    for choice in ("auto", "none", {"type": "auto"}, None):
        fields.ignored(path, {"tool_choice": choice, **body})


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {"messages": "x"}, "messages"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": [ASK], "structured_outputs": []}, "structured_outputs"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages.0.tool_calls"),
        (CHAT, {"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0"),
        (CHAT, {"messages": [{"role": "user", "content": ["x", {"type": []}]}]}, "messages.0.content.1"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text"),
        (BATCH, {"messages": [[{"role": "user", "content": [{"type": "tool_use"}]}]]}, "messages.0.0.content.0"),
        (MESSAGES, {"messages": None}, "messages"),
        (CHAT, {"messages": [ASK], "prompt_cache_retention": ["24h"]}, "prompt_cache_retention"),
        (RESPONSES, {"input": "hi", "prompt_cache_retention": {}}, "prompt_cache_retention"),
        (RESPONSES, {"input": "hi", "conversation": ["c"]}, "conversation"),
        (MESSAGES, {"messages": [ASK], "cache_control": "5m"}, "cache_control"),
        (CHAT, {"messages": [ASK], "chat_template_kwargs": {"x": 1, "messages": []}}, "chat_template_kwargs.messages"),
        (MESSAGES, {"messages": [ASK], "chat_template_kwargs": {"tokenizer": 1}}, "chat_template_kwargs.tokenizer"),
        (TOKENIZE, {"messages": [ASK], "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        (MESSAGES, {"messages": [ASK], "tools": 3}, "tools"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        (RESPONSES, {"input": [ASK, {"role": "user", "content": ["x"]}]}, "input.1.content.0"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text"),
        (RESPONSES, {"input": [{"type": "function_call_output", "output": [{"type": "input_file"}]}]}, "input.0.output.0"),
    ],
)
def test_what_is_not_what_it_should_be_is_refused(fields, path, body, field):
    assert refused(fields, path, **body).field == field


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": role} for role in ("system", "developer", "user", "assistant")]}),
        (CHAT, {"messages": [CALLS, RESULT, RESULT]}),
        (BATCH, {"messages": [[ASK, CALLS, RESULT], [ASK]]}),
        (MESSAGES, {"messages": [ASK, USE, {"role": "user", "content": [TOOL_RESULT]}]}),
        (TOKENIZE, {"messages": [RESULT]}),
        (CHAT, {"messages": [{"role": "user", "content": ["x", {"type": "text", "text": ""}, {"type": "image_url"}]}]}),
        (TOKENIZE, {"messages": None, "prompt": "hi"}),
        (CHAT, {"messages": [ASK], "tools": None, "chat_template_kwargs": {"enable_thinking": False}}),
        (CHAT, {"messages": [5, None, {"role": "assistant", "tool_calls": [5]}]}),
        (RESPONSES, {"input": [ASK, {"type": "function_call_output", "call_id": "1", "output": "x"}, 5]}),
        (RESPONSES, {"input": [ASK | {"content": [{"type": "input_text", "text": ""}]}], "tools": []}),
        (RESPONSES, {"input": "hi", "tools": [{"type": "function"}, {"type": "custom"}, {"type": "namespace"}, 5]}),
    ],
)
def test_what_is_right_or_vllms_to_refuse_passes(fields, path, body):
    assert fields.ignored(path, body) == []


@pytest.fixture
async def http():
    wrapped = app()
    wrapped.middleware_stack = RequestShape(wrapped.build_middleware_stack(), 100, AskedFields(wrapped.routes))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(wrapped), base_url="http://router") as client:
        yield client


async def test_the_answer_names_them_in_a_header_and_only_where_there_are_any(http):
    body = {"model": "m", "messages": [ASK]}
    assert IGNORED_HEADER not in (await http.post(CHAT, json=body)).headers
    told = await http.post(CHAT, json={**body, "store": True, "service_tier": "auto"})
    assert (told.status_code, told.headers[IGNORED_HEADER]) == (200, "store, service_tier")
    wrong = await http.post(CHAT, json={**body, "store": True, "seed": "x"})
    assert (wrong.status_code, wrong.headers[IGNORED_HEADER]) == (422, "store")


async def test_a_refusal_has_the_shape_of_the_others(http):
    refused = await http.post(CHAT, json={"model": "m", "messages": [ASK], "guided_json": {}})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["type"]) == (400, "guided_json", "BadRequestError")


def test_any_name_fits_a_header():
    many = [f"f{number}" for number in range(MOST_NAMES + 5)]
    assert header_of(many)[1].decode().split(", ") == [*many[:MOST_NAMES], "..."]
    name, value = header_of(["a\r\nx: y", "ä,b", "x" * 9000])
    assert name == IGNORED_HEADER.encode()
    assert value.decode("ascii").isprintable()
    assert len(value) < 200
