"""Whatever HTTP can ask of sampling can be asked over gRPC, and is read and checked by the same class."""

import inspect
import json

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.router.sessions.sampling import _RANGES, named_as_sent, to_sampling_params
from prefillshare.router.sessions.tools import tool_fields

FORMAT = "sampling: the oneof `format`"
#: Every field of vLLM's requests -> the field of GenerateRequest that asks for the same, or, after "no: ", why there is none.
TABLE = {
    "model": "decoder",
    "messages": "input.messages",
    "prompt": "input.text, input.token_ids",
    "prompt_embeds": "no: HTTP does not take it here either",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "parallel_tool_calls": "parallel_tool_calls",
    "response_format": FORMAT,
    "structured_outputs": FORMAT,
    "logprobs": "sampling.logprobs",
    "top_logprobs": "sampling.logprobs",
    "max_completion_tokens": "sampling.max_tokens",
    "priority": "priority",
    "cache_salt": "no: a session's cache_domain says with whom it shares KV",
    **{
        name: f"sampling.{name}"
        for name in (
            "allowed_token_ids", "bad_words", "frequency_penalty", "ignore_eos", "include_stop_str_in_output", "logit_bias",
            "logprob_token_ids", "max_tokens", "min_p", "min_tokens", "n", "presence_penalty", "repetition_detection",
            "repetition_penalty", "seed", "skip_special_tokens", "spaces_between_special_tokens", "stop", "stop_token_ids",
            "stream_interval", "temperature", "top_k", "top_p",
        )
    },
    # Always so over gRPC.
    "stream": "no: Generate always streams",
    "stream_options": "no: Done always has the usage",
    "return_token_ids": "no: token ids always come",
    "return_tokens_as_token_ids": "no: log-probabilities name tokens by their ids",
    # Not of sampling: how a prompt is made of messages, which a session keeps as token ids.
    "add_generation_prompt": "no: an input of text opens no answer",
    "add_special_tokens": "no: token ids can be given",
    "chat_template": "no: HTTP refuses it, too (base.chat_template)",
    "chat_template_kwargs": "no: of how messages are laid out, which a session has settled",
    "continue_final_message": "no: an input of text goes on",
    "documents": "no: of how messages are laid out, which a session has settled",
    "echo": "no: the client knows what it has sent",
    "prompt_logprobs": "no: HTTP refuses it, too",
    "reasoning_effort": "no: of how messages are laid out, which a session has settled",
    "return_prompt_text": "no: GetSession returns the token ids",
    "suffix": "no: vLLM does not serve it",
    "truncate_prompt_tokens": "no: UpdateSession truncates",
    "truncation_side": "no: UpdateSession truncates",
    "user": "no: vLLM ignores it",
    "request_id": "no: the router makes it",
    "session_id": "no: the session itself",
    # Needs what no engine of ours has, or is not a client's.
    "use_beam_search": "no: a beam is many requests of one token, of which none goes on from a session",
    "length_penalty": "no: of beam search only",
    "thinking_token_budget": "no: engines run without a reasoning parser, and refuse it",
    "include_reasoning": "no: engines run without a reasoning parser",
    "watermarking": "no: it does nothing unless an engine is told to",
    "kv_transfer_params": "no: not a client's",
    "ec_transfer_params": "no: not a client's",
    "vllm_xargs": "no: dropped over HTTP, too",
    "routed_experts_prompt_start": "no: engines do not return experts",
    "media_io_kwargs": "no: text only",
    "mm_processor_kwargs": "no: text only",
    "mm_payload": "no: text only",
    "return_mm_kwargs": "no: text only",
    "return_token_offsets": "no: of routes that are not served",
}
#: A value for each field of SamplingParams, and what a chat completion would say for the same.
GIVEN = {
    "max_tokens": (7, {"max_tokens": 7}),
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (5, {"top_k": 5}),
    "min_p": (0.25, {"min_p": 0.25}),
    "seed": (-(2**40), {"seed": -(2**40)}),
    "presence_penalty": (-1.5, {"presence_penalty": -1.5}),
    "frequency_penalty": (1.5, {"frequency_penalty": 1.5}),
    "repetition_penalty": (3.5, {"repetition_penalty": 3.5}),
    "stop": (["x", "y"], {"stop": ["x", "y"]}),
    "stop_token_ids": ([4, 5], {"stop_token_ids": [4, 5]}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "logprobs": (3, {"logprobs": True, "top_logprobs": 3}),
    "min_tokens": (2, {"min_tokens": 2}),
    "json_schema": ('{"type": "object"}', {"structured_outputs": {"json": '{"type": "object"}'}}),
    "json_object": (True, {"response_format": {"type": "json_object"}}),
    "regex": ("a+", {"structured_outputs": {"regex": "a+"}}),
    "choice": (pb.Choice(texts=["a", "b"]), {"structured_outputs": {"choice": ["a", "b"]}}),
    "grammar": ('root ::= "a"', {"structured_outputs": {"grammar": 'root ::= "a"'}}),
    "structural_tag": (
        '{"type": "structural_tag", "format": {"type": "const_string", "value": "a"}}',
        {"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "a"}}},
    ),
    "n": (3, {"n": 3, "temperature": 1.0}),
    "logit_bias": ({5: -1.5, 6: 200.0}, {"logit_bias": {"5": -1.5, "6": 200.0}}),
    "bad_words": (["x"], {"bad_words": ["x"]}),
    "allowed_token_ids": ([1, 2], {"allowed_token_ids": [1, 2]}),
    "include_stop_str_in_output": (True, {"include_stop_str_in_output": True}),
    "skip_special_tokens": (False, {"skip_special_tokens": False}),
    "spaces_between_special_tokens": (False, {"spaces_between_special_tokens": False}),
    "repetition_detection": (
        pb.RepetitionDetection(max_pattern_size=4, min_pattern_size=2, min_count=3),
        {"repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 2, "min_count": 3}},
    ),
    "stream_interval": (4, {"stream_interval": 4}),
    "logprob_token_ids": ([7], {"logprob_token_ids": [7], "logprobs": True}),
}


def test_no_field_of_https_requests_is_without_an_answer():
    theirs = ChatCompletionRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    assert theirs == TABLE.keys(), "a field is new in vLLM, or gone"
    ours = set(pb.SamplingParams.DESCRIPTOR.fields_by_name)
    formats = {field.name for field in pb.SamplingParams.DESCRIPTOR.oneofs_by_name["format"].fields}
    named = {where.removeprefix("sampling.") for where in TABLE.values() if where.startswith("sampling.")}
    assert named | formats == ours == GIVEN.keys()


def test_nor_is_a_parameter_of_vllms_engine_that_requests_can_set():
    of_engines = set(inspect.signature(SamplingParams.from_optional).parameters)
    set_by_requests = {name for name in of_engines if f"{name}=" in inspect.getsource(ChatCompletionRequest.to_sampling_params)}
    ours = {"output_kind", "skip_clone", "extra_args"}  # how outputs are made, not what is sampled
    assert set_by_requests - ours <= TABLE.keys()


def as_over_http(fields: dict) -> dict:
    """What HTTP's request asks of an engine, apart from the default temperature."""
    request = ChatCompletionRequest(messages=[], stream=True, **{"temperature": 0.0, **fields})
    return shown(request.to_sampling_params(fields.get("max_tokens", 1 << 20), {}))


def shown(params: SamplingParams) -> dict:
    told = {name: getattr(params, name) for name in params.__struct_fields__ if name not in ("skip_clone", "max_tokens")}
    form = told.pop("structured_outputs")
    kinds = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
    told["format"] = form and {kind: getattr(form, kind) for kind in kinds}
    if told["format"] and told["format"]["structural_tag"]:
        told["format"]["structural_tag"] = json.loads(told["format"]["structural_tag"])
    return told


@pytest.mark.parametrize("name", GIVEN)
def test_each_field_asks_an_engine_for_what_it_asks_for_over_http(name):
    value, fields = GIVEN[name]
    message = pb.SamplingParams(**{name: value})
    if name == "n":
        message.temperature = 1.0
    if name == "logprob_token_ids":
        message.logprobs = 0
    asked = to_sampling_params(message)
    assert shown(asked) == as_over_http(fields)
    assert asked.max_tokens == (7 if name == "max_tokens" else None)


WHOLE = ("n", "top_k", "min_tokens", "stream_interval")


def refusal(ask, *given) -> Exception | None:
    try:
        ask(*given)
    except Exception as error:
        return error


@pytest.mark.parametrize("name", sorted(set(_RANGES) - {"logprobs", "max_tokens"}))
def test_a_value_is_out_of_range_over_grpc_exactly_where_it_is_over_http(name):
    low, high, _ = _RANGES[name]
    step = 1 if name in WHOLE else 0.5
    besides = {"temperature": 1.0} if name == "n" else {}
    for value in {low - step, low, low + step, *((high, high + step) if high is not None else (1000,))}:
        ours = refusal(to_sampling_params, pb.SamplingParams(**{name: value}, **besides))
        assert (ours is None) == (refusal(as_over_http, {name: value} | besides) is None), value
        if ours:
            assert ours.field == f"sampling.{name}"
            assert ours.fix.startswith("use a value in")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"n": 2}, "sampling.n"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"stop": [""]}, "sampling.stop"),
        ({"stop": ["x"] * 17}, "sampling.stop"),
        ({"min_tokens": 5, "max_tokens": 4}, "sampling.min_tokens"),
        ({"bad_words": [""]}, "sampling.bad_words"),
        ({"structural_tag": "{"}, "sampling.structural_tag"),
        ({"logprob_token_ids": [1]}, "sampling.logprob_token_ids"),
        ({"repetition_detection": pb.RepetitionDetection(max_pattern_size=4)}, "sampling.repetition_detection"),
    ],
)
def test_a_refusal_names_the_field_as_it_was_sent(given, field):
    with pytest.raises(InvalidInput) as raised:
        to_sampling_params(pb.SamplingParams(**given))
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("response_format", "sampling.json_schema"),
        ("structured_outputs.json_object", "sampling.json_object"),
        ("structured_outputs.regex", "sampling.regex"),
        ("top_logprobs", "sampling.logprobs"),
        ("bad_words", "sampling.bad_words"),
        ("tools", "tools"),
        ("decoder", "decoder"),
        (None, "sampling"),
    ],
)
def test_what_is_found_wrong_later_is_named_as_it_was_sent(theirs, ours):
    with pytest.raises(InvalidInput) as raised, named_as_sent():
        raise InvalidInput("x", field=theirs)
    assert raised.value.field == ours


TOOL = pb.Tool(name="look", description="Looks.", parameters='{"type": "object"}', strict=True)


def test_tools_are_those_of_a_chat_completion():
    request = pb.GenerateRequest(tools=[TOOL, pb.Tool(name="bare")], parallel_tool_calls=False)
    fields = tool_fields(request)
    assert fields == {
        "tools": [
            {
                "type": "function",
                "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}, "strict": True},
            },
            {"type": "function", "function": {"name": "bare"}},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
    }
    assert tool_fields(pb.GenerateRequest()) == {}
    assert tool_fields(pb.GenerateRequest(tool_choice=pb.ToolChoice(mode="NONE"))) == {}
    for choice, said in (({"mode": "REQUIRED"}, "required"), ({"mode": "NONE"}, "none")):
        assert tool_fields(pb.GenerateRequest(tools=[TOOL], tool_choice=choice))["tool_choice"] == said
    named = tool_fields(pb.GenerateRequest(tools=[TOOL], tool_choice={"function": "look"}))["tool_choice"]
    assert named == {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"tool_choice": pb.ToolChoice(mode="REQUIRED")}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [pb.Tool()]}, "tools.0.name"),
        ({"tools": [TOOL, pb.Tool(name="x", parameters="{")]}, "tools.1.parameters"),
        ({"tools": [pb.Tool(name="x", parameters="[1]")]}, "tools.0.parameters"),
        ({"tools": [TOOL], "tool_choice": pb.ToolChoice(function="x")}, "tool_choice.function"),
        ({"tools": [TOOL], "tool_choice": pb.ToolChoice(mode=9)}, "tool_choice.mode"),
        ({"tools": [TOOL] * 2000}, "tools"),
    ],
)
def test_tools_that_cannot_be_meant_are_refused(request_, field):
    with pytest.raises(InvalidInput) as raised:
        tool_fields(pb.GenerateRequest(**request_))
    assert (raised.value.field, bool(raised.value.fix)) == (field, True)
