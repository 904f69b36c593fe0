"""The engine that takes KV and generates.

Seam: vllm/v1/engine/async_llm.py
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing

from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from prefillshare.kvshare.decode_request import DecodeRequest
from prefillshare.kvshare.errors import (
    ContractMismatch,
    Internal,
    InvalidInput,
    PrefillShareError,
    PrefixLost,
    Unavailable,
)
from prefillshare.kvshare.handoff import Handoff, TokenChunk
from prefillshare.kvshare.layer_group import block_salt
from prefillshare.kvshare.logprobs import Logprobs
from prefillshare.kvshare_vllm.engine.engine import Engine
from prefillshare.kvshare_vllm.engine.first_word import FirstWord
from prefillshare.kvshare_vllm.transfer import params


class DecodeEngine(Engine):
    _probe_logprobs = 1  # vLLM compiles the code that ranks them

    def __init__(self, *parts):
        super().__init__(*parts)
        self._calls = FirstWord()
        if self.settings.makes_base_kv:
            self._probe_tokens = (0, 0)  # the first is a shared prefix

    async def check_rows(self) -> None:
        if self.settings.makes_base_kv:
            await self._llm.collective_rpc("check_base_kv")

    async def own_next(self, token_ids: list[int], *, adapter: str | None = None, top: int, priority: int = 0) -> Logprobs:
        """The decoder's log-probabilities for the next token over its own KV of all of `token_ids`, one row: for comparison
        with those over shared KV (modes that recompute). None of this KV is shared."""
        extra = {"kv_transfer_params": params.to_prefill_alone()}
        sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=top, detokenize=False, extra_args=extra)
        name, rows = f"own-{uuid.uuid4().hex}", None
        async for output in self._generate(token_ids, sampling, name, adapter, name, priority):
            rows = output.outputs[0].logprobs
        if not rows:
            raise Unavailable(f"request {name} ended early")
        return Logprobs.of_rows(rows)

    def check(self, handoff: Handoff) -> None:
        """Check the contract again at handoff (R4): engines may have been replaced since start-up. Raises ContractMismatch."""
        if handoff.contract != self.settings.contract:
            raise ContractMismatch(
                f"pool {self.settings.pool!r} reads KV of contract {self.settings.contract}, "
                f"the handoff was made under {handoff.contract}",
                fix="start prefill and decode pools from one deployment file",
            )

    async def decode(self, request: DecodeRequest) -> AsyncIterator[TokenChunk]:
        """Generate. Raises PrefixLost when the prefix must be handed over again; the tokens yielded so far remain valid."""
        request_id, handoff = request.request_id, request.handoff
        if not self._calls.holds(request_id, "begun"):
            raise Unavailable(f"request {request_id} was given up before it came")
        taken = False
        try:
            sampling = self._sampling(request)
            salt = block_salt(request.cache_salt, request.own_layers)
            outputs = self._generate(
                request.token_ids, sampling, request_id, request.adapter, salt, request.priority, request.trace
            )
            # Closed at once however the loop ends, which aborts the request: an error would keep its frames alive, and with
            # them `outputs`.
            async with aclosing(outputs):
                async for output in outputs:
                    taken = True
                    yield self._chunk(request, output)
        except PrefillShareError as error:
            if not taken:
                await self._release_unseen(handoff, request_id, error)
            raise

    def _chunk(self, request: DecodeRequest, output: RequestOutput) -> TokenChunk:
        """The output as a chunk. Raises the error that the output reports if the request has failed."""
        request_id, completion, told = request.request_id, output.outputs[0], params.Told(output.kv_transfer_params)
        if completion.finish_reason == "error":
            if told.refused:
                raise InvalidInput(f"the engine refused request {request_id}: {told.refused}")
            raise PrefixLost(f"request {request_id} lost its shared prefix ({told.lost_by})", reason=told.lost_by)
        if completion.finish_reason == "abort":
            raise Unavailable(f"request {request_id} was aborted by the engine")
        cost = told.cost
        return TokenChunk(
            token_ids=list(completion.token_ids),
            logprobs=Logprobs.of_rows(completion.logprobs) if completion.logprobs else None,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            kv_bytes=cost.pulled_bytes,
            local_tokens=cost.local_tokens if request.handoff else output.num_cached_tokens or 0,
            load_s=cost.load_s,
            rest_load_s=cost.rest_load_s,
            lent=self._handoff(*told.lent) if told.lent else None,
        )

    async def give_up(self, handoff: Handoff, request_id: str) -> None:
        """Called when a turn has gone whose `decode` was called or was about to be. A call that has begun ends its lease
        itself; one that has not will never begin, and the prefill engine is told that nobody will read the KV."""
        if self._calls.holds(request_id, "given up"):
            await self.release(handoff, request_id)

    def _sampling(self, request: DecodeRequest) -> SamplingParams:
        """The turn's sampling parameters, with what the engine's scheduler and connector need to know."""
        self._check_handoff(request)
        transfer = request.handoff.transfer if request.handoff else None
        own = {"own_layers": request.own_layers, "own_tokens": request.own_tokens}
        ask = params.to_read(transfer, replay=request.replay, lend=request.lend, **own)
        sampling = request.sampling.clone()
        sampling.extra_args = {**(sampling.extra_args or {}), "kv_transfer_params": ask}
        sampling.output_kind, sampling.detokenize, sampling.stop = RequestOutputKind.DELTA, False, []
        return sampling

    def _check_handoff(self, request: DecodeRequest) -> None:
        """Check that the handoff covers the shared prefix, under our contract. Raises Internal or ContractMismatch."""
        handoff = request.handoff
        expected = self.mode.handoff_tokens(len(request.token_ids) - request.replay, request.replay, request.own_tokens)
        if handoff is None:
            if expected > 0 and not self.settings.makes_base_kv:
                raise Internal(f"a prompt with {expected} shared tokens came without a handoff (R1)")
            return
        self.check(handoff)
        if handoff.tokens != expected:
            raise Internal(f"handoff of {handoff.tokens} tokens for a shared prefix of {expected}")
