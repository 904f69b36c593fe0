"""Chat messages as token ids that extend a context, never re-tokenising what is there already.

A chat template lays out whole conversations. To append messages to a context of token ids, we lay out a small
conversation that ends in an assistant's answer with and without the new messages: the difference is what they add.
If the context ends in an open answer, what closes it is put before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefillshare.kvshare.errors import InvalidInput

_ASKED, _ANSWERED = "Say something.", "xyzzy"


class ChatLayout:
    """The base's chat template over its tokenizer (a transformers tokenizer).

    `tools`: those that the conversation begins with, as OpenAI defines them. Raises InvalidInput if the template leaves them
    out.
    """

    def __init__(self, tokenizer, tools: Sequence[dict[str, Any]] = ()):
        self._tokenizer, self._tools = tokenizer, ()
        self._prior = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
        if tools:
            without = self._render(self._prior, False)
            self._tools = tuple(tools)
            if self._render(self._prior, False) == without:
                raise InvalidInput(
                    "the base's chat template leaves `tools` out", field="tools", fix="describe them in the system message"
                )

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def opening(self, messages: Sequence[dict[str, str]], answer: bool = True) -> list[int]:
        """A conversation from its beginning. `answer`: add the opening of the assistant's answer."""
        return self.ids(self._render(messages, answer))

    def appended(
        self, context: Sequence[int], open_response: bool, messages: Sequence[dict[str, str]], answer: bool = True
    ) -> list[int]:
        """What `messages` add to a non-empty context; see the module docstring."""
        added = self.ids(self._added(messages, answer))
        return self.closing(context) + added if open_response else added

    def is_closed(self, context: Sequence[int]) -> bool:
        """Whether a context of messages ends where a message ends."""
        ids = self.ids(self._closing_text())
        return not ids or list(context[-len(ids) :]) == ids

    def closing(self, context: Sequence[int]) -> list[int]:
        """What closes the open answer at the end of `context`; a response that stopped by itself already has part of it."""
        ids = self.ids(self._closing_text())
        return ids[1:] if ids and context and context[-1] == ids[0] else ids

    def calling(self, message: dict[str, Any]) -> str:
        """The text of an answer with `tool_calls`, without the answer's opening and without what closes it."""
        text = self._answer(message)
        names = [call["function"]["name"] for call in message["tool_calls"]]
        without = self._answer({"role": message["role"], "content": message["content"]})
        if text == without or any(name not in text for name in names):
            raise InvalidInput(
                "the base's chat template leaves `tool_calls` out", field="tool_calls", fix="write the calls into `content`"
            )
        return text

    def _added(self, messages: Sequence[dict[str, str]], answer: bool) -> str:
        before = self._render(self._prior, False)
        after = self._render([*self._prior, *messages], answer)
        if not after.startswith(before):
            raise InvalidInput(
                "the base's chat template rewrites earlier messages when new ones come",
                field="input.messages",
                fix="append text or token ids instead",
            )
        return after[len(before) :]

    def _answer(self, message: dict[str, Any]) -> str:
        asked, closing = self._prior[:1], self._closing_text()
        before, after = self._render(asked, True), self._render([*asked, message], False)
        if not (after.startswith(before) and after.endswith(closing)):
            raise InvalidInput(
                "the base's chat template opens or closes an answer with tool calls otherwise than one in text",
                field="tool_calls",
                fix="write the calls into `content`",
            )
        return after[len(before) : len(after) - len(closing)]

    def _closing_text(self) -> str:
        before = self._render(self._prior, False)
        return before[before.rindex(_ANSWERED) + len(_ANSWERED) :]

    def _render(self, messages: Sequence[dict[str, str]], answer: bool) -> str:
        try:
            more = {"tools": list(self._tools)} if self._tools else {}
            return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer, **more)
        except ValueError as error:
            raise InvalidInput(
                f"the base has no chat template: {error}", field="input.messages", fix="append text or token ids instead"
            ) from error
        except Exception as error:  # jinja's errors: the template refuses these messages
            raise InvalidInput(f"the base's chat template refuses these messages: {error}", field="input.messages") from error
