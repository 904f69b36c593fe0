"""What callers give, as messages of the contract. What cannot be meant is refused with its field, before anything is sent.

Messages and tools may be written as OpenAI's API has them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

from google.protobuf.message import Message as Proto

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

P = TypeVar("P", bound=Proto)


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
_TOOL = ("name", "description", "parameters", "strict")


def generate_request(session_id: str, decoder: str, asked: Mapping[str, Any]) -> pb.GenerateRequest:
    """`asked`: as TurnArguments. Raises InvalidInput."""
    _check_names(asked, _TURN)
    return built(pb.GenerateRequest, {
        "session_id": session_id,
        "decoder": decoder,
        "input": turn_input(asked.get("messages"), asked.get("text"), asked.get("token_ids")),
        "suffix": turn_input(
            asked.get("suffix_messages"), asked.get("suffix_text"), asked.get("suffix_token_ids"), "suffix_"
        ),
        "sampling": _sampling({name: value for name, value in asked.items() if name in _SAMPLING and value is not None}),
        "tools": [_tool(tool, field) for field, tool in _objects(asked.get("tools"), "tools")],
        "tool_choice": _choice(asked.get("tool_choice")),
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
        objects = _objects(messages, f"{before}messages")
        return pb.Input(messages=pb.Messages(messages=[_message(message, field) for field, message in objects]))
    if text is not None:
        return built(pb.Input, {"text": text}, before)
    return pb.Input(token_ids=built(pb.TokenIds, {"ids": token_ids}, f"{before}token_ids.")) if token_ids is not None else None


def _message(given: Mapping[str, Any], field: str) -> pb.Message:
    _check_names(given, _MESSAGE, f"{field}.")
    if not given.get("role"):
        raise InvalidInput("a message without a role", field=f"{field}.role", fix='say who speaks, like "user"')
    calls = [_call(call, of_call) for of_call, call in _objects(given.get("tool_calls"), f"{field}.tool_calls")]
    plain = {name: given[name] for name in ("role", "name", "tool_call_id") if given.get(name) is not None}
    plain["content"] = _text(given.get("content"), f"{field}.content")
    return built(pb.Message, plain | {"tool_calls": calls}, f"{field}.")


def _objects(given: Any, field: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Each with its field's name. None: there are none."""
    if isinstance(given, str | Mapping) or not isinstance(given or (), Iterable):
        raise InvalidInput(f"{given!r:.60} is no list", field=field, fix="give a list")
    items = list(given or ())
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise InvalidInput(f"{item!r:.60} is no object", field=f"{field}.{number}", fix="see docs/client.md for its keys")
    return [(f"{field}.{number}", item) for number, item in enumerate(items)]


def _text(content: Any, field: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, Sequence) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise InvalidInput("content is text, or a list of parts with text", field=field, fix="send text only")
    return "\n".join(part["text"] for part in parts)


def _call(given: Mapping[str, Any], field: str) -> pb.ToolCall:
    """Flat, or as OpenAI has it: {"id", "type", "function": {"name", "arguments"}}."""
    function = _function(given)
    arguments = _json(function.get("arguments") or "", f"{field}.arguments")
    return built(
        pb.ToolCall, {"id": given.get("id") or "", "name": function.get("name"), "arguments": arguments}, f"{field}."
    )


def _tool(given: Mapping[str, Any], field: str) -> pb.Tool:
    """Flat, or as OpenAI has it: {"type": "function", "function": {"name", ...}}."""
    function = dict(_function(given))
    if function.get("type") == "function":
        del function["type"]
    _check_names(function, _TOOL, f"{field}.")
    if function.get("parameters") is not None:
        function["parameters"] = _json(function["parameters"], f"{field}.parameters")
    return built(pb.Tool, {name: value for name, value in function.items() if value is not None}, f"{field}.")


def _choice(given: str | Mapping[str, Any] | None) -> pb.ToolChoice | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        given = _function(given).get("name")
        if given is None:
            raise InvalidInput("names no function", field="tool_choice.function", fix='write {"name": ...}, or its name alone')
    elif isinstance(given, str) and given.upper() in pb.ToolChoice.Mode.keys():  # noqa: SIM118 - an enum's names
        return pb.ToolChoice(mode=given.upper())
    return built(pb.ToolChoice, {"function": given}, "tool_choice.")


def _sampling(given: dict[str, Any]) -> pb.SamplingParams:
    for name in ("json_schema", "structural_tag"):
        value: Any = given.get(name)
        if hasattr(value, "model_json_schema"):  # a class of pydantic's
            value = value.model_json_schema()
        if value is not None:
            given[name] = _json(value, name)
    if isinstance(given.get("stop"), str):  # as OpenAI's API has it
        given["stop"] = [given["stop"]]
    if "choice" in given:
        given["choice"] = built(pb.Choice, {"texts": given["choice"]}, "choice.")
    formats = [field.name for field in pb.SamplingParams.DESCRIPTOR.oneofs_by_name["format"].fields if field.name in given]
    if len(formats) > 1:
        raise InvalidInput(f"{' and '.join(formats)} exclude each other", field=formats[1], fix="give one of them")
    return built(pb.SamplingParams, given)


def _function(given: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = given.get("function")
    return inner if isinstance(inner, Mapping) else given


def _json(given: Any, field: str) -> str:
    """Text is taken for JSON."""
    try:
        return given if isinstance(given, str) else json.dumps(given)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{given!r:.60} cannot be written as JSON: {error}", field=field, fix="give plain data") from None


def _check_names(given: Mapping[str, Any], known: Collection[str], before: str = "") -> None:
    """A field that is None asks for nothing."""
    for name, value in given.items():
        if name not in known and value is not None:
            near = difflib.get_close_matches(str(name), known, 1)
            fix = f"write {near[0]}" if near else f"use {', '.join(sorted(known))}"
            raise InvalidInput("there is no such field", field=f"{before}{name}", fix=fix)


def built(kind: type[P], values: Mapping[str, Any], before: str = "") -> P:
    """A message with these values. Raises InvalidInput that names the one which does not fit."""
    made = kind()
    for name, value in values.items():
        if _is_list(kind, name) and isinstance(value, str | bytes | bytearray | Mapping):  # protobuf would take its parts
            raise InvalidInput(f"{value!r:.60} is no list", field=f"{before}{name}", fix="give a list")
        try:
            made.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError, OverflowError) as error:
            text = f"{value!r:.60} does not fit: {error}"
            raise InvalidInput(text, field=f"{before}{name}", fix="see docs/client.md for what it may be") from None
    return made


def _is_list(kind: type[Proto], name: str) -> bool:
    field = kind.DESCRIPTOR.fields_by_name[name]
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    return field.is_repeated and not is_map
