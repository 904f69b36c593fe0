"""What is evaluated: a decoder with its base and the way in which it sees context."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, DynamicCache

from prefillshare.finetuning import grouped_attention
from prefillshare.finetuning.methods import METHODS, Method, method_of
from prefillshare.finetuning.recipe import FILE as RECIPE_FILE
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.errors import InvalidInput


@dataclass(frozen=True)
class Subject:
    """`method`: how it sees context; a method other than that of its training shows what this costs (naive sharing)."""

    name: str
    method: Method
    decoder: torch.nn.Module
    base: FrozenBase


def method_for(decoder: Path | None, name: str | None = None) -> Method:
    """The method called `name`, by default that by which a decoder's folder says it was trained ("ordinary" for the base), with
    as many own tokens as its contract has. Raises InvalidInput."""
    if decoder is None:
        return METHODS[name or "ordinary"]
    try:
        name = name or yaml.safe_load((decoder / RECIPE_FILE).read_text())["method"]
        return method_of(name, DecoderContract.read(decoder).own_tokens)
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        raise InvalidInput(f"{decoder} does not say by which method it was trained", field="--method", fix="name it") from None


def load_base(base: Path, dtype=torch.float32, device: str = "cpu", *, kept_bytes: int = 0) -> FrozenBase:
    return FrozenBase(_plain(base, dtype).to(device).eval(), kept_bytes)


def load(
    name: str,
    base: Path,
    decoder: Path | None,
    method: Method,
    *,
    dtype=torch.float32,
    device: str = "cpu",
    frozen=None,
    template: str | None = None,
) -> Subject:
    """`decoder`: folder of an adapter or of full weights; None: the base itself. `frozen`: the base, if it is loaded already.
    `template`: text of the chat template that is used instead of the base's own. Raises ContractMismatch if the decoder belongs
    to another base."""
    frozen = frozen or load_base(base, dtype, device)
    model = frozen.model
    if decoder is not None:
        DecoderContract.read(decoder).check(DecoderContract.of_base(base, template=template), str(decoder))
        model = _decoder(base, decoder, dtype).to(device).eval()
    return Subject(name, method, model, frozen)


def _plain(folder: Path, dtype):
    return grouped_attention.use(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def _decoder(base: Path, folder: Path, dtype):
    if not (folder / "adapter_config.json").is_file():
        return _plain(folder, dtype)
    from peft import PeftModel

    return PeftModel.from_pretrained(_plain(base, dtype), folder)


class FrozenBase:
    """The base as generation uses it. Its KV of prompts never changes: if several decoders are asked the same prompts, it is
    computed once, and kept within `kept_bytes`."""

    def __init__(self, model: torch.nn.Module, kept_bytes: int = 0):
        self.model, self._kept_bytes = model, kept_bytes
        self._kept: dict[bytes, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @torch.no_grad()
    def __call__(self, ids, positions, mask, cache) -> None:
        """Append the base's KV of these inputs to the cache."""
        self.model.model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True)

    def prompts(self, ids: torch.Tensor, cache, columns: int) -> None:
        """Append KV of the first columns of prompts [B, S] that begin in column 0; values behind a prompt's end are
        undefined."""
        key = hashlib.sha256(repr(ids.tolist()).encode()).digest()
        if (layers := self._kept.get(key)) is None:
            whole = DynamicCache()
            positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
            mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
            self(ids, positions, mask.expand(len(ids), 1, -1, -1), whole)
            layers = [(layer.keys, layer.values) for layer in whole.layers]
            self._keep(key, layers)
        for number, (keys, values) in enumerate(layers):
            cache.update(keys[:, :, :columns], values[:, :, :columns], number)

    @torch.no_grad()
    def entering(self, ids: torch.Tensor, layer: int) -> torch.Tensor:
        """Hidden states that enter a layer, [B, S, hidden size]."""
        return self.model.model(input_ids=ids, output_hidden_states=True).hidden_states[layer]

    def _keep(self, key: bytes, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        def size(of) -> int:
            return sum(tensor.nbytes for pair in of for tensor in pair)

        if size(layers) <= self._kept_bytes:
            self._kept[key] = layers
        while sum(map(size, self._kept.values())) > self._kept_bytes:
            del self._kept[next(iter(self._kept))]
