"""A call's chat messages behind a context, with what is the calling agent's own apart from what all agents share.

Agents that take turns over one context differ in their system prompt and their tools, which chat templates put before all
messages: then nothing behind them could be shared. So the agent's own part is laid out behind the context, right before the
answer, as a suffix that is no part of the context (PrefillShare: a decoder's own suffix of the prompt). While the same agent
takes turn after turn, as it does when it calls tools, its part stays where its first turn has put it, and is computed once:

    shared context | own part of A | answer of A, result of its call, answer of A       all of it is A's prompt at its next turn
    shared context                 | answer of A, result of its call, answer of A | own part of B                   that of B

So the KV that the next turn needs depends on who takes it. It is made ahead behind the agent's part while one agent takes turn
after turn. Where several have taken turns in the context, it is made behind the shared context when an agent answers without a
call, since then another one may be next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.http_turn import Render
from prefillshare.router.sessions.base import OwnPart, Session
from prefillshare.router.sessions.chat import ChatLayout
from prefillshare.router.sessions.context_turn import LaidOut

Messages = Sequence[Mapping[str, Any]]

#: Roles of an agent's own messages, where they come first.
OWN_ROLES = ("system", "developer")


def apart(messages: Messages) -> tuple[Messages, Messages]:
    """(the agent's own messages, the others)."""
    own = next((number for number, message in enumerate(messages) if message["role"] not in OWN_ROLES), len(messages))
    return messages[:own], messages[own:]


def as_message(tools: Messages | None) -> list[dict[str, Any]]:
    """Tools that a context begins with, as a part of what it says."""
    return [{"role": "tools", "content": json.dumps(tools, sort_keys=True, default=str)}] if tools else []


class AgentLayout(ChatLayout):
    """The base's chat template with one call's settings. `tools`: those laid out where the template puts them."""

    def __init__(self, tokenizer, render: Render, tools: Messages | None = None):
        super().__init__(tokenizer)
        self._lay_out, self._bos = render, tokenizer.bos_token or ""
        self._tools_first = tools

    def behind(
        self, session: Session, new: Messages, own: Messages = (), tools: Messages | None = None, last: Messages = ()
    ) -> tuple[LaidOut, OwnPart | None]:
        """`new` behind the session's context, which may be empty, with the agent's own messages and tools where they belong.
        `last`: messages that are seen right before the answer, and do not stay."""
        context, is_open = session.token_ids, session.open_response
        after, text = self.added(context, is_open, new, True), self._own_part(own, tools)
        if not text and not last:
            return LaidOut(after, after), None
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        own_ids, place = self.ids(text), session.own
        stays = bool(text) and place is not None and place.digest == digest and place.tokens <= len(context)
        said = self.added(context, is_open, new) if last or not stays else after
        before = said[: place.tokens] if stays else said
        several = place is not None and (place.several or place.digest != digest)
        part = OwnPart(len(before), digest, several) if text else None
        if last:
            return LaidOut(after, before + own_ids + said[len(before) :] + self.ids(self._added(last, True))), part
        if before != after[: len(before)]:  # the answer's opening begins inside a token: there is no place between tokens
            return LaidOut(after, before + self.ids(text + self._answer_opening())), None
        return LaidOut(after, before + own_ids + after[len(before) :], stays, several), part

    def added(self, context: Sequence[int], open_response: bool, new: Messages, answer: bool = False) -> list[int]:
        """The context with `new` behind it. `answer`: add the opening of the assistant's answer."""
        new_ids = self.appended(context, open_response, new, answer) if context else self.opening(new, answer)
        return [*context, *new_ids]

    def _own_part(self, own: Messages, tools: Messages | None) -> str:
        """Text of the agent's own messages and tools as they are laid out before a conversation; "" if there are none."""
        if not own and (not tools or self._begun(own, tools) == self._begun(own, None)):
            return ""
        text, tail = self._begun(own, tools), self._asking(False)
        if not text.endswith(tail):
            raise InvalidInput(
                "the base's chat template does not put `tools` before the first message, so they cannot stand behind a context",
                field="tools",
                fix="set router.own_prompt to first, or change the template",
            )
        # What begins a conversation only; some models' BOS token begins each message.
        once = "" if tail.startswith(self._bos) else self._bos
        return text[: -len(tail)].removeprefix(once)

    def _begun(self, own: Messages, tools: Messages | None) -> str:
        return self._lay_out([*own, self._prior[0]], False, tools)

    def _asking(self, answer: bool) -> str:
        """What one more question adds to a conversation."""
        return self._render([*self._prior, self._prior[0]], answer)[len(self._render(self._prior, False)) :]

    def _answer_opening(self) -> str:
        return self._asking(True)[len(self._asking(False)) :]

    def _render(self, messages: Messages, answer: bool) -> str:
        return self._lay_out(messages, answer, self._tools_first)
