"""The cache-conditioned forward pass: a transformers model that attends to base KV instead of computing all KV itself.

Works for every model that passes its keys and values through `past_key_values.update` and takes a 4D mask (Llama, Qwen3).
Masks and positions say what is seen; everything else is the model's own forward pass.

Seam: transformers' Cache.update; GradientCheckpointingLayer._can_checkpoint_with_cache
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache

from prefillshare.finetuning.methods import Method, View
from prefillshare.finetuning.transcripts import Example
from prefillshare.kvshare.layer_group import LayerGroup

#: Keys and values per layer, each [contexts, KV heads, tokens, head size].
LayersKV = Sequence[tuple[torch.Tensor, torch.Tensor]]


class SharedKV:
    """Used as a cache: the base's KV, followed by the decoder's own KV of this pass if that is seen at all. It keeps nothing,
    as a checkpointed layer may ask again. `layers`: [batch, KV heads, L, head size] keys and values."""

    def __init__(self, layers: LayersKV, own_is_seen: bool):
        self._layers, self._own_is_seen = layers, own_is_seen

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        base_keys, base_values = (kv.to(keys.dtype) for kv in self._layers[layer])
        if not self._own_is_seen:
            return base_keys, base_values
        return torch.cat([base_keys, keys], dim=2), torch.cat([base_values, values], dim=2)

    def get_seq_length(self, layer: int = 0) -> int:
        return self._layers[0][0].shape[2]


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded on the right. B examples, S inputs, L base tokens.

    input_ids, positions, labels: [B, S], labels -100 where nothing is learnt. mask: [B, 1, S, L or L + S], True where seen.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    kv: SharedKV | None

    @property
    def response_tokens(self) -> int:
        return int((self.labels != -100).sum())


@torch.no_grad()
def base_kv(base, contexts: Sequence[Sequence[int]]) -> LayersKV:
    """The frozen base's KV of contexts, in one forward pass without its language-model head: [contexts, KV heads, tokens of the
    longest, head size] per layer; values behind a context's end are undefined."""
    longest = max(map(len, contexts))
    ids = torch.stack([pad(torch.tensor(list(context)), (0, longest - len(context))) for context in contexts])
    cache = plain(base).model(ids.to(next(base.parameters()).device), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def side_by_side(kvs: Sequence[LayersKV]) -> LayersKV:
    """KV of several contexts, each [1, KV heads, tokens, head size], padded and stacked as `base_kv` gives it."""
    longest = max(kv[0][0].shape[2] for kv in kvs)

    def stack(layer, which: int) -> torch.Tensor:
        return torch.cat([pad(kv[which], (0, 0, 0, longest - kv[which].shape[2])) for kv in layer])

    return [(stack(layer, 0), stack(layer, 1)) for layer in zip(*kvs, strict=True)]


@torch.no_grad()
def own_layers(decoder, hidden: torch.Tensor, group: LayerGroup) -> LayersKV:
    """The decoder's own KV of a group of layers (DroidSpeak): keys and values, [B, KV heads, S, head size]. `hidden`: [B, S,
    hidden size], what enters the first of them."""
    model, own = plain(decoder).model, DynamicCache()
    rope = model.rotary_emb(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
    for layer in model.layers[group.first : group.last + 1]:
        hidden = layer(hidden, attention_mask=None, past_key_values=own, use_cache=True, position_embeddings=rope)
    return [(layer.keys, layer.values) for layer in own.layers[group.first :]]


def make_batch(method: Method, examples: Sequence[Example], kv: LayersKV | None, device: torch.device | str) -> Batch:
    """`kv`: the base's, of at least the examples' leading `base_tokens`; unused by methods that see no base KV."""
    views = [method.view(example) for example in examples]
    most_inputs, most_base = max(len(v.inputs) for v in views), max(v.base_tokens for v in views)
    rows = [_row(example, view, most_inputs, most_base) for example, view in zip(examples, views, strict=True)]
    input_ids, positions, labels, mask = (torch.stack(column).to(device) for column in zip(*rows, strict=True))
    seen = None
    if most_base:
        layers = [tuple(of[:, :, :most_base].to(device, non_blocking=True) for of in layer) for layer in kv]
        seen = SharedKV(layers, own_is_seen=views[0].own_seen is not None)
    return Batch(input_ids, positions, labels, mask[:, None], seen)


def _row(example: Example, view: View, inputs: int, base: int) -> tuple[torch.Tensor, ...]:
    ids = torch.tensor(example.token_ids)
    missing = inputs - len(view.inputs)
    labels = torch.where(view.is_response, ids[view.inputs + 1], -100)
    seen = [pad(view.base_seen, (0, base - view.base_tokens, 0, missing))]
    if view.own_seen is not None:
        seen.append(pad(view.own_seen, (0, missing, 0, missing)))
    mask = torch.cat(seen, dim=1)
    mask[len(view.inputs) :, 0] = True  # a row that sees nothing would become NaN
    return pad(ids[view.inputs], (0, missing)), pad(view.inputs, (0, missing)), pad(labels, (0, missing), value=-100), mask


def hidden_states(decoder, input_ids, positions, mask, kv, *, use_cache: bool = False) -> torch.Tensor:
    """[B, S, hidden size] of a transformers model, or of one that PEFT has put an adapter into."""
    return plain(decoder).model(
        input_ids=input_ids, position_ids=positions, attention_mask=mask, past_key_values=kv, use_cache=use_cache
    ).last_hidden_state


def plain(decoder):
    """The transformers model inside a PEFT model, with the adapter's layers in place."""
    return getattr(decoder, "get_base_model", lambda: decoder)()


def response_logits(decoder, batch: Batch) -> torch.Tensor:
    """[response tokens of the batch, vocabulary], row by row, in float32. The head is computed only at these positions."""
    hidden = hidden_states(decoder, batch.input_ids, batch.positions, batch.mask, batch.kv)
    return plain(decoder).lm_head(hidden[batch.labels != -100]).float()


def loss_sum(decoder, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of the batch's response tokens, summed, in float32."""
    return cross_entropy(response_logits(decoder, batch), batch.labels[batch.labels != -100], reduction="sum")


@torch.no_grad()
def log_probabilities(decoder, batch: Batch) -> list[list[float]]:
    """Per example, the log-probability of each response token."""
    learnt = batch.labels != -100
    chosen = response_logits(decoder, batch).log_softmax(-1).gather(-1, batch.labels[learnt][:, None])[:, 0]
    return [row.tolist() for row in chosen.split(learnt.sum(1).tolist())]


def allow_checkpointing(decoder) -> None:
    """Turn on gradient checkpointing, also for layers that read a SharedKV."""
    decoder.gradient_checkpointing_enable({"use_reentrant": False})
    decoder.enable_input_require_grads()
    for module in decoder.modules():
        if hasattr(module, "_can_checkpoint_with_cache"):
            module._can_checkpoint_with_cache = True
