"""A turn that goes on in another engine: the tokens that it has generated so far come at the end of its prompt
(`replay_tokens`), and are put back as *output* tokens. So it continues as vLLM continues a preempted request: limits,
penalties, seeds and grammars count them as generated, and what the transport loads ends where the prompt ends.

Seam: vllm/v1/core/sched/{scheduler,async_scheduler}.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.request import RequestStatus

from prefillshare.kvshare_vllm.transfer.params import Asked

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Replays:
    """Mixed into vLLM's schedulers. The workers of these engines are of ReplayWorker (worker.py)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Requests put back with generated tokens, until they are first scheduled / until their grammar has caught up.
        self._replays: set[str] = set()
        self._grammars_behind: set[str] = set()

    def add_request(self, request: Request) -> None:
        replay = Asked(request.kv_transfer_params).replay_tokens
        if replay and not request.abort_immediately:
            self._put_back(request, replay)
        super().add_request(request)

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

    def _build_kv_connector_meta(self, connector, scheduler_output):
        meta = super()._build_kv_connector_meta(connector, scheduler_output)
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids & self._replays
        # The V1 model runner knows a resumed request only if it has run it before; it has not run these (worker.py).
        meta.restored_requests = [
            NewRequestData.from_request(self.requests[rid], self.kv_cache_manager.get_block_ids(rid)) for rid in resumed
        ]
        self._replays.difference_update(scheduler_output.num_scheduled_tokens)
        return meta

    def _free_request(self, request: Request, delay_free_blocks: bool = False):
        self._replays.discard(request.request_id)
        self._grammars_behind.discard(request.request_id)
        return super()._free_request(request, delay_free_blocks)


class ReplayScheduler(Replays, AsyncScheduler):
    """The scheduler of decode engines that share nothing."""
