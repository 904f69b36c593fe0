"""Maps of base KV, which a decoder trains and applies to the blocks that it takes in: the pool's KV stays shared, and a decode
engine's copy of it becomes the decoder's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prefillshare.finetuning.conditioned import LayersKV
from prefillshare.finetuning.recipe import Recipe
from prefillshare.finetuning.subjects import FrozenBase
from prefillshare.finetuning.train import Decoder
from prefillshare.finetuning.transcripts import Example
from prefillshare.kvshare.contract import KVShape

FILE = "kv_maps.safetensors"


class KVMaps(nn.Module):
    """Adds a map of low rank to each token's keys (as they are kept, rotated) and values in each layer; at first it adds
    nothing. It sees a token's KV of all heads of one layer."""

    def __init__(self, layers: int, width: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(layers, 2, width, rank) / width**0.5)
        self.up = nn.Parameter(torch.zeros(layers, 2, rank, width))

    def forward(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [contexts, KV heads, tokens, head size]."""
        return self._mapped(keys, layer, 0), self._mapped(values, layer, 1)

    def _mapped(self, kv: torch.Tensor, layer: int, which: int) -> torch.Tensor:
        added = kv.transpose(1, 2).flatten(2).float() @ self.down[layer, which] @ self.up[layer, which]
        return kv + added.unflatten(2, (kv.shape[1], kv.shape[3])).transpose(1, 2).to(kv.dtype)

    @classmethod
    def read(cls, folder: Path) -> KVMaps:
        tensors = load_file(folder / FILE)
        layers, _, width, rank = tensors["down"].shape
        maps = cls(layers, width, rank)
        maps.load_state_dict(tensors)
        return maps


class Mapping(Decoder):
    """A decoder that is trained together with maps of the base KV that it sees."""

    def __init__(self, recipe: Recipe, rank: int):
        super().__init__(recipe)
        shape = KVShape.of(recipe.base)
        self.maps = KVMaps(shape.layers, shape.kv_heads * shape.head_size, rank).to(self.device)

    def loss_sum(self, examples: Sequence[Example], kv: LayersKV | None) -> torch.Tensor:
        mapped = [self.maps(number, *(of.to(self.device) for of in layer)) for number, layer in enumerate(kv)]
        return super().loss_sum(examples, mapped)

    def trainable(self) -> dict[str, nn.Parameter]:
        return super().trainable() | {f"maps.{name}": parameter for name, parameter in self.maps.named_parameters()}

    def save_maps(self, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.maps.state_dict().items()}, folder / FILE)


class Mapped(FrozenBase):
    """A base whose KV of prompts goes through a decoder's maps."""

    def __init__(self, base: FrozenBase, maps: KVMaps):
        super().__init__(base.model)
        self._base, self._maps = base, maps

    @torch.no_grad()
    def prompts(self, ids: torch.Tensor, cache, columns: int) -> None:
        self._base.prompts(ids, _Through(cache, self._maps), columns)


def seen_by(decoder: Path | None, base: FrozenBase) -> FrozenBase:
    """The base as a decoder sees it: through its maps if its folder has any."""
    return Mapped(base, KVMaps.read(decoder)) if decoder and (decoder / FILE).is_file() else base


class _Through:
    """A cache that maps what it is given."""

    def __init__(self, cache, maps: KVMaps):
        self._cache, self._maps = cache, maps

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> None:
        self._cache.update(*self._maps(layer, keys, values), layer)
