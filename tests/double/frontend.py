"""In the place of Frontend: turns without text. Tokens pass through as the orchestrator gives them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace

from char_tokenizer import Tokenizer

from kvshare.caller import cache_salt
from kvshare.handoff import TurnContext
from kvshare_vllm.surface.text_work import TextWork
from router.turn.orchestrator import Orchestrator

VOCABULARY, LENGTH = 256, 4096


class Frontend:
    def __init__(self, orchestrator: Orchestrator):
        self._orchestrator = orchestrator
        self.renderer = SimpleNamespace(tokenizer=Tokenizer())
        self.text = TextWork(LENGTH, 1)
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)

    def prepare(self, prompt, sampling, request_id: str, decoder: str) -> SimpleNamespace:
        self._orchestrator.admit(decoder)
        return SimpleNamespace(prompt=list(prompt["prompt_token_ids"]), sampling=sampling, request_id=request_id)

    async def run(self, request: SimpleNamespace, decoder: str, context: TurnContext) -> AsyncIterator[SimpleNamespace]:
        context.cache_salt = cache_salt(context.cache_domain, None)
        turn = self._orchestrator.run(decoder, request.prompt, request.sampling, request.request_id, context)
        async with aclosing(turn) as chunks:
            async for chunk in chunks:
                completion = SimpleNamespace(
                    text="", token_ids=chunk.token_ids, logprobs=None, stop_reason=None, finish_reason=chunk.finish_reason
                )
                yield SimpleNamespace(outputs=[completion])

    def close(self) -> None:
        self.text.close()
