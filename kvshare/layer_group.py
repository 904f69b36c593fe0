"""A contiguous group of layers that a decoder computes itself over reused KV (DroidSpeak, arXiv 2411.02820, section 4)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class LayerGroup:
    """Layers `first` to `last`, both included and counted from 0. Written "4-9"."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"layers {self.first}-{self.last} are no group; the first is at least 0 and not after the last")

    @classmethod
    def parse(cls, text: str) -> LayerGroup:
        """Raises ValueError."""
        if not (found := re.fullmatch(r"(\d+)-(\d+)", text)):
            raise ValueError(f"{text!r} is no group of layers; write the first and the last, like 4-9")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer <= self.last

    def __len__(self) -> int:
        return self.last - self.first + 1

    @property
    def transition(self) -> int | None:
        """The layer whose input the prefill side must keep (E-cache); None if the group begins with the embedding."""
        return self.first or None


def layer_group(text: str) -> LayerGroup | None:
    """The group that a configuration's text names; None for "none". Raises ValueError."""
    return None if text == "none" else LayerGroup.parse(text)


@dataclass(frozen=True)
class OwnLayers:
    """For one request: its first `shared_tokens` tokens pass through the layers of `group` only."""

    shared_tokens: int
    group: LayerGroup


def ecache_parts(hidden_size: int, kv_heads: int, head_size: int, ranks: int = 1) -> int:
    """Number of cache layers of the model's KV shape that hold the input of one layer, on each of `ranks` tensor-parallel
    ranks."""
    return -(-(hidden_size // ranks) // (2 * max(1, kv_heads // ranks) * head_size))


def block_salt(cache_salt: str | None, group: LayerGroup | None) -> str | None:
    """Salt of a decode engine's blocks: KV that a decoder made with one group is never taken for that of another (R2)."""
    return cache_salt if group is None else f"{cache_salt or ''} own layers {group}"
