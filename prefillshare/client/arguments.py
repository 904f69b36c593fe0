"""What callers give, as messages of the contract. What cannot be meant is refused with its field, before anything is sent.

Messages and tools may be written as OpenAI's API has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from prefillshare.client.building import as_json, built, check_names, objects
from prefillshare.client.tools import tool, tool_call, tool_choice
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb


class _Role(TypedDict):
    role: str


class Message(_Role, total=False):
    """A chat message. `content`: text, or a list of OpenAI's text parts."""

    content: str | Sequence[Mapping[str, Any]] | None
    name: str
    tool_calls: Sequence[Mapping[str, Any]]
    tool_call_id: str


class Sampling(TypedDict, total=False):
    """Fields of pb.SamplingParams. Of json_schema, json_object, regex, choice, grammar and structural_tag, at most one is
    given. `json_schema` may be a class of pydantic's."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    min_tokens: int
    json_schema: Mapping[str, Any] | str | type
    json_object: bool
    regex: str
    choice: Sequence[str]
    grammar: str
    structural_tag: Mapping[str, Any] | str
    n: int
    logit_bias: Mapping[int, float]
    bad_words: Sequence[str]
    allowed_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    repetition_detection: Mapping[str, int]
    stream_interval: int
    logprob_token_ids: Sequence[int]


class TurnArguments(Sampling, total=False):
    """What a turn may be given besides its decoder. `priority`: how far it goes behind the tenant's other turns. `timeout_s`:
    its deadline, tries included. `expected_turns`: take it only if the session has had so many."""

    messages: Sequence[Message]
    text: str
    token_ids: Sequence[int]
    suffix_messages: Sequence[Message]
    suffix_text: str
    suffix_token_ids: Sequence[int]
    tools: Sequence[Mapping[str, Any]]
    tool_choice: Literal["auto", "none", "required"] | str | Mapping[str, Any]
    parallel_tool_calls: bool
    priority: int
    timeout_s: float | None
    expected_turns: int


_SAMPLING = frozenset(Sampling.__annotations__)
_TURN = frozenset(TurnArguments.__annotations__) | _SAMPLING
_MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id")


def generate_request(session_id: str, decoder: str, asked: Mapping[str, Any]) -> pb.GenerateRequest:
    """`asked`: as TurnArguments. Raises InvalidInput."""
    check_names(asked, _TURN)
    return built(pb.GenerateRequest, {
        "session_id": session_id,
        "decoder": decoder,
        "input": turn_input(asked.get("messages"), asked.get("text"), asked.get("token_ids")),
        "suffix": turn_input(
            asked.get("suffix_messages"), asked.get("suffix_text"), asked.get("suffix_token_ids"), "suffix_"
        ),
        "sampling": _sampling({name: value for name, value in asked.items() if name in _SAMPLING and value is not None}),
        "tools": [tool(one, field) for field, one in objects(asked.get("tools"), "tools")],
        "tool_choice": tool_choice(asked.get("tool_choice")),
        **{name: asked.get(name) for name in ("priority", "parallel_tool_calls", "expected_turns")},
    })  # fmt: skip


def turn_input(
    messages: Sequence[Mapping[str, Any]] | None, text: str | None, token_ids: Sequence[int] | None, before: str = ""
) -> pb.Input | None:
    """`before`: what the arguments' names begin with. Raises InvalidInput."""
    given = [name for name, value in (("messages", messages), ("text", text), ("token_ids", token_ids)) if value is not None]
    if len(given) > 1:
        names = " and ".join(before + name for name in given)
        raise InvalidInput(f"{names} exclude each other", field=before + given[1], fix="give one of them")
    if messages is not None:
        found = objects(messages, f"{before}messages")
        return pb.Input(messages=pb.Messages(messages=[_message(message, field) for field, message in found]))
    if text is not None:
        return built(pb.Input, {"text": text}, before)
    return pb.Input(token_ids=built(pb.TokenIds, {"ids": token_ids}, f"{before}token_ids.")) if token_ids is not None else None


def _message(given: Mapping[str, Any], field: str) -> pb.Message:
    check_names(given, _MESSAGE, f"{field}.")
    if not given.get("role"):
        raise InvalidInput("a message without a role", field=f"{field}.role", fix='say who speaks, like "user"')
    calls = [tool_call(one, of_one) for of_one, one in objects(given.get("tool_calls"), f"{field}.tool_calls")]
    plain = {name: given[name] for name in ("role", "name", "tool_call_id") if given.get(name) is not None}
    plain["content"] = _text(given.get("content"), f"{field}.content")
    return built(pb.Message, plain | {"tool_calls": calls}, f"{field}.")


def _text(content: Any, field: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, Sequence) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise InvalidInput("content is text, or a list of parts with text", field=field, fix="send text only")
    return "\n".join(part["text"] for part in parts)


def _sampling(given: dict[str, Any]) -> pb.SamplingParams:
    for name in ("json_schema", "structural_tag"):
        value: Any = given.get(name)
        if hasattr(value, "model_json_schema"):  # a class of pydantic's
            value = value.model_json_schema()
        if value is not None:
            given[name] = as_json(value, name)
    if isinstance(given.get("stop"), str):  # as OpenAI's API has it
        given["stop"] = [given["stop"]]
    if "choice" in given:
        given["choice"] = built(pb.Choice, {"texts": given["choice"]}, "choice.")
    formats = [field.name for field in pb.SamplingParams.DESCRIPTOR.oneofs_by_name["format"].fields if field.name in given]
    if len(formats) > 1:
        raise InvalidInput(f"{' and '.join(formats)} exclude each other", field=formats[1], fix="give one of them")
    return built(pb.SamplingParams, given)
