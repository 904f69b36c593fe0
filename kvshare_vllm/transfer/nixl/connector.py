"""The KV connector: vLLM's NIXL pull connector, held to the rules of shared KV.

Life of a load, on the decode side (a request that computes layers itself has two loads: first what enters those layers, so that
it can begin, then the KV of the other layers):
 1. `get_num_new_matched_tokens`: the shared prefix minus what the local cache holds is to be loaded (R1). While
    another request loads the same blocks, wait for it instead of loading a second copy (R5).
 2. The worker shakes hands with the prefill engine once; both must have been started under one contract (R4).
 3. The worker reads; the prefill engine frees its blocks when told that the read ended, or when the lease ends.
 4. A read that ended after the lease is reported as failed (R6); the scheduler gives the request back (R1, R3).

Seam: vllm/distributed/kv_transfer/kv_connector/v1/nixl/{connector,pull_scheduler,pull_worker,base_worker}.py
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.logger import init_logger

from prefillshare.kvshare.handoff import LEASE_MARGIN_S
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare.modes import get_mode
from prefillshare.kvshare_vllm.transfer import regions
from prefillshare.kvshare_vllm.transfer.load_overlap import LoadOverlap
from prefillshare.kvshare_vllm.transfer.loads import Loads, is_rest, rest_of
from prefillshare.kvshare_vllm.transfer.params import Asked

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import ReqMeta
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = init_logger(__name__)

class SharedKVConnectorScheduler(NixlPullConnectorScheduler):
    """Scheduler side. Prefill: stamps leases. Decode: loads exactly the shared prefix."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config, engine_id, kv_cache_config)
        if backoff := self._prefill_backoff():
            raise ValueError(
                f"{vllm_config.model_config.model}: vLLM would hand over {backoff} tokens less of each prompt than are asked "
                "for, as it does for models with recurrent layers; such models cannot be served"
            )
        names = [name for group in kv_cache_config.kv_cache_groups for name in group.layer_names]
        of_a_block = sum(t.size for t in kv_cache_config.kv_cache_tensors) // kv_cache_config.num_blocks
        all_regions = regions.Regions(names, vllm_config)

        def block_bytes(group: LayerGroup | None) -> tuple[int, int]:
            first = all_regions.hidden_states(group) if group else ()
            return tuple(len(places) * of_a_block // len(all_regions.names) for places in (first, all_regions.kv(group)))

        setting = self.vllm_config.kv_transfer_config.get_from_extra_config
        mode, overlap = get_mode(setting("sharing_mode", "")), LoadOverlap(setting("overlap_loads", "pays"))
        self.loads = Loads(mode, self.block_size, block_bytes, overlap)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        is_due = Asked(request.kv_transfer_params).load_is_due
        # Where no load is due, the prefix is made here; its last block is whole with the token after it.
        missing = self.loads.shared_tokens_of(request) + (not is_due) - num_computed_tokens
        if missing <= 0:
            return 0, False
        first = num_computed_tokens // self.block_size
        if self.loads.must_wait(request.request_id, missing, lambda: request.block_hashes[first]):
            return None, False
        return (missing, True) if is_due else super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks, num_external_tokens: int) -> None:
        asked = Asked(request.kv_transfer_params)
        was_due = asked.load_is_due
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if asked.lends:  # the worker counts only leases of requests that it has been told of
            self._reqs_in_batch.add(request.request_id)
        if was_due:
            shared = self.loads.shared_tokens_of(request)
            self.loads.begins(
                request.request_id,
                shared_tokens=shared,
                local_tokens=shared - num_external_tokens,
                keys=request.block_hashes,
                group=asked.own_layers,
            )

    def build_connector_meta(self, scheduler_output):
        meta = super().build_connector_meta(scheduler_output)
        groups = {request_id: self.loads.group_of(request_id) for request_id in meta.reqs_to_recv}
        meta.own_layers_of_loads = {request_id: group for request_id, group in groups.items() if group}
        return meta

    def request_finished(self, request: Request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        cost = self.loads.forget(request.request_id)
        told = cost.told() if cost else None
        if Asked(request.kv_transfer_params).holds_nothing:
            self._stop_heartbeat(request.request_id)
            self._reqs_not_processed.add(request.request_id)
            return False, told
        delay, params = super().request_finished(request, block_ids)
        if request.request_id in self._reqs_need_send and params is not None:
            # The reader's worker rebases this deadline by the clock offset its handshake measured.
            params["remote_blocks_expiry_time"] = self._reqs_need_send[request.request_id]
            params["lease_s"] = self._kv_lease_duration
        return delay, told if params is None else {**params, **(told or {})}


class SharedKVConnectorWorker(NixlPullConnectorWorker):
    """Worker side: shakes hands only under our contract, and voids reads that may have outlived their lease."""

    def register_kv_caches(self, kv_caches) -> None:
        contract = self.kv_transfer_config.get_from_extra_config("kv_contract", None)
        if not contract:
            raise ValueError("kv_connector_extra_config.kv_contract: missing; engines must be started under a KV contract")
        stock = base_worker.compute_nixl_compatibility_hash

        def contract_hash(vllm_config, attn_backend_name, transfer_mode="pull"):
            # The stock hash names the model and would refuse every decoder; the contract names its base instead,
            # and covers what the stock hash covers besides (versions, dtype, shapes). The attention backend fixes
            # the layout of a block and is only known here.
            return f"prefillshare-contract {contract} backend {attn_backend_name} mode {transfer_mode}"

        base_worker.compute_nixl_compatibility_hash = contract_hash
        try:
            super().register_kv_caches(kv_caches)
        finally:
            base_worker.compute_nixl_compatibility_hash = stock
        transferred = [name for name in kv_caches if name in self._layer_specs]
        self._regions = regions.Regions(transferred, self.vllm_config)
        self._remote_regions = self._regions.among(self.kv_transfer_config.get_from_extra_config("prefill_ecache_layers", []))
        self._own_layers: dict[str, LayerGroup] = {}
        self._reading: list[int] = []
        # Request that still reads what enters its layers -> the load of the other layers' KV, which follows.
        self._rest: dict[str, ReqMeta] = {}

    def add_remote_agent(self, nixl_agent_meta, *args, **kwargs) -> str:
        """A prefill engine may keep more E-caches than this engine reads."""
        for field in regions.PER_REGION:
            if values := getattr(nixl_agent_meta, field):
                setattr(nixl_agent_meta, field, [values[place] for place in self._remote_regions])
        return super().add_remote_agent(nixl_agent_meta, *args, **kwargs)

    def start_load_kv(self, metadata) -> None:
        for request_id, group in metadata.own_layers_of_loads.items():
            meta = metadata.reqs_to_recv[request_id]
            rest = replace(meta, remote=replace(meta.remote))
            self._own_layers[request_id] = self._own_layers[rest_of(request_id)] = group
            if self._regions.hidden_states(group):  # reads on one link that begin together would end together
                self._rest[request_id] = rest
            else:
                metadata.reqs_to_recv[rest_of(request_id)] = rest
        super().start_load_kv(metadata)

    def _read_blocks(self, read_spec, dst_engine_id, request_id, *args, expected_consumers: int, **kwargs) -> bool:
        group = self._own_layers.get(request_id)
        self._reading = self._regions.kv(group)
        if group and not is_rest(request_id):
            self._reading = self._regions.hidden_states(group)
            if not self._reading:  # only embeddings enter these layers: it can begin
                self._recving_transfers.setdefault(request_id, [])
                return True
        if group and group.transition:
            expected_consumers *= 2  # the prefill engine keeps its blocks until it has heard of both
        return super()._read_blocks(
            read_spec, dst_engine_id, request_id, *args, expected_consumers=expected_consumers, **kwargs
        )

    def get_transfer_results(self):
        results = super().get_transfer_results()
        for request_id in results.finished_recving:
            self._own_layers.pop(request_id, None)
            if rest := self._rest.pop(request_id, None):  # failed or not: the prefill engine waits to hear of both
                self._begin_rest(rest_of(request_id), rest)
        return results

    def _begin_rest(self, name: str, rest: ReqMeta) -> None:
        """Begin at once: a load that is passed to `start_load_kv` begins only after the next step."""
        rest.local_physical_block_ids = self._logical_to_kernel_block_ids(
            rest.local_block_ids, self._physical_blocks_per_logical_kv_block
        )
        self._recving_metadata[name] = rest
        self._read_blocks_for_req(name, rest)

    def _compute_desc_ids(self, *args, **kwargs):
        """Ids for the regions that the request reads; vLLM's ids are ordered region by region."""
        ids = super()._compute_desc_ids(*args, **kwargs)
        return ids.reshape(len(self._regions.names), -1)[self._reading].ravel()

    def _pop_done_transfers(self, transfers):
        done, failed = super()._pop_done_transfers(transfers)
        now = time.perf_counter()
        for request_id in done - failed:
            if self._read_was_late(request_id, now):
                logger.warning("Read for request %s ended after its lease; its KV is discarded (R6).", request_id)
                self.xfer_stats.record_kv_expired_req()
                failed.add(request_id)
        return done, failed

    def _is_turn2_read_expired(self, meta) -> bool:
        return False  # vLLM's margin of seconds would refuse short leases; _read_was_late decides

    def _read_was_late(self, request_id: str, now: float) -> bool:
        meta = self._recving_metadata.get(request_id)
        if meta is None or meta.remote is None or meta.remote.blocks_expiry_time is None:
            return False
        deadline = meta.remote.blocks_expiry_time - self._engine_clock_offset[meta.remote.engine_id]
        return now + LEASE_MARGIN_S >= deadline


class SharedKVConnector(NixlPullConnector):
    """`kv_connector` of every engine. Extra config: `sharing_mode`, `kv_contract`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        self.connector_scheduler = self.connector_worker = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = SharedKVConnectorScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = SharedKVConnectorWorker(vllm_config, self.engine_id, kv_cache_config)

    @property
    def loads(self) -> Loads:
        """Available in the scheduler's connector only."""
        return self.connector_scheduler.loads
