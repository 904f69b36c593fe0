"""Tools, calls of them and the choice among them as messages of the contract. They are written flat, or as OpenAI's API has
them: {"type": "function", "function": {"name", ...}}. What would have no effect where it stands is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from prefillshare.client.building import as_json, built, check_names
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

_TOOL = ("name", "description", "parameters", "strict")
#: `index`: of a call that was put together from a stream; calls come in their order.
_OF_CALL = ("id", "index")


def tool(given: Mapping[str, Any], field: str) -> pb.Tool:
    function, place = _function(given, field, _TOOL)
    values = {name: function[name] for name in _TOOL if function.get(name) is not None}
    if "parameters" in values:
        values["parameters"] = as_json(values["parameters"], f"{place}parameters")
    return built(pb.Tool, values, place)


def tool_call(given: Mapping[str, Any], field: str) -> pb.ToolCall:
    function, place = _function(given, field, ("name", "arguments"), _OF_CALL)
    arguments = as_json(function.get("arguments") or "", f"{place}arguments")
    call = built(pb.ToolCall, {"id": given.get("id") or ""}, f"{field}.")
    call.MergeFrom(built(pb.ToolCall, {"name": function.get("name"), "arguments": arguments}, place))
    return call


def tool_choice(given: str | Mapping[str, Any] | None) -> pb.ToolChoice | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        given = _function(given, "tool_choice", ("name",))[0].get("name")
        if given is None:
            raise InvalidInput("names no function", field="tool_choice.function", fix='write {"name": ...}, or its name alone')
    elif isinstance(given, str) and given.upper() in pb.ToolChoice.Mode.keys():  # noqa: SIM118 - an enum's names
        return pb.ToolChoice(mode=given.upper())
    return built(pb.ToolChoice, {"function": given}, "tool_choice.")


def _function(
    given: Mapping[str, Any], field: str, known: Collection[str], beside: Collection[str] = ()
) -> tuple[Mapping[str, Any], str]:
    """What is said of the function, and what the names of its fields begin with. `known`: what may be said of it; `beside`:
    what may stand beside `function`. Raises InvalidInput."""
    if given.get("type") not in (None, "function"):
        raise InvalidInput(f"{given['type']!r:.60} is no type of ours", field=f"{field}.type", fix='write "function"')
    inner = given.get("function")
    if inner is None:
        check_names(given, (*known, *beside, "type"), f"{field}.")
        return given, f"{field}."
    if not isinstance(inner, Mapping):
        raise InvalidInput(f"{inner!r:.60} is no object", field=f"{field}.function", fix='write {"name": ...}')
    for name in known:
        if given.get(name) is not None:
            raise InvalidInput("stands beside `function`", field=f"{field}.{name}", fix=f"write it within {field}.function")
    check_names(given, (*beside, "type", "function"), f"{field}.")
    check_names(inner, known, f"{field}.function.")
    return inner, f"{field}.function."
