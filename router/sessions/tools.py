"""The tools of a turn over gRPC, as fields of a chat completion; see router/sessions/sampling.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.request_shape import MOST_ENTRIES
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb


def tool_fields(request: pb.GenerateRequest) -> dict[str, Any]:
    """The request's tools as fields of a chat completion; empty if it has none. Raises InvalidInput naming the field."""
    if not request.tools:
        for field in ("tool_choice", "parallel_tool_calls"):
            if request.HasField(field) and request.tool_choice.mode != pb.ToolChoice.NONE:
                raise InvalidInput("there is no tool", field=field, fix="give `tools`, or leave it out")
        return {}
    if len(request.tools) > MOST_ENTRIES:
        raise InvalidInput(f"{len(request.tools)} tools", field="tools", fix=f"give at most {MOST_ENTRIES}")
    fields = {"tools": [_tool(tool, f"tools.{number}") for number, tool in enumerate(request.tools)]}
    fields["tool_choice"] = _choice(request.tool_choice, [tool.name for tool in request.tools])
    if request.HasField("parallel_tool_calls"):
        fields["parallel_tool_calls"] = request.parallel_tool_calls
    return fields


def _tool(tool: pb.Tool, field: str) -> dict[str, Any]:
    if not tool.name:
        raise InvalidInput("a tool without a name", field=f"{field}.name", fix="name the function")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = json_object(tool.parameters, f"{field}.parameters", "a JSON schema of type object, as JSON")
    if tool.HasField("strict"):
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: pb.ToolChoice, names: Sequence[str]) -> str | dict[str, Any]:
    if choice.WhichOneof("kind") == "function":
        if choice.function not in names:
            raise InvalidInput(
                f"no tool is named {choice.function!r}", field="tool_choice.function", fix=f"use one of {', '.join(names)}"
            )
        return {"type": "function", "function": {"name": choice.function}}
    if choice.mode not in pb.ToolChoice.Mode.values():
        modes = ", ".join(pb.ToolChoice.Mode.keys())
        raise InvalidInput(f"no mode has number {choice.mode}", field="tool_choice.mode", fix=f"use one of {modes}")
    return pb.ToolChoice.Mode.Name(choice.mode).lower()


def json_object(text: str, field: str, what: str) -> dict[str, Any]:
    """The object that is given as JSON. Raises InvalidInput for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidInput("it is no JSON object", field=field, fix=f"send {what}")
    return value
