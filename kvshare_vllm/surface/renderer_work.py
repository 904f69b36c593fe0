"""Where a renderer of vLLM's does its work: among a router's texts (text_work.py), and as the turn that is bound to the request
being served has it (http_turn.py).

Seam: vllm/renderers/{base,hf}.py (_tokenize_prompt_async, _async_tokenizer_decode, _apply_chat_template_async)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from vllm.renderers.hf import safe_apply_chat_template

from prefillshare.kvshare.errors import PrefillShareError
from prefillshare.kvshare_vllm.surface.http_turn import Conversation, bound_turn
from prefillshare.kvshare_vllm.surface.text_work import TextWork, chars_of

T = TypeVar("T")

#: Characters that are counted for a token that becomes text.
CHARS_PER_TOKEN = 4


class RendererWork:
    """`as_http`: turns our errors into those that vLLM's server knows."""

    def __init__(self, text: TextWork, renderer, as_http: Callable[[PrefillShareError], Exception]):
        self._text, self._renderer, self._as_http = text, renderer, as_http

    def take_over(self) -> None:
        """From now on the renderer does its work here."""
        renderer = self._renderer
        renderer._tokenize_prompt_async, renderer._async_tokenizer_decode = self._tokenize, self._decode
        if hasattr(renderer, "_apply_chat_template_async"):
            renderer._apply_chat_template_async = self._lay_out

    async def _tokenize(self, prompt, params):
        return await self._run(len(prompt["prompt"]), "prompt", partial(self._renderer._tokenize_prompt, prompt, params))

    async def _decode(self, token_ids, *args, **kwargs):
        work = partial(self._renderer._decode, token_ids, *args, **kwargs)
        return await self._run(CHARS_PER_TOKEN * len(token_ids), None, work)

    async def _lay_out(self, model_config, tokenizer, messages, **kwargs):
        chars = chars_of(messages) + chars_of(kwargs.get("tools"))

        def apply(messages, **more):
            return safe_apply_chat_template(model_config, tokenizer, messages, **kwargs | more)

        def render(messages, answer, tools):
            how = {"tokenize": False, "add_generation_prompt": answer, "continue_final_message": False}
            return apply(list(messages), tools=tools, **how)

        async def plain():
            return await self._run(chars, "messages", partial(apply, messages))

        if not (turn := bound_turn()):
            return await plain()
        continues = not kwargs.get("add_generation_prompt", True) or kwargs.get("continue_final_message", False)
        conversation = Conversation(messages, kwargs.get("tools"), continues, render, chars)
        try:
            return await turn.lay_out(conversation, plain)
        except PrefillShareError as error:
            raise self._as_http(error) from error

    async def _run(self, chars: int, field: str | None, work: Callable[[], T]) -> T:
        try:
            if field:
                self._text.check_chars(chars, field)
            return await self._text.run(chars, work)
        except PrefillShareError as error:
            raise self._as_http(error) from error
