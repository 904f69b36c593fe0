"""Greedy answers offline, batched, over the served system's KV: the base's first, then the decoder's own or the base's.

    prefillshare  base KV of all prompt tokens but the last, or the last few; the decoder's own KV from there
    icarus        the base writes the KV of every token, the decoder predicts
    ordinary      the decoder computes everything
With `base_share` below 1 the decoder computes the end of the prompt's base part itself, as for the papers' collapse curve.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from prefillshare.finetuning import conditioned
from prefillshare.finetuning.conditioned import LayersKV, SharedKV, hidden_states, plain
from prefillshare.finetuning.methods import Method
from prefillshare.finetuning.subjects import FrozenBase
from prefillshare.finetuning.token_blend import blended
from prefillshare.kvshare.layer_group import LayerGroup


class _KV:
    """Used as a transformers cache: keys and values with room for all columns, so that appending does not copy earlier ones."""

    def __init__(self, columns: int):
        self._columns, self._used = columns, []
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, both [B, KV heads, new columns, head size]; returns all columns so far."""
        if layer == len(self._layers):
            rows, heads, _, size = keys.shape
            self._layers.append(tuple(keys.new_empty(rows, heads, self._columns, size) for _ in range(2)))
            self._used.append(0)
        begin, end = self._used[layer], self._used[layer] + keys.shape[2]
        for kept, new in zip(self._layers[layer], (keys, values), strict=True):
            kept[:, :, begin:end] = new
        self._used[layer] = end
        return self.layer(layer)

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._layers[number]
        return keys[:, :, : self._used[number]], values[:, :, : self._used[number]]

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [self.layer(number) for number in range(len(self._layers))]

    def get_seq_length(self, layer: int = 0) -> int:
        return self._used[layer] if layer < len(self._used) else 0

    def keep(self, rows: torch.Tensor) -> None:
        self._layers = [(keys[rows], values[rows]) for keys, values in self._layers]


class _Context:
    """KV of a batch whose rows differ in length. Columns are appended; `valid` says which of them count in which row."""

    def __init__(self, rows: int, columns: int, device):
        self.cache = _KV(columns)
        self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=device)

    def mask(self, new: torch.Tensor) -> torch.Tensor:
        """[B, 1, Q, columns + Q] for Q new columns; each sees those before it, and itself. `new`: [B, Q], which ones count."""
        rows, queries = new.shape
        before = self.valid[:, None].expand(-1, queries, -1)
        among = torch.ones(queries, queries, dtype=torch.bool, device=new.device).tril() & new[:, None]
        among = among | torch.eye(queries, dtype=torch.bool, device=new.device)  # a padded query sees itself: no row is empty
        return torch.cat([before, among.expand(rows, -1, -1)], dim=2)[:, None]

    def append(self, new: torch.Tensor) -> None:
        self.valid = torch.cat([self.valid, new], dim=1)

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.keep(rows)
        self.valid = self.valid[rows]


@torch.no_grad()
def generate(
    method: Method,
    decoder,
    base: FrozenBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int],
    device: torch.device | str = "cpu",
    base_share: float = 1.0,
    own_layers: LayerGroup | None = None,
    own_share: float = 0.0,
) -> list[list[int]]:
    """Tokens generated after each prompt, including the stop token if there is one. In the base's part of the prompt the
    decoder itself computes `own_layers` (DroidSpeak), or `own_share` of the tokens (CacheBlend)."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.stack([pad(torch.tensor(list(p)), (0, longest - len(p))) for p in prompts]).to(device)
    if method.own_kv:
        given = torch.tensor([int(method.base_tokens(len(prompt)) * base_share) for prompt in prompts], device=device)
        step = _OwnKV(decoder, base, ids, lengths, max_tokens, given, own_layers, own_share)
    else:
        step = _BaseKVOnly(decoder, base, ids, lengths, max_tokens)
    stops, answers = set(stop_ids), [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt to which each row of the batch belongs
    logits = step.first()
    for count in range(max_tokens):
        chosen = logits.argmax(-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if not stops & set(answers[row][-1:]):
                answers[row].append(token)
        going_on = [place for place, row in enumerate(rows) if answers[row][-1] not in stops]
        if not going_on or count == max_tokens - 1:
            return answers
        if len(going_on) <= len(rows) // 2:  # a few long answers need not carry the others along
            rows, kept = [rows[place] for place in going_on], torch.tensor(going_on, device=device)
            chosen, lengths = chosen[kept], lengths[kept]
            step.keep(kept)
        logits = step.next(chosen[:, None], (lengths + count)[:, None])
    return answers


class _Steps:
    """What the two ways of stepping have in common. `keep`: go on with these rows only."""

    _context: _Context

    def keep(self, rows: torch.Tensor) -> None:
        self._context.keep(rows)


class _OwnKV(_Steps):
    """Base KV of the first tokens of each prompt, `given` of them ([B]), the decoder's own KV of the rest and of what it
    generates."""

    def __init__(
        self,
        decoder,
        base: FrozenBase,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        max_tokens: int,
        given: torch.Tensor,
        own_layers: LayerGroup | None,
        own_share: float,
    ):
        self._decoder, self._ids, self._lengths = decoder, ids, lengths
        self._given = given
        prompt = int(self._given.max()) + int((lengths - self._given).max())
        self._context = _Context(len(ids), prompt + max_tokens, ids.device)
        if columns := int(self._given.max()):
            given = torch.arange(columns, device=ids.device) < self._given[:, None]
            base.prompts(ids, self._context.cache, columns)
            if own_layers:
                self._recompute(base, ids[:, :columns], own_layers)
            if own_share:
                own = blended(decoder, self._context.cache.layers(), ids[:, :columns], self._given, own_share)
                self._put(own, 0)
            self._context.append(given)

    def _recompute(self, base: FrozenBase, ids: torch.Tensor, group: LayerGroup) -> None:
        entering = base.entering(ids, group.first) if group.first else plain(self._decoder).model.embed_tokens(ids)
        self._put(conditioned.own_layers(self._decoder, entering, group), group.first)

    def _put(self, layers: LayersKV, first: int) -> None:
        for number, own in enumerate(layers, first):
            for kept, new in zip(self._context.cache.layer(number), own, strict=True):
                kept.copy_(new)

    def first(self) -> torch.Tensor:
        rest = self._lengths - self._given
        offsets = torch.arange(int(rest.max()), device=self._ids.device)
        valid = offsets < rest[:, None]
        positions = (self._given[:, None] + offsets).clamp(max=self._ids.shape[1] - 1)
        return self._run(self._ids.gather(1, positions), positions, valid, rest - 1)

    def next(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._run(ids, positions, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids[:, 0]))

    def _run(self, ids, positions, valid, last) -> torch.Tensor:
        """Logits of each row's last input."""
        context = self._context
        mask = context.mask(valid)
        context.append(valid)
        hidden = hidden_states(self._decoder, ids, positions, mask, context.cache, use_cache=True)
        return plain(self._decoder).lm_head(hidden[torch.arange(len(last), device=last.device), last])


class _BaseKVOnly(_Steps):
    """The base writes the KV of every token; the decoder reads it and writes none."""

    def __init__(self, decoder, base: FrozenBase, ids: torch.Tensor, lengths: torch.Tensor, max_tokens: int):
        self._decoder, self._base, self._ids, self._lengths = decoder, base, ids, lengths
        self._context = _Context(len(ids), ids.shape[1] + max_tokens, ids.device)
        columns = ids.shape[1]
        valid = torch.arange(columns, device=ids.device) < lengths[:, None]
        base.prompts(ids, self._context.cache, columns)
        self._context.append(valid)

    def first(self) -> torch.Tensor:
        last = (self._lengths - 1)[:, None]
        return self._predict(self._ids.gather(1, last), last)

    def next(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        new = torch.ones_like(ids, dtype=torch.bool)
        self._base(ids, positions, self._context.mask(new), self._context.cache)
        self._context.append(new)
        return self._predict(ids, positions)

    def _predict(self, ids, positions) -> torch.Tensor:
        kv = SharedKV(self._context.cache.layers(), own_is_seen=False)
        mask = self._context.valid[:, None, None]
        hidden = hidden_states(self._decoder, ids, positions, mask, kv)
        return plain(self._decoder).lm_head(hidden[:, -1])
