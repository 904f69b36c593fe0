"""Stands in for Frontend: turns without text. Tokens pass through as the orchestrator gives them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace

from char_tokenizer import Chats, Tokenizer

from prefillshare.kvshare.caller import Caller
from prefillshare.kvshare_vllm.surface.text_work import TextWork
from prefillshare.kvshare_vllm.surface.turn_call import RunningTurn, TurnCall
from prefillshare.router.turn.orchestrator import Orchestrator

VOCABULARY, LENGTH = 256, 4096


class Frontend:
    def __init__(self, orchestrator: Orchestrator):
        self._orchestrator = orchestrator
        self.renderer = SimpleNamespace(tokenizer=Tokenizer())
        self.chats = Chats(self.renderer.tokenizer)
        self.text = TextWork(LENGTH, 1)
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)

    def prepare(self, prompt, sampling, request_id: str, decoder: str) -> SimpleNamespace:
        self._orchestrator.admit(decoder)
        given = list(prompt["prompt_token_ids"])
        return SimpleNamespace(prompt_token_ids=given, sampling_params=sampling, request_id=request_id)

    def run(self, request: SimpleNamespace, decoder: str, caller: Caller, *, terms: object = None) -> Run:
        call = TurnCall(decoder, request.prompt_token_ids, request.sampling_params, request.request_id, caller, terms=terms)
        return Run(self._orchestrator.turn(call))

    def close(self) -> None:
        self.text.close()


class Run:
    def __init__(self, turn: RunningTurn):
        self.turns = [turn]

    async def outputs(self) -> AsyncIterator[SimpleNamespace]:
        async with aclosing(self.turns[0].chunks()) as chunks:
            async for chunk in chunks:
                told = {"token_ids": chunk.token_ids, "finish_reason": chunk.finish_reason}
                completion = SimpleNamespace(index=0, text="", logprobs=None, stop_reason=None, **told)
                yield SimpleNamespace(outputs=[completion])
