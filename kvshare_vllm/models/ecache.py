"""The E-cache: hidden states that enter a layer, kept in the paged KV cache beside the KV (DroidSpeak, section 4.3).

A cache layer of the model's own KV shape has room for 2 * KV heads * head size numbers per token; hidden states take as many
such layers as they need. As cache layers they are cached, evicted, handed over and freed together with the KV of the same
tokens, by the same code. With tensor parallelism every rank keeps its part of the hidden states.

Seam: vllm/model_executor/layers/attention (`Attention.kv_cache`: a page per block, whatever the layout inside)
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention


class ECache(nn.Module):
    """The E-cache of one layer. Created while vLLM creates the model."""

    def __init__(self, names: list[str], like: Attention, vllm_config: VllmConfig, hidden_size: int):
        super().__init__()
        self._ranks, self._rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if hidden_size % self._ranks:
            raise ValueError(f"hidden states of {hidden_size} cannot be parted among {self._ranks} ranks")
        self._own = hidden_size // self._ranks
        self.parts = nn.ModuleList(
            Attention(
                like.num_heads,  # unused, but puts it into the cache group of the model's own layers
                like.head_size,
                1.0,
                num_kv_heads=like.num_kv_heads,
                cache_config=vllm_config.cache_config,
                prefix=name,
            )
            for name in names
        )

    def store(self, hidden: torch.Tensor) -> None:
        """Keep hidden states, [T, hidden size], of the tokens of this step."""
        slots = get_forward_context().slot_mapping
        slots = slots.get(self.parts[0].layer_name) if isinstance(slots, dict) else slots
        if slots is None or self.parts[0].kv_cache.numel() == 0:  # a dummy run, before there is a cache
            return
        hidden = hidden[: len(slots), self._rank * self._own : (self._rank + 1) * self._own]
        for part in self.parts:
            slot = _by_slot(part)
            size = min(slot.shape[2], hidden.shape[1])
            slot[slots // slot.shape[1], slots % slot.shape[1], :size] = hidden[:, :size]
            hidden = hidden[:, size:]

    def load(self, slots: torch.Tensor) -> torch.Tensor:
        """The hidden states in these cache slots, [len(slots), hidden size]."""
        parts = [_by_slot(part) for part in self.parts]
        own = torch.cat([part[slots // part.shape[1], slots % part.shape[1]] for part in parts], dim=-1)[:, : self._own]
        return tensor_model_parallel_all_gather(own.contiguous()) if self._ranks > 1 else own


def _by_slot(part: Attention) -> torch.Tensor:
    """The layer's cache as [blocks, tokens per block, numbers per token]. Only needs pages to be contiguous."""
    cache = part.kv_cache
    pages = torch.as_strided(cache, (cache.shape[0], cache[0].numel()), (cache.stride(0), 1), cache.storage_offset())
    return pages.unflatten(1, (-1, 2 * part.num_kv_heads * part.head_size))
