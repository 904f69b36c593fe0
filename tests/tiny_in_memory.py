"""Tiny random models in memory, and adapters that change their output."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
}  # fmt: skip
KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def model(kind: str, seed: int):
    config, made = KINDS[kind]
    torch.manual_seed(seed)
    return made(config(**SIZES)).eval()


def with_adapter(base, modules):
    torch.manual_seed(5)
    decoder = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), init_lora_weights=False))
    return decoder.eval()
