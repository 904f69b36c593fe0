"""What a context says as chat messages, as far as is needed to know whether a later call's messages begin with it.

A client that keeps no session sends its whole history with every call. If that history begins with the messages of a context,
only the rest needs to be laid out and tokenised. A transcript keeps the number of messages and a digest of them, not the
messages themselves.

Two messages count as equal if role, text and tool calls are: their ids, and what clients add or leave out (names of fields
without a value, reasoning that an earlier answer contained), make no difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Transcript:
    """`count` messages whose digest is `digest`; by default that of an empty context. `first`: the digest of the first one; ""
    if it is not known."""

    count: int = 0
    digest: str = ""
    first: str = field(default="", compare=False)

    def with_messages(self, messages: Sequence[Mapping[str, Any]]) -> Transcript:
        """The transcript of the context with these messages behind it."""
        digest, first = self.digest, self.first
        for number, message in enumerate(messages, self.count):
            digest = hashlib.sha256((digest + _essence(message)).encode("utf-8", "surrogatepass")).hexdigest()
            first = first if number else digest
        return Transcript(self.count + len(messages), digest, first)

    def begins(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these messages begin with the context's."""
        return len(messages) >= self.count and Transcript().with_messages(messages[: self.count]) == self

    def __str__(self) -> str:
        """For a store; `parsed` is the inverse."""
        return f"{self.count}:{self.digest}" + (f":{self.first}" if self.first else "")

    @classmethod
    def parsed(cls, written: str) -> Transcript | None:
        """None for what `__str__` has not written, "" included: the context does not consist of messages."""
        count, colon, digests = written.partition(":")
        digest, _, first = digests.partition(":")
        if not colon or not count.isascii() or not count.isdigit() or {len(digest), len(first)} - {0, 64}:
            return None
        return cls(int(count), digest, first)


def _essence(message: Mapping[str, Any]) -> str:
    calls = [_call(call.get("function") or {}) for call in message.get("tool_calls") or ()]
    return json.dumps([message.get("role"), message.get("name") or "", _text(message.get("content")), calls])


def _text(content: Any) -> str:
    """The text of a message, whether it is given as a string or in parts. Parts without text are kept as they are."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part.get("text") if isinstance(part, Mapping) and "text" in part else part for part in content]
    return "\n".join(part if isinstance(part, str) else json.dumps(part, sort_keys=True, default=str) for part in parts)


def _call(function: Mapping[str, Any]) -> list[str]:
    """Name and arguments of a tool call; arguments that are equal as JSON are equal. What is no JSON object counts as an empty
    one, which vLLM makes of it when a client sends it back (_postprocess_messages of vllm/renderers/chat_utils.py)."""
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = {}
    return [str(function.get("name")), json.dumps(arguments if isinstance(arguments, Mapping) else {}, sort_keys=True)]
