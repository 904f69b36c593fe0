"""Anthropic's `cache_control`: which beginnings of a prompt a call asks to keep, and for how long.

https://docs.claude.com/en/docs/build-with-claude/prompt-caching: a block of a request (a tool, a block of the system prompt or
of a message) may end what is to be kept. A `cache_control` of the request itself stands at the end of its last message. vLLM's
request classes drop the field, so it is read from the request's JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.anthropic.protocol import AnthropicMessage, AnthropicMessagesRequest

from prefillshare.kvshare.errors import InvalidInput

#: Times that a call may ask for -> seconds.
TTLS_S = {"5m": 300.0, "1h": 3600.0}
MOST = 4
#: Blocks that a client cannot know the KV of: they are not laid out as they stand.
_NOT_KEPT = ("thinking", "redacted_thinking")
#: Stands behind a beginning that has no message of its own, for templates that want one.
_ANY = AnthropicMessage(role="user", content="x")


@dataclass(frozen=True)
class Breakpoint:
    """The end of a block. `part`: "tools", "system" or "messages". `number`: which of the part's. `block`: which of a message's
    content; None: all of it."""

    part: str
    number: int
    block: int | None
    ttl_s: float

    def beginning(self, request: AnthropicMessagesRequest) -> AnthropicMessagesRequest:
        """The request up to here. Up to a tool, the system prompt belongs to it: templates lay out both as one."""
        changes: dict[str, Any] = {"tool_choice": None, "messages": [_ANY]}
        if self.part == "messages":
            last = request.messages[self.number]
            if self.block is not None and not isinstance(last.content, str):
                last = last.model_copy(update={"content": last.content[: self.block + 1]})
            changes["messages"] = [*request.messages[: self.number], last]
        else:
            changes[self.part] = getattr(request, self.part)[: self.number + 1]
        return request.model_copy(update=changes)


def breakpoints(body: Mapping[str, Any]) -> list[Breakpoint]:
    """Those of a request's JSON, in the order of the prompt. Raises InvalidInput."""
    found, longest_s = [], max(TTLS_S.values())
    for part, number, block, given, field in _given(body):
        ttl_s = _ttl_s(given, field)
        if ttl_s > longest_s:
            raise InvalidInput(
                "what is kept for longer comes before what is kept for less time", field=field, fix="give it a shorter ttl"
            )
        longest_s = ttl_s
        found.append(Breakpoint(part, number, block, ttl_s))
    if len(found) > MOST:
        raise InvalidInput(f"{len(found)} blocks have it", field="cache_control", fix=f"give it to at most {MOST} blocks")
    return found


def _given(body: Mapping[str, Any]) -> Iterator[tuple[str, int, int | None, Any, str]]:
    """(part, number, block, what is given, field) of every block that has one."""
    for part in ("tools", "system"):
        for number, block in _blocks(body.get(part)):
            if given := _of(block, f"{part}.{number}"):
                yield part, number, None, *given
    messages = list(_blocks(body.get("messages")))
    for number, message in messages:
        for place, block in _blocks(message.get("content")):
            if given := _of(block, f"messages.{number}.content.{place}"):
                yield "messages", number, place, *given
    if messages and (given := body.get("cache_control")) is not None:
        yield "messages", messages[-1][0], None, given, "cache_control"


def _blocks(listed: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if isinstance(listed, list):
        yield from ((number, block) for number, block in enumerate(listed) if isinstance(block, Mapping))


def _of(block: Mapping[str, Any], where: str) -> tuple[Any, str] | None:
    given, field = block.get("cache_control"), f"{where}.cache_control"
    if given is None:
        return None
    if block.get("type") in _NOT_KEPT or (block.get("type") == "text" and not block.get("text")):
        what = "an empty text" if block.get("type") == "text" else f"a block of type {block['type']}"
        raise InvalidInput(f"{what} cannot have it", field=field, fix="give it to the block before")
    return given, field


def _ttl_s(given: Any, field: str) -> float:
    if not isinstance(given, Mapping) or given.get("type") != "ephemeral":
        raise InvalidInput("this is not of type ephemeral", field=field, fix='use {"type": "ephemeral"}, with or without a ttl')
    ttl = "5m" if given.get("ttl") is None else given["ttl"]
    if not isinstance(ttl, str) or ttl not in TTLS_S:
        raise InvalidInput(f"{str(ttl)[:32]!r} is not known", field=f"{field}.ttl", fix=f"use one of {', '.join(TTLS_S)}")
    return TTLS_S[ttl]
