"""What a turn over gRPC is given, as token ids behind its session's context; the context is not tokenised again.

The context, the input and the opening of the answer stay in the context. What is the decoder's own is seen and does not: its
tools and the first system messages of its suffix (router/sessions/agent_layout.py), and before the answer the suffix's rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.frontend import Frontend
from prefillshare.kvshare_vllm.surface.roles import check_role
from prefillshare.kvshare_vllm.surface.text_work import chars_of
from prefillshare.router.sessions.agent_layout import AgentLayout, Messages, apart, as_message
from prefillshare.router.sessions.base import OwnPart, Session
from prefillshare.router.sessions.context_turn import LaidOut
from prefillshare.router.sessions.transcript import Transcript
from prefillshare.router.sessions.unanswered import left_unanswered

#: None, ("messages", [{"role", "content", ...}]), ("text", str) or ("token_ids", [int]).
TurnInput = tuple[str, Any] | None
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Begun:
    """A turn before its response. `transcript`, `unanswered`: what its context says, as of Session. `opened`: it ends in the
    opening of an answer. `own`: where the decoder's own part stands, if a next turn may find it there."""

    laid_out: LaidOut
    transcript: Transcript | None
    unanswered: tuple[str, ...] | None
    opened: bool
    own: OwnPart | None = None


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
        if messages is None:
            ids = tuple(await self._ids(given, "input"))
            return Session("", token_ids=ids) if given else Session("", transcript=Transcript(), unanswered=())
        chars = chars_of(messages)
        self._frontend.text.check_chars(chars, "input.messages")
        self._check_messages(messages, "input")
        waiting = left_unanswered((), messages, "input.messages")
        ids = await self._frontend.text.run(chars, lambda: self._layout.opening(messages, False))
        return Session("", token_ids=tuple(ids), transcript=Transcript().with_messages(messages), unanswered=waiting)

    def is_closed(self, session: Session, tokens: int) -> bool:
        """Whether the session's context, cut off after so many tokens, leaves no message open."""
        is_chat = session.open_response or session.transcript is not None
        return not tokens or not is_chat or self._layout.is_closed(session.token_ids[:tokens])

    async def lay_out(self, session: Session, given: TurnInput, suffix: TurnInput, tools: Tools | None) -> Begun:
        """Raises InvalidInput."""
        messages, said, first = _messages(given), session.transcript, []
        asked = _messages(suffix)
        for what, field in ((messages, "input"), (asked, "suffix")):
            if what is not None:
                self._check_messages(what, field)
        waiting = left_unanswered(session.unanswered, messages or (), "input.messages")
        layout = self._layout
        if tools and self._own_first:
            first = self._first(session, messages, tools)
            layout, tools = AgentLayout(self._tokenizer, self._render, tools if first else None), None
        opened = messages is not None or (given is None and bool(asked or tools))
        if said is not None:
            said = said.with_messages([*first, *(messages or ())]) if opened and (session.token_ids or messages) else None
        if asked or tools or opened:
            laid_out, own = await self._with_own_part(layout, session, given, asked or (), tools)
        else:
            context = [*session.token_ids, *await self._ids(given, "input")]
            laid_out, own = LaidOut(context, context), None
        if suffix is not None and asked is None:
            laid_out = replace(laid_out, seen=laid_out.seen + await self._ids(suffix, "suffix"), goes_on=False)
            own = None
        return Begun(laid_out, said, waiting, opened, own)

    async def _with_own_part(
        self, layout: AgentLayout, session: Session, given: TurnInput, suffix: Messages, tools: Tools | None
    ) -> tuple[LaidOut, OwnPart | None]:
        """A turn that asks for an answer by messages or tools. `given`: text and token ids go on before them, and stay as they
        are; no answer is opened behind them in the context."""
        new, (own, last) = _messages(given) or (), apart(suffix)
        if given is not None and not new:
            ids = [*session.token_ids, *await self._ids(given, "input")]
            session = replace(session, token_ids=tuple(ids), open_response=False)
        chars = 0
        for what, field in ((new, "input.messages"), (suffix, "suffix.messages"), (tools or (), "tools")):
            self._frontend.text.check_chars(chars_of(what), field)
            chars += chars_of(what)

        def work() -> tuple[LaidOut, OwnPart | None]:
            if not session.token_ids and not new:
                begun = layout.ids(self._render([*own, *last], True, tools)) if suffix else []
                return LaidOut([], begun), None
            return layout.behind(session, new, own, tools, last)

        laid_out, part = await self._frontend.text.run(chars, work)
        if given is not None and not new:
            return replace(laid_out, context=list(session.token_ids), goes_on=False), None
        return laid_out, None if last else part

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

    async def _ids(self, given: TurnInput, field: str) -> list[int]:
        """Of text or token ids, as they stand."""
        if given is None:
            return []
        kind, value = given
        if kind == "token_ids":
            return self._checked_ids(value, f"{field}.token_ids")
        self._frontend.text.check_chars(len(value), f"{field}.{kind}")
        return await self._frontend.text.run(len(value), lambda: self._layout.ids(value))

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
