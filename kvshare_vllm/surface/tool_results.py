"""A whole history's tool results name the calls that they answer, in the shape in which each surface's clients send them.

A client may have put its history together in its own way: a call may have several results, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prefillshare.kvshare.errors import InvalidInput

#: What a message says of calls, in its order: (whether it is a result, the call's id, field of that id within the message).
Said = Iterator[tuple[bool, Any, str]]
Reader = Callable[[Mapping[str, Any]], Said]


def of_openai(message: Mapping[str, Any]) -> Said:
    """Of a message of a chat completion."""
    for call in _objects(message.get("tool_calls")):
        yield False, call.get("id"), "tool_calls"
    if message.get("role") == "tool":
        yield True, message.get("tool_call_id"), "tool_call_id"


def of_anthropic(message: Mapping[str, Any]) -> Said:
    """Of a message of the Messages API."""
    content = message.get("content")
    for number, block in enumerate(content if isinstance(content, list) else ()):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use":
            yield False, block.get("id"), ""
        elif kind == "tool_result":
            yield True, block.get("tool_use_id"), f"content.{number}.tool_use_id"


def of_response(item: Mapping[str, Any]) -> Said:
    """Of an item of the Responses API."""
    if item.get("type") in ("function_call", "custom_tool_call"):
        yield False, item.get("call_id"), ""
    elif item.get("type") in ("function_call_output", "custom_tool_call_output"):
        yield True, item.get("call_id"), "call_id"


def check_results(messages: Sequence[Any], field: str, said: Reader) -> None:
    """`field`: that of the messages. Raises InvalidInput for a result that answers no call before it."""
    calls: set[str] = set()
    for number, message in enumerate(messages):
        for is_result, call, place in said(message) if isinstance(message, dict) else ():
            if not is_result:
                calls |= {call} if isinstance(call, str) else set()
                continue
            where = f"{field}.{number}.{place}"
            if not call:
                raise InvalidInput("a tool's result without the id of its call", field=where, fix="give the id of the call")
            if not isinstance(call, str) or call not in calls:
                raise InvalidInput(
                    f"no message before it calls a tool as {str(call)[:128]!r}",
                    field=where,
                    fix="send the assistant's message with the call, too, and its id",
                )


def _objects(listed: Any) -> Iterator[Mapping[str, Any]]:
    yield from (one for one in (listed if isinstance(listed, list) else ()) if isinstance(one, dict))
