"""The scheduler of decode engines whose decoders compute some layers of a shared prefix themselves (DroidSpeak).

A request differs from what engine/scheduler.py describes in this:
 1. Its load has two parts: what enters its own layers, and the other layers' KV, called the rest (transfer/loads.py).
 2. When both have been loaded, or already before the rest if that pays, the prefix is scheduled like a prompt; the worker
    runs it through the request's own layers only.
 3. Tokens after the prefix pass through all layers, and wait for the other layers' KV.

Seam: vllm/v1/core/sched/scheduler.py
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from prefillshare.kvshare.layer_group import OwnLayers
from prefillshare.kvshare_vllm.engine.scheduler import SharedKVScheduler
from prefillshare.kvshare_vllm.transfer.loads import is_rest, request_of
from prefillshare.kvshare_vllm.transfer.params import Asked

if TYPE_CHECKING:
    from vllm.v1.request import Request


class OwnLayersScheduler(SharedKVScheduler):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Requests whose prefix has been loaded and whose own layers of it have not all been scheduled.
        self._own_layers: dict[str, OwnLayers] = {}

    def _may_prefill(self, asked: Asked) -> bool:
        return asked.prefills_alone

    def _get_local_prefix_cache_hit(self, request: Request):
        if request.request_id in self._own_layers:  # its blocks are allocated, and all of their tokens are to be scheduled
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, request.shared_prefix_boundary, False
        return super()._get_local_prefix_cache_hit(request)

    # Loads in two parts ---------------------------------------------------------------------------------------------

    def _ended(self, names: list[str]) -> set[str]:
        """The requests that wait no longer. If a load has two parts, its request may begin after the first where that pays; the
        blocks of a finished request are freed only after both."""
        ended = set()
        for name in names:
            arrival = self._loads.arrived(name)
            if arrival.is_whole:
                ended.add(name)
                continue
            request = self.requests[arrival.request_id]
            if arrival.is_first and not request.is_finished() and self._loads.begins_early(arrival.request_id):
                ended.add(name)
            if arrival.is_last and (request.is_finished() or request.status == RequestStatus.WAITING_FOR_REMOTE_KVS):
                ended.add(arrival.request_id)
        return ended

    def _handle_failed_recving(self, failed_req_ids):
        """A rest may fail after its request has begun, while it waits for both parts, or while it may begin but has no room."""
        rests = {request_of(name) for name in failed_req_ids if is_rest(name)}
        failed = {rid for rid in rests if self._loads.is_under_way(rid) and not self.requests[rid].is_finished()}
        self._failed_loads |= failed
        return super()._handle_failed_recving(failed_req_ids) | failed

    def _request_blocks_can_be_freed(self, request: Request) -> bool:
        return not self._loads.rest_is_under_way(request.request_id) and super()._request_blocks_can_be_freed(request)

    def _free_request(self, request: Request, delay_free_blocks: bool = False):
        self._own_layers.pop(request.request_id, None)
        return super()._free_request(request, delay_free_blocks | self._loads.is_under_way(request.request_id))

    # The prefix in the request's own layers -------------------------------------------------------------------------

    def _update_waiting_for_remote_kv(self, request: Request) -> None:
        """The request's prefix has been loaded: it is scheduled like a prompt."""
        group = Asked(request.kv_transfer_params).own_layers
        if group and request.request_id not in self.failed_recving_kv_req_ids:
            self._own_layers[request.request_id] = OwnLayers(self._loads.shared_tokens_of(request), group)
            request.num_computed_tokens = self._loads.cost(request.request_id).local_tokens
        super()._update_waiting_for_remote_kv(request)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if self._loads.rest_is_under_way(request.request_id):
            tokens = min(tokens, self._own_layers[request.request_id].shared_tokens - num_computed_tokens)
        return tokens

    def _build_kv_connector_meta(self, connector, scheduler_output):
        meta = super()._build_kv_connector_meta(connector, scheduler_output)
        meta.own_layers = self._own_layers_of(scheduler_output)
        return meta

    def _own_layers_of(self, scheduler_output) -> dict[str, OwnLayers]:
        """The own layers of the requests in this step whose shared prefix had not been scheduled to its end before it."""
        scheduled = {rid: own for rid, own in self._own_layers.items() if rid in scheduler_output.num_scheduled_tokens}
        for request_id, own in scheduled.items():
            computed = self.requests[request_id].num_computed_tokens
            if computed + scheduler_output.num_scheduled_tokens[request_id] > own.shared_tokens:
                del self._own_layers[request_id]
                self._loads.is_there(request_id)
        return scheduled

    def update_from_output(self, scheduler_output, model_runner_output):
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._loads.overlap.stepped(scheduler_output.num_scheduled_tokens, time.perf_counter())
        return outputs
