"""The KV connector: vLLM's NIXL pull connector, held to the rules of shared KV.

Life of a load, on the decode side (a request that computes layers itself has two: what enters them first, so that it can
begin, and the KV of the other layers):
 1. `get_num_new_matched_tokens`: the shared prefix minus what the local cache holds is to be loaded (R1). While
    another request loads the same blocks, wait for it instead of loading a second copy (R5).
 2. The worker shakes hands with the prefill engine once; both must have been started under one contract (R4).
 3. The worker reads; the prefill engine frees its blocks when told that the read ended, or when the lease ends.
 4. A read that ended after the lease is reported as failed (R6); the scheduler gives the request back (R1, R3).

Seam: vllm/distributed/kv_transfer/kv_connector/v1/nixl/{connector,pull_scheduler,pull_worker,base_worker}.py
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.logger import init_logger

from kvshare.handoff import LEASE_MARGIN_S
from kvshare.layer_group import LayerGroup
from kvshare.modes import SharingMode, get_mode
from kvshare_vllm.transfer import regions
from kvshare_vllm.transfer.load_overlap import LoadOverlap

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import ReqMeta
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = init_logger(__name__)

#: Behind the id of a request that computes layers itself: its load of the other layers' KV.
REST = " rest"


def own_layers(params: Mapping[str, Any]) -> LayerGroup | None:
    """What a request's kv_transfer_params say of them."""
    return LayerGroup.parse(params["own_layers"]) if params.get("own_layers") else None


def mode_of(vllm_config: VllmConfig) -> SharingMode:
    return get_mode(vllm_config.kv_transfer_config.get_from_extra_config("sharing_mode", ""))


class SharedKVConnectorScheduler(NixlPullConnectorScheduler):
    """Scheduler side. Prefill: stamps leases. Decode: loads exactly the shared prefix."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._mode = mode_of(vllm_config)
        self._block_bytes = sum(t.size for t in kv_cache_config.kv_cache_tensors) // kv_cache_config.num_blocks
        names = [name for group in kv_cache_config.kv_cache_groups for name in group.layer_names]
        self._regions = regions.Regions(names, vllm_config)
        # Block hash -> id of the request that is loading this block now. A request's entries live from
        # update_state_after_alloc until its load ends or the request does.
        self._loading: dict[Any, str] = {}
        self._loads: dict[str, list[Any]] = {}
        # Loads of requests that compute these layers themselves.
        self._own_layers: dict[str, LayerGroup] = {}
        # Their two loads, while they are under way, and the bytes of each.
        self.loads_left: dict[str, dict[str, int]] = {}
        self.overlap = LoadOverlap(self.vllm_config.kv_transfer_config.get_from_extra_config("overlap_loads", "pays"))
        # Request id -> what its load cost, reported with every output until the request ends.
        self.load_cost: dict[str, dict[str, int | float]] = {}
        self._load_began: dict[str, float] = {}

    def shared_tokens(self, request: Request) -> int:
        """Length of the prefix that must be base KV, in tokens (R1)."""
        return self._mode.handoff_tokens(request.num_prompt_tokens, request.num_tokens - request.num_prompt_tokens)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        loads = bool((request.kv_transfer_params or {}).get("do_remote_prefill"))
        missing = (self.shared_tokens(request) if loads else request.num_tokens) - num_computed_tokens
        if missing <= 0:
            return 0, False
        first = num_computed_tokens // self.block_size
        if missing >= self.block_size and self._loading.get(request.block_hashes[first]) not in (None, request.request_id):
            return None, False
        return (missing, True) if loads else super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks, num_external_tokens: int) -> None:
        params = request.kv_transfer_params or {}
        loads_now = bool(params.get("do_remote_prefill"))
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if params.get("lend"):  # the worker counts only leases of requests that it has been told of
            self._reqs_in_batch.add(request.request_id)
        if not loads_now:
            return
        local = self.shared_tokens(request) - num_external_tokens
        pulled = -(-num_external_tokens // self.block_size)
        group = own_layers(params)
        region_bytes = pulled * self._block_bytes // len(self._regions.names)
        rest = len(self._regions.kv(group)) * region_bytes
        first = len(self._regions.hidden_states(group)) * region_bytes if group else 0
        self.load_cost[request.request_id] = {"pulled_bytes": first + rest, "local_tokens": local}
        if num_external_tokens:
            self._load_began[request.request_id] = time.perf_counter()
        if group and num_external_tokens:
            self._own_layers[request.request_id] = group
            self.loads_left[request.request_id] = {request.request_id: first, request.request_id + REST: rest}
        begin, end = local // self.block_size, self.shared_tokens(request) // self.block_size
        if num_external_tokens and end > begin:
            self._loads[request.request_id] = request.block_hashes[begin:end]
            for block_hash in self._loads[request.request_id]:
                self._loading[block_hash] = request.request_id

    def _load_ended(self, request_id: str) -> None:
        for block_hash in self._loads.pop(request_id, ()):
            if self._loading.get(block_hash) == request_id:
                del self._loading[block_hash]

    def update_connector_output(self, connector_output) -> None:
        super().update_connector_output(connector_output)
        for request_id in connector_output.finished_recving or ():
            if request_id not in self._own_layers:
                self._load_ended(request_id)

    def time_load(self, name: str) -> None:
        """One has ended. Of two, the second has begun with the first's end (or with the first, where that reads nothing)."""
        request_id, now = name.removesuffix(REST), time.perf_counter()
        if (began := self._load_began.get(request_id)) is None:
            return
        cost = self.load_cost[request_id]
        cost["load_s" if name == request_id else "rest_load_s"] = now - began
        size = self.loads_left.get(request_id, {}).get(name, 0)
        group = self._own_layers.get(request_id)
        before = cost.get("load_s", 0.0) if name != request_id and group and group.transition else 0.0
        self.overlap.loaded(size, now - began - before)

    def prefix_is_there(self, request_id: str) -> None:
        """Of a request whose own layers were still to be computed: others may find its blocks in the cache."""
        self._own_layers.pop(request_id, None)
        self._load_ended(request_id)

    def build_connector_meta(self, scheduler_output):
        meta = super().build_connector_meta(scheduler_output)
        meta.own_layers_of_loads = {rid: self._own_layers[rid] for rid in meta.reqs_to_recv if rid in self._own_layers}
        return meta

    def request_finished(self, request: Request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        self.prefix_is_there(request.request_id)
        load_cost = self.load_cost.pop(request.request_id, None)
        self._load_began.pop(request.request_id, None)
        given = request.kv_transfer_params or {}
        if not given.get("lend", True) and not given.get("do_remote_prefill"):
            self._stop_heartbeat(request.request_id)
            self._reqs_not_processed.add(request.request_id)
            return False, load_cost
        delay, params = super().request_finished(request, block_ids)
        if request.request_id in self._reqs_need_send and params is not None:
            # The reader's worker rebases this deadline by the clock offset its handshake measured.
            params["remote_blocks_expiry_time"] = self._reqs_need_send[request.request_id]
            params["lease_s"] = self._kv_lease_duration
        return delay, load_cost if params is None else {**params, **(load_cost or {})}


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
        # Of requests that still read what enters their layers: the other layers' KV, which is read after it.
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
            self._own_layers[request_id] = self._own_layers[request_id + REST] = group
            if self._regions.hidden_states(group):  # reads of one link end together if they begin together
                self._rest[request_id] = rest
            else:
                metadata.reqs_to_recv[request_id + REST] = rest
        super().start_load_kv(metadata)

    def _read_blocks(self, read_spec, dst_engine_id, request_id, *args, expected_consumers: int, **kwargs) -> bool:
        group = self._own_layers.get(request_id)
        self._reading = self._regions.kv(group)
        if group and not request_id.endswith(REST):
            self._reading = self._regions.hidden_states(group)
            if not self._reading:  # nothing enters but the embedding: it can begin
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
                self._begin_rest(request_id + REST, rest)
        return results

    def _begin_rest(self, name: str, rest: ReqMeta) -> None:
        """At once: what `start_load_kv` is told begins only after the next step."""
        rest.local_physical_block_ids = self._logical_to_kernel_block_ids(
            rest.local_block_ids, self._physical_blocks_per_logical_kv_block
        )
        self._recving_metadata[name] = rest
        self._read_blocks_for_req(name, rest)

    def _compute_desc_ids(self, *args, **kwargs):
        """Of the regions that the request reads; vLLM's are region by region."""
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
        return False  # vLLM's margin of seconds would refuse short leases; _read_was_late is what counts

    def _read_was_late(self, request_id: str, now: float) -> bool:
        meta = self._recving_metadata.get(request_id)
        if meta is None or meta.remote is None or meta.remote.blocks_expiry_time is None:
            return False
        deadline = meta.remote.blocks_expiry_time - self._engine_clock_offset[meta.remote.engine_id]
        return now + LEASE_MARGIN_S >= deadline


class SharedKVConnector(NixlPullConnector):
    """`kv_connector` of every engine in a sharing pool. Extra config: `sharing_mode`, `kv_contract`."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        self.connector_scheduler = self.connector_worker = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = SharedKVConnectorScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = SharedKVConnectorWorker(vllm_config, self.engine_id, kv_cache_config)
