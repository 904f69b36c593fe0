"""Attention for batched generation: a KV head's queries are put side by side, so that keys and values are read in place.

transformers' own call to scaled_dot_product_attention, given a mask, first copies keys and values once per query head of their
group; with a long context and one query per row that copy is most of a step's work.

Seam: transformers.AttentionInterface, AttentionMaskInterface, integrations/sdpa_attention.py
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "grouped"


def attend(module, query, key, value, attention_mask, dropout: float = 0.0, scaling: float | None = None, **more):
    """Returns [B, Q, heads, head size] and None. query: [B, heads, Q, head size]; key and value: [B, KV heads, S, head size];
    attention_mask: [B, 1, Q, S], True where seen."""
    rows, heads, queries, size = query.shape
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, **more)
    group = heads // key.shape[1]
    side_by_side = query.reshape(rows, key.shape[1], group * queries, size)
    mask = attention_mask.repeat(1, 1, group, 1) if group > 1 else attention_mask
    seen = scaled_dot_product_attention(side_by_side, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return seen.reshape(rows, heads, queries, size).transpose(1, 2).contiguous(), None


def use(model: torch.nn.Module) -> torch.nn.Module:
    """Have the model attend this way from now on; returns it."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return model
