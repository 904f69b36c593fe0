"""CacheBlend's choice (arXiv 2405.16444): in reused KV, a decoder computes its own KV of some tokens, in all layers. It is the
baseline for DroidSpeak's choice of layers; offline only.

 1. The first two layers are the decoder's own for all tokens.
 2. The tokens whose values in the second layer are farthest from the base's are chosen.
 3. In every later layer, the chosen tokens' KV is the decoder's own, computed over the present KV of the others.
"""

from __future__ import annotations

import torch

from prefillshare.finetuning.conditioned import LayersKV, plain

#: Layers that are computed for all tokens before any are chosen.
WHOLE_LAYERS = 2


class _Blended:
    """Used as a cache: the base's KV, in which the columns `chosen` [B, C] are replaced as they are computed."""

    def __init__(self, kv: LayersKV):
        self.layers = [(keys.clone(), values.clone()) for keys, values in kv]
        self.chosen: torch.Tensor | None = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        for kept, new in zip(self.layers[layer], (keys, values), strict=True):
            place = self.chosen[:, None, :, None].expand_as(new)
            kept.scatter_(2, place, new)
        return self.layers[layer]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.layers[0][0].shape[2]


@torch.no_grad()
def blended(decoder, kv: LayersKV, ids: torch.Tensor, lengths: torch.Tensor, share: float) -> LayersKV:
    """Returns KV of all tokens. `kv`: the base's, of prompts `ids` [B, S] that begin in column 0, [B, KV heads, S, head size]
    per layer. `lengths`: [B], how many tokens of each count. `share`: of each prompt's tokens, computed anew (at least one)."""
    model, cache = plain(decoder).model, _Blended(kv)
    hidden, positions = model.embed_tokens(ids), torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    columns = torch.arange(ids.shape[1], device=ids.device)
    for number, layer in enumerate(model.layers):
        if number == WHOLE_LAYERS:
            positions = _farthest(cache.layers[number - 1][1], kv[number - 1][1], lengths, share)
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[2]))
        cache.chosen = positions
        seen = (columns <= positions[..., None])[:, None]
        rope = model.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=seen, past_key_values=cache, use_cache=True, position_embeddings=rope)
    return cache.layers


def _farthest(own: torch.Tensor, base: torch.Tensor, lengths: torch.Tensor, share: float) -> torch.Tensor:
    """[B, C], ascending: the columns whose values differ most. For a prompt with fewer than C columns to choose, one of them is
    repeated: computing it twice changes nothing."""
    counts = (share * lengths).ceil().long().clamp(min=1)
    distance = (own.float() - base.float()).square().sum((1, 3))
    distance[torch.arange(distance.shape[1], device=own.device) >= lengths[:, None]] = -1.0
    order = distance.argsort(dim=1, descending=True)[:, : int(counts.max())]
    surplus = torch.arange(order.shape[1], device=own.device) >= counts[:, None]
    return torch.where(surplus, order[:, :1], order).sort(dim=1).values
