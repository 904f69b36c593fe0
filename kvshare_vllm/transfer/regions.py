"""Which of an engine's cache layers move: each is a region of memory to NIXL, in the order of `_region_sort_key`.

A decode engine has the KV of all layers and the E-caches of its own decoders; a prefill engine those of all decode engines.

Seam: vllm/distributed/kv_transfer/kv_connector/v1/nixl/base_worker.py (`_region_sort_key`), metadata.py (NixlAgentMetadata)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import _region_sort_key

from prefillshare.kvshare.layer_group import LayerGroup, ecache_parts

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Part of the names of cache layers that keep hidden states.
ECACHE = ".ecache."
#: Fields of NixlAgentMetadata with an entry per region; those that are unset stay so.
PER_REGION = (
    "kv_caches_base_addr", "block_lens", "block_strides", "region_num_blocks", "region_group_ids", "region_names",
    "region_mem_types", "region_members",
)  # fmt: skip


class Regions:
    """The regions of one engine. `names`: those of its cache layers."""

    def __init__(self, names: Iterable[str], vllm_config: VllmConfig):
        self.names = sorted(names, key=_region_sort_key)
        self._place = {name: place for place, name in enumerate(self.names)}
        self._kv = [name for name in self.names if ECACHE not in name]
        self._parts = ecache_parts_of(vllm_config)

    def kv(self, group: LayerGroup | None) -> list[int]:
        """Places of the KV read by a request that computes `group` itself. None: it computes no layers itself."""
        return self._places(name for number, name in enumerate(self._kv) if group is None or number not in group)

    def hidden_states(self, group: LayerGroup) -> list[int]:
        """Places of the hidden states that enter the group."""
        return self._places(ecache_names(self._kv, group.transition, self._parts) if group.transition else ())

    def _places(self, names: Iterable[str]) -> list[int]:
        return [self._place[name] for name in names]

    def among(self, ecache_layers: Iterable[int]) -> list[int]:
        """Places of these regions among those of an engine that keeps `ecache_layers`."""
        theirs = [*self._kv, *(name for layer in ecache_layers for name in ecache_names(self._kv, layer, self._parts))]
        places = {name: place for place, name in enumerate(sorted(theirs, key=_region_sort_key))}
        return [places[name] for name in self.names]


def ecache_parts_of(vllm_config: VllmConfig) -> int:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return ecache_parts(
        model.get_hidden_size(), model.get_total_num_kv_heads(), model.get_head_size(), parallel.tensor_parallel_size
    )


def ecache_names(kv_layers: list[str], layer: int, parts: int) -> list[str]:
    """Names of the cache layers for the input of `layer`. Each contains one number, as vLLM wants it, which is the same in
    engines that keep the inputs of different layers."""
    prefix = kv_layers[0].split(".layers.")[0]
    return [f"{prefix}{ECACHE}{len(kv_layers) + layer * parts + part}.attn" for part in range(parts)]
