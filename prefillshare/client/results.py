"""What a turn gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from prefillshare.kvshare import errors
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

_SHOWN_CHARS = 60


@dataclass(frozen=True)
class ToolCall:
    """`arguments`: JSON; a part of it if the response was cut off."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, repr=False)
class TurnResult:
    """A complete response. `logprobs`: those of the generated tokens, one per token, if asked for. `index`: which of several
    responses of one turn it is. `turns`: how many turns the session has had with this one; 0 if the server does not say."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    context_tokens: int
    usage: pb.Usage
    tool_calls: list[ToolCall] = field(default_factory=list)
    index: int = 0
    turns: int = 0

    @property
    def message(self) -> dict[str, Any]:
        """The response as a message, for a context that does not hold it yet."""
        calls = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in self.tool_calls]
        return {"role": "assistant", "content": self.text} | ({"tool_calls": calls} if calls else {})

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN_CHARS else f"{self.text[:_SHOWN_CHARS]}..."
        parts = [repr(text), f"finish_reason={self.finish_reason!r}"]
        if self.tool_calls:
            parts.append(f"tool_calls={self.tool_calls!r}")
        parts += [f"tokens={len(self.token_ids)}", f"prompt_tokens={self.usage.prompt_tokens}"]
        parts += [f"cached_tokens={self.usage.cached_tokens}", f"context_tokens={self.context_tokens}"]
        return f"TurnResult({', '.join(parts)})"


class Collected:
    """The responses of a turn, put together from the pieces of its stream."""

    def __init__(self) -> None:
        self._parts: dict[int, _Part] = {}

    def add(self, piece: pb.GenerateResponse) -> str:
        """Returns the text so far of the response that the piece is a part of."""
        part = self._parts.setdefault(piece.index, _Part())
        part.text += piece.text
        part.token_ids += piece.token_ids
        part.logprobs += [row.entries[0].logprob for row in piece.logprobs]
        if piece.HasField("done"):
            part.done, part.has_ended = piece.done, True
        return part.text

    def results(self) -> list[TurnResult]:
        """By index. Raises ConnectionLost if the stream has ended before all responses had."""
        if not self._parts or not all(part.has_ended for part in self._parts.values()):
            raise errors.ConnectionLost(
                "the server ended the stream without a result", fix="check whether the session has grown"
            )
        return [self._parts[index].result(index) for index in sorted(self._parts)]


@dataclass
class _Part:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: pb.Done = field(default_factory=pb.Done)
    has_ended: bool = False

    def result(self, index: int) -> TurnResult:
        done = self.done
        calls = [ToolCall(call.id, call.name, call.arguments) for call in done.tool_calls]
        told = (done.finish_reason, done.context_tokens, done.usage)
        return TurnResult(self.text, self.token_ids, self.logprobs, *told, calls, index, done.turns)


def collect(pieces: Iterable[pb.GenerateResponse], seen: Callable[[str], None] = lambda text: None) -> TurnResult:
    """Collect a streamed turn. `seen` is called with the text so far after every piece."""
    collected = Collected()
    for piece in pieces:
        seen(collected.add(piece))
    return collected.results()[0]
