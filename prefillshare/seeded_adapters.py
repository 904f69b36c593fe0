"""Small LoRA adapters made from a seed instead of by training: stand-ins with a visible effect for demos and tests.

The same name, rank and base shape give the same bytes in every process. Needs neither torch nor the base's weights
in memory: the shapes come from the headers of its safetensors files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from prefillshare.kvshare.contract import FILE as CONTRACT_FILE
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.errors import ConfigError

NAMES = ("planner", "coder", "tools")
#: Enough to change greedy output, not enough to garble it: on SmolLM2-135M 0.02 changes no token of a short answer, and with
#: 0.06 answers repeat themselves.
_STD = 0.045
#: The weight of a linear layer inside a transformer block, in the names transformers writes.
_LINEAR = re.compile(r"^(?P<module>(?:.+\.)?layers\.\d+\..+)\.weight$")


def make_seeded_adapters(
    base_folder: str | Path,
    target_folder: str | Path,
    names: tuple[str, ...] = NAMES,
    rank: int = 8,
    modules: Collection[str] | None = None,
    own_tokens: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Path]:
    """Write one PEFT adapter per name under the target folder, with its KV contract. It adapts the linear layers of the base's
    transformer blocks: those named in `modules` (such as "q_proj"), or all. `own_tokens`: name -> how many of a prompt's last
    tokens it computes itself, if not 1.

    A and B are both drawn from N(0, 0.045^2). Files that are right already are left alone, so this may run while an engine
    reads them. Returns name -> folder. Raises ConfigError for a base folder without safetensors or linear layers.
    """
    layers = adapted(linear_layers(Path(base_folder)), modules)
    folders = {}
    for name in names:
        folder = Path(target_folder) / name
        write_adapter(folder, layers, base_folder, name, rank)
        made = f"not trained: seeded adapter {name!r}, rank {rank}"
        contract = DecoderContract.of_base(base_folder, made, own_tokens=own_tokens.get(name, 1))
        if not _has(folder, contract):
            contract.write(folder)
        folders[name] = folder
    return folders


def write_adapter(folder: Path, layers: Mapping[str, tuple[int, int]], base_folder: str | Path, name: str, rank: int) -> None:
    """Write one adapter without a contract. `layers`: module name -> (out features, in features)."""
    folder.mkdir(parents=True, exist_ok=True)
    _put(folder / "adapter_model.safetensors", save(_tensors(layers, name, rank), {"format": "pt"}))
    _put(folder / "adapter_config.json", _config(layers, base_folder, rank))


def adapted(layers: Mapping[str, tuple[int, int]], modules: Collection[str] | None) -> dict[str, tuple[int, int]]:
    """Those of the layers that are named in `modules` (such as "q_proj"); None: all."""
    return {name: shape for name, shape in layers.items() if modules is None or name.rsplit(".", 1)[1] in modules}


def linear_layers(base: Path) -> dict[str, tuple[int, int]]:
    """Module name -> (out features, in features) of the linear layers in a base's transformer blocks. Raises ConfigError."""
    layers = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                shape = tensors.get_slice(name).get_shape()
                if (match := _LINEAR.match(name)) and len(shape) == 2:
                    layers[match["module"]] = (shape[0], shape[1])
    if not layers:
        raise ConfigError(f"{base} holds no linear layers in *.safetensors files", fix="give a Hugging Face model folder")
    return dict(sorted(layers.items()))


def _tensors(layers: Mapping[str, tuple[int, int]], name: str, rank: int) -> dict[str, np.ndarray]:
    seed = int.from_bytes(hashlib.sha256(f"prefillshare adapter {name}".encode()).digest()[:8], "big")
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (rows, columns) in layers.items():
        for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = random.standard_normal(shape, dtype=np.float32) * np.float32(_STD)
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = values
    return tensors


def _config(layers: Mapping[str, tuple[int, int]], base: str | Path, rank: int) -> bytes:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rsplit(".", 1)[1] for module in layers}),
        "inference_mode": True,
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def _put(path: Path, data: bytes) -> None:
    """Write `data` unless the file holds it already. The file is put in place by a rename, so no reader sees half of it."""
    if path.is_file() and path.read_bytes() == data:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)


def _has(folder: Path, contract: DecoderContract) -> bool:
    try:
        return (folder / CONTRACT_FILE).is_file() and DecoderContract.read(folder) == contract
    except ConfigError:
        return False

