"""What is evaluated: a decoder with its base and the way in which it sees context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

from finetuning import grouped_attention
from finetuning.generate import Base
from finetuning.methods import METHODS, Method
from kvshare.contract import DecoderContract
from kvshare.errors import InvalidInput


@dataclass(frozen=True)
class Subject:
    """`method`: how it sees context; another than it was trained with shows what that costs (naive sharing)."""

    name: str
    method: Method
    decoder: torch.nn.Module
    base: Base
    frozen: torch.nn.Module


def trained_for(decoder: Path | None) -> str:
    """The method a decoder's folder says it was trained by; the base sees its own KV. Raises InvalidInput."""
    if decoder is None:
        return "ordinary"
    try:
        return yaml.safe_load((decoder / "recipe.yaml").read_text())["method"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        raise InvalidInput(f"{decoder} does not say by which method it was trained", field="--method", fix="name it") from None


def load(name: str, base: Path, decoder: Path | None, method: str, *, dtype=torch.float32, device: str = "cpu") -> Subject:
    """`decoder`: folder of an adapter or of full weights, None: the base itself. Raises ContractMismatch for another base's."""
    frozen = grouped_attention.use(AutoModelForCausalLM.from_pretrained(base, dtype=dtype)).to(device).eval()
    model = frozen
    if decoder is not None:
        DecoderContract.read(decoder).check(DecoderContract.of_base(base), str(decoder))
        model = _decoder(base, decoder, dtype).to(device).eval()
    return Subject(name, METHODS[method], model, partial(_fill, frozen), frozen)


def _decoder(base: Path, folder: Path, dtype):
    if not (folder / "adapter_config.json").is_file():
        return grouped_attention.use(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    from peft import PeftModel

    return PeftModel.from_pretrained(grouped_attention.use(AutoModelForCausalLM.from_pretrained(base, dtype=dtype)), folder)


@torch.no_grad()
def _fill(base, ids, positions, mask, cache, *, hidden_states: bool = False) -> Sequence[torch.Tensor] | None:
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "past_key_values": cache}
    return base.model(**inputs, use_cache=True, output_hidden_states=hidden_states).hidden_states
