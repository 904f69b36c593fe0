"""Base KV of the training prompts, computed once: the base is frozen, so an example's KV is the same in every epoch.

One file per example, up to a budget. The first examples are kept, since every epoch asks for all of them once; the KV of those
that do not fit is computed again. Each is computed alone, so that it does not depend on what it is batched with. Only if
nothing is kept at all, those of a batch are computed side by side (much faster on a GPU, the same except for rounding).
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prefillshare.finetuning.conditioned import LayersKV, side_by_side

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"


class BaseKVStore:
    """`compute`: contexts -> their KV, side by side. `folder`: for this base and dtype only; files that it holds are used."""

    def __init__(self, folder: Path, budget_bytes: int, compute: Callable[[Sequence[Sequence[int]]], LayersKV]):
        self._folder, self._budget, self._compute = folder, budget_bytes, compute
        self._keeps = budget_bytes > 0
        folder.mkdir(parents=True, exist_ok=True)
        self._sizes = {file.stem: file.stat().st_size for file in folder.glob(f"*{_SUFFIX}")}
        self._used = sum(self._sizes.values())
        #: Tokens whose KV was read, and tokens whose KV was computed.
        self.read_tokens = self.computed_tokens = 0

    @property
    def used_bytes(self) -> int:
        return self._used

    def get(self, contexts: Sequence[Sequence[int]]) -> LayersKV:
        """KV of contexts, given as token ids: [contexts, KV heads, tokens of the longest, head size] per layer."""
        if not self._keeps and not self._sizes:
            self.computed_tokens += sum(map(len, contexts))
            return self._compute(contexts)
        return side_by_side([self._one(context) for context in contexts])

    def _one(self, token_ids: Sequence[int]) -> LayersKV:
        name = hashlib.blake2b(array("I", token_ids).tobytes(), digest_size=16).hexdigest()
        file = self._folder / f"{name}{_SUFFIX}"
        if name in self._sizes:
            self.read_tokens += len(token_ids)
            return [(keys, values) for keys, values in load_file(file)["kv"]]
        self.computed_tokens += len(token_ids)
        kv = [(keys.cpu(), values.cpu()) for keys, values in self._compute([token_ids])]
        self._keep(name, file, kv)
        return kv

    def _keep(self, name: str, file: Path, kv: LayersKV) -> None:
        """Write [layers, 2, 1, KV heads, tokens, head size], if there is room, and rename: a file is whole or not there."""
        size = 2 * len(kv) * kv[0][0].nbytes
        if self._used + size > self._budget:
            return
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            save_file({"kv": torch.stack([torch.stack(layer) for layer in kv])}, part)
            part.replace(file)
        except (OSError, SafetensorError) as error:
            logger.warning("base KV is not kept any more: %s", error)
            part.unlink(missing_ok=True)
            self._budget = 0
            return
        self._sizes[name] = size
        self._used += size
