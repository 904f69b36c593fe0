"""The responses of one turn while they stream: what is new of each, for the surface, and what it says, for the session."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from prefillshare.kvshare.usage import TurnUsage
from prefillshare.kvshare_vllm.sampling import logprob_rows
from prefillshare.kvshare_vllm.surface.chats import Answer, ToolCall, ToolCallDelta
from prefillshare.router.sessions.base import Session
from prefillshare.router.sessions.turn_inputs import Begun


@dataclass(frozen=True)
class TurnEvent:
    """New text and tokens. The last one of a response has `finish_reason`, the context's new length and its number of turns,
    what the turn cost, and all tool calls. `index`: which of several responses it is a part of."""

    text: str
    token_ids: list[int]
    logprobs: list[list[tuple[int, float, int]]] | None = None
    finish_reason: str | None = None
    context_tokens: int = 0
    usage: TurnUsage | None = None
    index: int = 0
    tool_call_deltas: Sequence[ToolCallDelta] = ()
    tool_calls: Sequence[ToolCall] = ()
    turns: int = 0


class Responses:
    """`answers`: one per response. `has_ranks`: log-probabilities are of the likeliest tokens, whose ranks engines tell."""

    def __init__(self, session: Session, begun: Begun, answers: Sequence[Answer], has_ranks: bool = True):
        self.session, self.begun, self.answers, self._has_ranks = session, begun, answers, has_ranks
        self._news: list[tuple] = []

    def read(self, output) -> None:
        """Called with each of vLLM's outputs, before `events`."""
        seen = self.begun.laid_out.seen
        self._news = [(part, *self.answers[part.index].read(part, seen)) for part in output.outputs]

    async def all_read(self, outputs: AsyncIterator) -> AsyncIterator:
        async with aclosing(outputs):
            async for output in outputs:
                self.read(output)
                yield output

    def events(self, usages: Sequence[TurnUsage]) -> Iterator[TurnEvent]:
        """What the last output tells. `usages`: by response."""
        for part, text, pieces in self._news:
            answer, last = self.answers[part.index], {}
            if part.finish_reason:
                last = {
                    "finish_reason": answer.finish_reason(part.finish_reason),
                    "context_tokens": len(self.session.token_ids),
                    "usage": usages[part.index],
                    "tool_calls": list(answer.calls.values()),
                    "turns": self.session.turns,
                }
            rows = logprob_rows(part)
            if rows and not self._has_ranks:
                rows = [[first, *((token, value, 0) for token, value, _ in others)] for first, *others in rows]
            yield TurnEvent(text, list(part.token_ids), rows, index=part.index, tool_call_deltas=pieces, **last)
