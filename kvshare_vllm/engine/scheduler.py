"""The decode engine's scheduler: what may enter the prefix cache (R2), and what happens to a preempted request (R3).

A request, seen from here; in mode `none`, points 1 to 3 do not hold, since all KV is the decoder's own:
 1. It arrives with a handoff, or it is refused: prompt tokens before the decoder's own are never computed
    here (R1).
 2. Its shared prefix is found locally, or loaded by the connector; only that prefix is offered for reuse (R2).
 3. It decodes. If it is preempted, or its load fails, its shared prefix is gone and cannot be made here: the engine
    gives the request back (finish reason "error", `resume_reason`), and frees all it held.
 4. The router prefills again and sends it anew with the tokens generated so far (`replay_tokens`). They are put
    back as *output* tokens, so that it continues as vLLM continues a preempted request: penalties, seeds, limits
    and grammars count them as generated. The same path serves a request that moves to another engine.

Seam: vllm/v1/core/sched/{scheduler,async_scheduler}.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from prefillshare.kvshare.errors import ResumeReason
from prefillshare.kvshare_vllm.engine.retention import Keeping
from prefillshare.kvshare_vllm.patches.block_keys import share_blocks_between_adapters
from prefillshare.kvshare_vllm.transfer.params import Asked, Params, given_back, refused

if TYPE_CHECKING:
    from vllm.v1.request import Request


class SharedKVScheduler(Keeping, AsyncScheduler):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loads = self.connector.loads
        self._mode = self._loads.mode
        # Whether a prompt may be computed here: by the base's weights, or in a mode that shares nothing.
        makes_base_kv = self.vllm_config.kv_transfer_config.get_from_extra_config("makes_base_kv", False)
        self._prefills = makes_base_kv or not self._mode.shares_prefill
        if self._mode.adapters_share_blocks:
            share_blocks_between_adapters()
        self._limit_offered_blocks()
        self._preempted: list[Request] = []
        self._given_back: list[tuple[int, EngineCoreOutput]] = []
        # Requests whose load failed in the step that is being processed.
        self._failed_loads: set[str] = set()
        # Requests put back with generated tokens, until they are first scheduled / until their grammar has caught up.
        self._replays: set[str] = set()
        self._grammars_behind: set[str] = set()

    # R2 -------------------------------------------------------------------------------------------------------------

    def _limit_offered_blocks(self) -> None:
        """Every way into the prefix cache ends in the coordinator's cache_blocks: cap it there, once."""
        coordinator, mode = self.kv_cache_manager.coordinator, self._mode
        cache_blocks = coordinator.cache_blocks

        def offer(request: Request, num_computed_tokens: int) -> None:
            own_tokens = Asked(request.kv_transfer_params).own_tokens
            offered = mode.cacheable_tokens(request.num_prompt_tokens, num_computed_tokens, own_tokens)
            cache_blocks(request, self._loads.offered(request.request_id, offered))

        coordinator.cache_blocks = offer

    def _get_local_prefix_cache_hit(self, request: Request):
        blocks, tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        # A resumed request's own tokens may be in the cache as base KV, from a later turn's prompt. Past the
        # shared prefix they must be the decoder's.
        limit = self._loads.shared_tokens_of(request) // self.block_size * self.block_size
        if tokens > limit and self._mode.shares_prefill:
            blocks, tokens = self.kv_cache_manager.truncate_computed_blocks(blocks, limit), limit
        return blocks, tokens, boundary, diverged

    # R1 and the way in ----------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        asked = Asked(request.kv_transfer_params)
        if not request.abort_immediately:
            replay = asked.replay_tokens
            shared = self._mode.handoff_tokens(request.num_prompt_tokens - replay, replay, asked.own_tokens)
            if shared > 0 and not asked.load_is_due and not self._may_prefill(asked):
                return self._refuse(request, "it came without a KV handoff (R1)")
            if request.skip_reading_prefix_cache:
                return self._refuse(request, "it asks to recompute its prompt, as prompt_logprobs does (R1)")
            if replay:
                self._put_back(request, replay)
        super().add_request(request)

    def _may_prefill(self, asked: Asked) -> bool:
        """Whether a request without a handoff may compute its prompt here."""
        return self._prefills

    def _refuse(self, request: Request, why: str) -> None:
        self.connector.request_finished_all_groups(request, ())  # has the prefill engine told to free its blocks
        self.finished_req_ids.add(request.request_id)  # makes the engine step, and so report
        self._given_back.append((request.client_index, _give_back(request.request_id, refused(why))))

    def _put_back(self, request: Request, replay: int) -> None:
        prompt_tokens = request.num_prompt_tokens - replay
        request._output_token_ids.extend(request.prompt_token_ids[prompt_tokens:])
        request.prompt_token_ids = request.prompt_token_ids[:prompt_tokens]
        request.num_prompt_tokens = prompt_tokens
        request.num_preemptions = 1
        self._replays.add(request.request_id)
        if request.use_structured_output:
            self._grammars_behind.add(request.request_id)
        else:
            request.status = RequestStatus.PREEMPTED

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        ready = super()._handle_blocked_waiting_request(request)
        if ready and request.request_id in self._grammars_behind:
            self._grammars_behind.discard(request.request_id)
            grammar = request.structured_output_request.grammar
            if not grammar.accept_tokens(request.request_id, list(request.output_token_ids)):
                self.grammar_compile_error_reqs.add(request.request_id)  # how vLLM ends a request its grammar refuses
                return False
            request.status = RequestStatus.PREEMPTED
        return ready

    # Loads ----------------------------------------------------------------------------------------------------------

    def _update_from_kv_xfer_finished(self, kv_connector_output) -> None:
        ended = self._ended(list(kv_connector_output.finished_recving or ()))
        super()._update_from_kv_xfer_finished(replace(kv_connector_output, finished_recving=ended))

    def _ended(self, names: list[str]) -> set[str]:
        """The requests that waited for these loads, which have succeeded or failed."""
        return {self._loads.arrived(name).request_id for name in names}

    def _handle_failed_recving(self, failed_req_ids):
        failed = super()._handle_failed_recving(failed_req_ids)
        self._failed_loads |= failed
        return failed

    def _build_kv_connector_meta(self, connector, scheduler_output):
        meta = super()._build_kv_connector_meta(connector, scheduler_output)
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids & self._replays
        # The V1 model runner knows a resumed request only if it has run it before; it has not run these (worker.py).
        meta.restored_requests = [
            NewRequestData.from_request(self.requests[rid], self.kv_cache_manager.get_block_ids(rid)) for rid in resumed
        ]
        self._replays.difference_update(scheduler_output.num_scheduled_tokens)
        return meta

    # R3 and the way out ---------------------------------------------------------------------------------------------

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output)
        if not self._prefills:  # otherwise vLLM computes it again in place: shared rows as the base's, others as the decoder's
            self._preempted.append(request)

    def schedule(self, *args, **kwargs):
        output = super().schedule(*args, **kwargs)
        # vLLM admits no waiting request in a step that preempts, so none of these has started again.
        for request in self._preempted:
            self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
            notice = _give_back(request.request_id, given_back(ResumeReason.PREEMPTED))
            notice.events = request.take_events()
            self._given_back.append((request.client_index, notice))
        self._preempted.clear()
        return output

    def _handle_invalid_blocks(self, invalid_block_ids, num_scheduled_tokens):
        failed = super()._handle_invalid_blocks(invalid_block_ids, num_scheduled_tokens)
        self._failed_loads |= failed
        return failed

    def update_from_output(self, scheduler_output, model_runner_output):
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for engine_outputs in outputs.values():
            for output in engine_outputs.outputs:
                if output.finish_reason == FinishReason.ERROR and output.request_id in self._failed_loads:
                    output.kv_transfer_params = given_back(ResumeReason.KV_LOAD_FAILED)
                elif output.finish_reason == FinishReason.ERROR:
                    output.kv_transfer_params = refused("its structured output did not compile or refused its tokens")
                elif not output.finished and (cost := self._loads.cost(output.request_id)):
                    output.kv_transfer_params = cost.told()
        for client_index, output in self._given_back:
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(output)
        self._given_back.clear()
        self._failed_loads.clear()
        return outputs

    def _free_request(self, request: Request, delay_free_blocks: bool = False):
        self._replays.discard(request.request_id)
        self._grammars_behind.discard(request.request_id)
        return super()._free_request(request, delay_free_blocks)


def _give_back(request_id: str, why: Params) -> EngineCoreOutput:
    return EngineCoreOutput(request_id=request_id, new_token_ids=[], finish_reason=FinishReason.ERROR, kv_transfer_params=why)
