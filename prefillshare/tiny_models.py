"""Tiny random models for tests of protocol and faults: real architectures, weights that affect the output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from prefillshare.kvshare.contract import DecoderContract

TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.12,
    "tie_word_embeddings": True,
}
#: Some 200 million parameters: large enough that a GPU's time is spent in it.
SMALL = TINY | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.04,
}
_KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


#: Of a model without a tokenizer.
_WITHOUT_TOKENIZER = {"vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2}


def make_base(
    kind: str, folder: Path, tokenizer_from: Path | None = None, sizes: Mapping[str, int | float | bool] = TINY
) -> Path:
    """A random model of architecture `kind` with the tokenizer of another folder, or with none."""
    tokens = _WITHOUT_TOKENIZER
    if tokenizer_from is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
        tokenizer.save_pretrained(folder)
        tokens = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config_class, model_class = _KINDS[kind]
    torch.manual_seed(1)
    model_class(config_class(**tokens, **sizes)).save_pretrained(folder)
    return folder


def make_full_decoder(base: Path, folder: Path, seed: int, noise: float = 0.2, own_tokens: int = 1) -> Path:
    """The base with noise on every matrix, and with a contract that says it was trained against this base, and that it computes
    the last `own_tokens` of a prompt itself."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += torch.randn_like(parameter) * parameter.std() * noise
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    DecoderContract.of_base(base, trained_with="noise", own_tokens=own_tokens).write(folder)
    return folder
