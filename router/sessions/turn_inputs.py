"""What a turn over gRPC is given, as token ids behind its session's context; the context is not tokenised again.

What is kept is the context, the input, and the opening of the answer. The decoder's own part, its tools and its suffix, is seen
between input and answer and is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.frontend import Frontend
from prefillshare.kvshare_vllm.surface.roles import check_role
from prefillshare.kvshare_vllm.surface.text_work import chars_of
from prefillshare.router.sessions.agent_layout import AgentLayout, apart, as_message
from prefillshare.router.sessions.base import Session
from prefillshare.router.sessions.context_turn import LaidOut
from prefillshare.router.sessions.open_calls import left_open
from prefillshare.router.sessions.transcript import Transcript

#: None, ("messages", [{"role", "content", ...}]), ("text", str) or ("token_ids", [int]).
TurnInput = tuple[str, Any] | None
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Begun:
    """A turn before its response. `transcript`, `calls`: what the kept part says, as of Session. `opened`: it ends in the
    opening of an answer."""

    laid_out: LaidOut
    transcript: Transcript | None
    calls: tuple[str, ...] | None
    opened: bool


class TurnInputs:
    """`own_first`: whether router.own_prompt is "first"."""

    def __init__(self, base: Base, frontend: Frontend, own_first: bool = False):
        self._frontend, self._max_len, self._own_first = frontend, base.max_model_len, own_first
        self._tokenizer, self._render = frontend.renderer.tokenizer, frontend.chats.render
        self._layout = AgentLayout(self._tokenizer, self._render)
        self.vocab_size = frontend.model_config.get_vocab_size()

    async def beginning(self, given: TurnInput) -> Session:
        """A session without a name, whose context is what is given."""
        messages = _messages(given)
        ids = await self._ids(self._layout, (), False, given, answer=False, field="input")
        if given and messages is None:
            return Session("", token_ids=tuple(ids))
        messages = messages or []
        calls = left_open((), messages, "input.messages")
        return Session("", token_ids=tuple(ids), transcript=Transcript().with_messages(messages), calls=calls)

    def is_closed(self, session: Session, tokens: int) -> bool:
        """Whether the session's context, cut off after so many tokens, leaves no message open."""
        is_chat = session.open_response or session.transcript is not None
        return not tokens or not is_chat or self._layout.is_closed(session.token_ids[:tokens])

    async def lay_out(self, session: Session, given: TurnInput, suffix: TurnInput, tools: Tools | None) -> Begun:
        """Raises InvalidInput."""
        context, is_open = list(session.token_ids), session.open_response
        messages, said, first = _messages(given), session.transcript, []
        if messages is not None:
            self._check_messages(messages, "input")
        calls = left_open(session.calls, messages or (), "input.messages")
        layout = self._layout
        if tools and self._own_first:
            first = self._first(session, messages, tools)
            layout, tools = AgentLayout(self._tokenizer, self._render, tools if first else None), None
        asks = suffix is not None and suffix[0] == "messages"
        kept = context + await self._ids(layout, context, is_open, given, answer=True, field="input")
        if given is None and context and (asks or tools):
            kept = context + layout.appended(context, is_open, (), True)
        opened = messages is not None or (given is None and (asks or bool(tools)))
        if said is not None:
            said = said.with_messages([*first, *(messages or ())]) if opened and (context or messages) else None
        seen = kept
        if asks or tools:
            before = context + await self._ids(layout, context, is_open, given, answer=False, field="input")
            still_open = is_open and given is None
            seen = before + await self._own_part(layout, before, still_open, suffix if asks else None, tools)
        if suffix is not None and not asks:
            seen = seen + await self._ids(layout, seen, False, suffix, answer=True, field="suffix")
        return Begun(LaidOut(kept, seen), said, calls, opened)

    def _first(self, session: Session, messages: Sequence | None, tools: Tools) -> list[dict[str, Any]]:
        """For tools that stand before everything else: what the context says first. Empty if it begins with them already."""
        first = as_message(tools)
        if not session.token_ids:
            if messages is None:
                raise InvalidInput(
                    "tools are laid out before the first messages here (router.own_prompt), and there is none",
                    field="tools",
                    fix="give `input.messages`",
                )
            return first
        if session.transcript is None or session.transcript.first != Transcript().with_messages(first).digest:
            raise InvalidInput(
                "the session has not begun with these tools, and they stand before everything else here (router.own_prompt)",
                field="tools",
                fix="send those of its first turn, begin a session, or set router.own_prompt to behind",
            )
        return []

    async def _own_part(
        self, layout: AgentLayout, before: list[int], still_open: bool, suffix: TurnInput, tools: Tools | None
    ) -> list[int]:
        """Suffix messages and tools, with the answer's opening."""
        if not tools:
            return await self._ids(layout, before, still_open, suffix, answer=True, field="suffix")
        messages = _messages(suffix) or []
        if suffix:
            self._check_messages(messages, "suffix")
        own, others = apart(messages)
        chars = chars_of(messages) + chars_of(tools)
        self._frontend.text.check_chars(chars, "tools")

        def work() -> list[int]:
            if not before:
                return layout.ids(self._render([*own, *others], True, tools)) if messages else []
            closing = layout.closing(before) if still_open else []
            return closing + layout.asking(own, tools, others)

        ids = await self._frontend.text.run(chars, work)
        if not ids:
            raise InvalidInput("the context is empty and the turn appends nothing", field="input", fix="append something")
        return ids

    async def _ids(
        self, layout: AgentLayout, context, open_response: bool, given: TurnInput, *, answer: bool, field: str
    ) -> list[int]:
        if given is None:
            return []
        kind, value = given
        if kind == "token_ids":
            return self._checked_ids(value, f"{field}.token_ids")
        text = self._frontend.text
        chars = chars_of(value)
        text.check_chars(chars, f"{field}.{kind}")
        if kind == "text":
            return await text.run(chars, lambda: layout.ids(value))
        self._check_messages(value, field)
        if not context:
            return await text.run(chars, lambda: layout.opening(value, answer))
        return await text.run(chars, lambda: layout.appended(context, open_response, value, answer))

    def _checked_ids(self, given: list[int], field: str) -> list[int]:
        if len(given) > self._max_len:
            raise InvalidInput(
                f"{len(given)} token ids are more than the model's length of {self._max_len}",
                field=field,
                fix="send fewer, or raise base.max_model_len",
            )
        for position, token in enumerate(given):
            if not 0 <= token < self.vocab_size:
                raise InvalidInput(
                    f"token id {token} at position {position} is out of range",
                    field=field,
                    fix=f"use ids from 0 to {self.vocab_size - 1}",
                )
        return list(given)

    def _check_messages(self, messages: Sequence[Mapping[str, Any]], field: str) -> None:
        if not messages:
            raise InvalidInput("no message is given", field=f"{field}.messages", fix="give at least one, or leave it out")
        for number, message in enumerate(messages):
            check_role(message["role"], f"{field}.messages.{number}")


def _messages(given: TurnInput) -> Sequence[Mapping[str, Any]] | None:
    return given[1] if given and given[0] == "messages" else None
