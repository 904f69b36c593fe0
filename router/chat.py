"""Chat messages as token ids that extend a context, never re-tokenising what is there already.

A chat template lays out whole conversations. To append messages to a context of token ids, we lay out a small
conversation that ends in an assistant's answer with and without the new messages: the difference is what they add.
It begins with what closes an answer, which is left out where the context does not end in an open one.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvshare.errors import InvalidInput

_ASKED, _ANSWERED = "Say something.", "xyzzy"


class ChatLayout:
    """The base's chat template over its tokenizer (a transformers tokenizer)."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._prior = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def opening(self, messages: Sequence[dict[str, str]], answer: bool = True) -> list[int]:
        """A conversation from its beginning. `answer`: add the opening of the assistant's answer."""
        return self.ids(self._render(messages, answer))

    def appended(
        self, context: Sequence[int], open_response: bool, messages: Sequence[dict[str, str]], answer: bool = True
    ) -> list[int]:
        """What `messages` add to a non-empty context; see the module's text."""
        before = self._render(self._prior, False)
        after = self._render([*self._prior, *messages], answer)
        if not after.startswith(before):
            raise InvalidInput(
                "the base's chat template rewrites earlier messages when new ones come",
                field="input.messages",
                fix="append text or token ids instead",
            )
        added = self.ids(after[len(before) :])
        return self.closing(context) + added if open_response else added

    def closing(self, context: Sequence[int]) -> list[int]:
        """What ends the open answer at the end of `context`; a response that stopped by itself holds part of it."""
        before = self._render(self._prior, False)
        ids = self.ids(before[before.rindex(_ANSWERED) + len(_ANSWERED) :])
        return ids[1:] if ids and context and context[-1] == ids[0] else ids

    def _render(self, messages: Sequence[dict[str, str]], answer: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        except ValueError as error:
            raise InvalidInput(
                f"the base has no chat template: {error}", field="input.messages", fix="append text or token ids instead"
            ) from error
        except Exception as error:  # jinja's errors: the template refuses these messages
            raise InvalidInput(f"the base's chat template refuses these messages: {error}", field="input.messages") from error
