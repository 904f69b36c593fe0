"""A prepared request while it runs: the turns that it takes, and the outputs that its client sees.

Each turn's tokens go through vLLM's output processor as if an engine had sent them.

Seam: vllm/v1/engine/{__init__,output_processor,parallel_sampling}.py
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from copy import copy

from vllm.outputs import RequestOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists

from prefillshare.kvshare.caller import Caller
from prefillshare.kvshare.errors import Internal, Unavailable
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare.usage import TurnUsage
from prefillshare.kvshare_vllm.grammars.grammars import Grammars
from prefillshare.kvshare_vllm.surface.http_hang_ups import told_of_hang_up
from prefillshare.kvshare_vllm.surface.turn_call import RunningTurn, TurnCall, TurnRunner

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "repetition": FinishReason.REPETITION}

#: Key of a turn's usage in an OpenAI response's `kv_transfer_params`.
USAGE = "prefillshare"

#: Has a prompt kept whose KV has just been made. Returns how many of its tokens are kept now.
KeepPrompt = Callable[[], Awaitable[int]]


class Run:
    """`terms`, `keep`: as of Frontend.run."""

    def __init__(
        self,
        processor: OutputProcessor,
        grammars: Grammars,
        run_turn: TurnRunner,
        request: EngineCoreRequest,
        decoder: str,
        caller: Caller,
        terms: object,
        prompt_text: str | None,
        keep: KeepPrompt | None,
    ):
        self._keep = keep
        self._processor, self._grammars, self._run_turn = processor, grammars, run_turn
        self._request, self._prompt_text = request, prompt_text
        self._decoder, self._caller, self._terms = decoder, caller, terms
        #: One turn, or `n` of them; empty until the first output is asked for.
        self.turns: list[RunningTurn] = []

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """The request's outputs; called once. Closing the iterator, or cancelling its consumer, ends the turns everywhere."""
        request, processor = self._request, self._processor
        params = request.sampling_params
        if params.structured_outputs:
            params.structured_outputs = await self._grammars.tried(params.structured_outputs)
        queue = RequestOutputCollector(params.output_kind, request.request_id)
        children, parent = [request], None
        if params.n > 1:
            parent, children = ParentRequest(request), []
            for index in range(params.n):
                child = copy(request)
                child.request_id, child.sampling_params = parent.get_child_info(index)
                children.append(child)
        pumps: list[asyncio.Task] = []
        finished = False
        try:
            for index, child in enumerate(children):
                turn = self._run_turn(self._call(child))
                self.turns.append(turn)
                processor.add_request(child, self._prompt_text, parent, index, queue)
                pumps.append(asyncio.create_task(self._pump(child, turn, queue)))
            with told_of_hang_up(lambda: queue.put(Unavailable("the client has hung up"))):
                while not finished:
                    output = queue.get_nowait() or await queue.get()
                    finished = output.finished
                    yield output
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            if not finished:
                processor.abort_requests([request.request_id], internal=True)
            queue.close()

    def _call(self, request: EngineCoreRequest) -> TurnCall:
        return TurnCall(
            decoder=self._decoder,
            prompt=list(request.prompt_token_ids),
            sampling=request.sampling_params,
            request_id=request.request_id,
            caller=self._caller,
            salt=request.cache_salt,
            terms=self._terms,
        )

    async def _pump(self, request: EngineCoreRequest, turn: RunningTurn, queue: RequestOutputCollector) -> None:
        first, kept_tokens = True, 0
        try:
            async with aclosing(turn.chunks()) as chunks:
                async for chunk in chunks:
                    if first and self._keep:
                        kept_tokens = await self._keep()
                    output = _core_output(request, chunk, turn.usage, first, kept_tokens)
                    first = False
                    done = self._processor.process_outputs([output])
                    if done.reqs_to_abort or output.finished:  # a stop string was met here, or the engine ended it
                        turn.text_has_ended()
                        return
            queue.put(Internal("the turn ended without a finish reason"))
        except asyncio.CancelledError:
            queue.put(Unavailable("the turn was cancelled from below"))  # or by `outputs`, which has ended then
            raise
        except Exception as error:
            queue.put(error)


def _core_output(
    request: EngineCoreRequest, chunk: TokenChunk, usage: TurnUsage, is_first: bool, kept_tokens: int
) -> EngineCoreOutput:
    """A chunk as an engine would send it. The turn's usage goes where vLLM's server expects a KV connector's report; the server
    shows the last output's. What is kept, and was not cached before, counts as put into the cache by this request."""
    created = max(0, kept_tokens - usage.cached_tokens)
    stats = PrefillStats(num_cached_tokens=usage.cached_tokens, num_cache_creation_tokens=created)
    logprobs, k = None, request.sampling_params.num_logprobs
    may_be_last = bool(chunk.finish_reason or request.sampling_params.stop)
    if chunk.logprobs is not None and k is not None:
        told = chunk.logprobs if k < 0 else chunk.logprobs.likeliest(k)
        logprobs = LogprobsLists(told.token_ids, told.values, told.ranks)
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=list(chunk.token_ids),
        new_logprobs=logprobs,
        finish_reason=_FINISH[chunk.finish_reason] if chunk.finish_reason else None,
        stop_reason=chunk.stop_reason,
        prefill_stats=stats if is_first else None,
        kv_transfer_params={USAGE: usage.report()} if may_be_last else None,
    )
