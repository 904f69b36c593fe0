"""A line of training data: what it may hold. Unknown keys are refused, so that nothing a user wrote is ignored."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from prefillshare.kvshare.config.errors import as_config_error, shown
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.yaml_tree import Node


class Function(Node):
    """What a tool does, as vLLM's server hands it to a chat template (FunctionDefinition)."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Node):
    type: Literal["function"] = "function"
    function: Function

    def for_template(self) -> dict[str, Any]:
        function = self.function.model_dump()
        if self.function.strict is None:
            del function["strict"]
        return {"type": self.type, "function": function}


class CalledFunction(Node):
    name: str = Field(min_length=1)
    arguments: dict[str, Any]

    @field_validator("arguments", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        """OpenAI's JSON text as the object that chat templates want."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value or "{}")
        except ValueError:
            raise ValueError(f"{value!r} is not JSON") from None


class ToolCall(Node):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Node):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    weight: Literal[0, 1] | None = None
    """0: context. 1, or unset: to be learnt."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content should be text, got nothing; only an assistant's message with tool_calls needs none")
        for key, role in (("weight", "assistant"), ("tool_calls", "assistant"), ("tool_call_id", "tool"), ("name", "tool")):
            if getattr(self, key) not in (None, ()) and self.role != role:
                raise ValueError(f"`{key}` goes with the role {role}, not with {self.role}; remove it")
        if self.is_learnt and not self.content and not self.tool_calls:
            raise ValueError("an answer without content: nothing but its end would be learnt; give it some, or weight 0")
        return self

    @property
    def is_learnt(self) -> bool:
        return self.role == "assistant" and self.weight != 0

    def for_template(self) -> dict[str, Any]:
        """The message as vLLM's server hands it to a chat template: without keys that are not given, always with content."""
        more = {key: getattr(self, key) for key in ("tool_call_id", "name") if getattr(self, key) is not None}
        if self.tool_calls:
            more["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return {"role": self.role, "content": self.content or "", **more}


class Chat(Node):
    messages: tuple[Message, ...] = Field(min_length=1)
    tools: tuple[Tool, ...] = ()

    @model_validator(mode="after")
    def _has_something_to_learn(self) -> Chat:
        if self.messages[0].role == "assistant":
            raise ValueError("an assistant message follows no other")
        if not any(message.is_learnt for message in self.messages):
            raise ValueError("no assistant message to be learnt")
        return self


class Text(Node):
    prompt: str = Field(min_length=1)
    response: str = Field(min_length=1)


def parse(line: str) -> Chat | Text:
    """Raises ConfigError that names the key, but not the line."""
    try:
        data = json.loads(line, object_pairs_hook=_without_repeated_keys)
    except ValueError as error:
        raise ConfigError(f"no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"should be an object, got {shown(data)}")
    kind = Text if "prompt" in data or "response" in data else Chat
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise as_config_error(error, kind) from None


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if again := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"key {again[0]!r} is given twice")
    return dict(pairs)
