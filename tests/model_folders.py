"""The contents of small hand-made model folders: settings, and weights of a few bytes, as the lower layers read them."""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path

#: A Llama of 2 layers with 2 KV heads of size 8: one token's KV is 2*2*2*8 = 64 values, 256 bytes in float32.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
#: Linear module of a layer -> (outputs, inputs).
LINEAR = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
}  # fmt: skip
WEIGHTS = {
    "model.embed_tokens.weight": bytes(range(8)),
    **{f"model.layers.{layer}.{module}.weight": shape for layer in range(2) for module, shape in LINEAR.items()},
    "model.norm.weight": b"normnorm",
}


def write_safetensors(path: Path, tensors: dict[str, bytes | tuple[int, ...]]) -> Path:
    """Write the tensors in the order given, each as one row of bytes, or as float16 zeros of the given shape."""
    header, rows, start = {}, [], 0
    for name, data in tensors.items():
        whole = ("F16", list(data), bytes(2 * math.prod(data))) if isinstance(data, tuple) else ("U8", [len(data)], data)
        dtype, shape, row = whole
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(row)]}
        start += len(row)
        rows.append(row)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(rows))
    return path


def lora(modules: Iterable[str], rank: int = 8) -> dict[str, tuple[int, int]]:
    """Tensors of an adapter on these modules of every layer, under the names that PEFT gives them."""
    tensors = {}
    for layer in range(2):
        for module in modules:
            name, (outputs, inputs) = f"base_model.model.model.layers.{layer}.{module}", LINEAR[module]
            tensors |= {f"{name}.lora_A.weight": (rank, inputs), f"{name}.lora_B.weight": (outputs, rank)}
    return tensors
