"""Checks the weights of a LoRA adapter (adapter_model.safetensors), tensor by tensor, against its settings and its base.

vLLM loads the tensors that it finds a place for and silently drops the rest: such an adapter answers as the base, or as half of
itself. An adapter that passes this check has a place for every tensor, tensors for every module that its settings name, and the
right shapes.

Seam: vllm/lora/lora_model.py (`from_lora_tensors`), vllm/lora/model_manager.py (`activate_adapter`)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.adapter_settings import AdapterSettings
from prefillshare.kvshare.errors import ConfigError

FILE = "adapter_model.safetensors"

#: Name of a linear module -> (outputs, inputs); None if it is stored packed, so that its shape does not tell them.
LinearModules = Mapping[str, tuple[int, int] | None]

_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")
#: A linear module of the base's layers, under the name that both transformers and PEFT give it.
_LINEAR = re.compile(r"(?P<module>.*\.\d+\..+)\.(?P<kind>weight|qweight|weight_packed)")
#: Tensors of other kinds that an adapter's file may hold, by their names.
_OTHERS = (
    (r"\.lora_[AB]\.[^.]+\.weight$", "has the adapter's own name in it", "save it with PEFT's save_pretrained"),
    (r"\.lora_magnitude_vector", "is DoRA's", None),
    (r"\.bias$", "is a bias", None),
    (r"lora_embedding_|\.(embed_\w+|token_adapter|lm_head|wte|wpe)\.", "is of the embeddings or the head of the model", None),
    (r"\.(score|classifier|qa_outputs)\.", "is of a classification head", "train it to generate text (task_type CAUSAL_LM)"),
)
_LAYERS_ONLY = "train it on the linear modules of the base's layers alone, or merge it and serve it as a `model`"
_FLOATS = ("F16", "BF16", "F32", "F64")


def linear_modules(base: str) -> LinearModules:
    """The linear modules of the base's layers, as in its weight files. Embeddings and the head are not among them."""
    modules: dict[str, tuple[int, int] | None] = {}
    for file in fingerprint.weight_files(Path(base)):
        for name, entry in fingerprint.safetensors_header(file).items():
            if (match := _LINEAR.fullmatch(name)) and len(entry["shape"]) == 2:
                packed = match["kind"] != "weight" or entry["dtype"] == "U8"
                modules[match["module"]] = None if packed else (entry["shape"][0], entry["shape"][1])
    return modules


def place_elements(base: LinearModules, rank: int) -> int:
    """How many numbers an engine keeps room for, per adapter of this rank on every linear module whose shape is known."""
    return sum(rank * sum(shape) for shape in base.values() if shape)


def check(folder: str, settings: AdapterSettings, base: LinearModules) -> frozenset[str]:
    """Returns the names of the modules that the adapter adapts. Raises ConfigError for the first tensor that has no place, for
    one that is missing, and for shapes that do not fit the base or the settings."""
    file = Path(folder) / FILE
    if not file.is_file():
        raise ConfigError(f"{folder} has no {FILE}", fix="save the adapter in safetensors format")
    pairs: dict[str, dict[str, list[int]]] = {}
    for name, entry in fingerprint.safetensors_header(file).items():
        match = _LORA.fullmatch(name)
        if match is None or match["module"] not in base:
            raise _no_place(file, name, match["module"] if match else None, base)
        if entry["dtype"] not in _FLOATS:
            raise ConfigError(f"{file}: {name} has type {entry['dtype']}", fix=f"save it in one of {', '.join(_FLOATS)}")
        pairs.setdefault(match["module"], {})[match["letter"]] = entry["shape"]
    if not pairs:
        raise ConfigError(f"{file} holds no tensors", fix="save the adapter again, after training")
    for module, shapes in pairs.items():
        _check_pair(file, module, shapes, settings.rank_of(module), base[module])
    _check_targets(folder, settings, pairs.keys(), base)
    return frozenset(pairs)


def _no_place(file: Path, name: str, module: str | None, base: LinearModules) -> ConfigError:
    for pattern, what, fix in _OTHERS:
        if re.search(pattern, name):
            return ConfigError(f"{file}: {name} {what}; engines would not use it", fix=fix or _LAYERS_ONLY)
    if module is None:
        wanted = "base_model.model.MODULE.lora_A.weight and .lora_B.weight"
        return ConfigError(f"{file}: {name} is no tensor that PEFT writes for LoRA ({wanted})", fix=_LAYERS_ONLY)
    for there in base:
        if module.endswith(f".{there}") or there.endswith(f".{module}"):
            return ConfigError(
                f"{file}: {name} is under another prefix than the base's {there}",
                fix="save it with PEFT from the base that is served here, not from a model that contains it",
            )
    kinds = {_anywhere(there) for there in base}
    if _anywhere(module) in kinds:
        last = max(int(number) for there in base for number in re.findall(r"\.(\d+)\.", there)[:1])
        return ConfigError(
            f"{file}: {name} is of a layer that the base does not have; its last is {last}", fix="give an adapter of this base"
        )
    return ConfigError(f"{file}: {name} is of a module that the base does not have", fix="give an adapter of this base")


def _anywhere(module: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", module, count=1)


def _check_pair(file: Path, module: str, shapes: Mapping[str, list[int]], rank: int, linear: tuple[int, int] | None) -> None:
    if len(shapes) < 2:
        (there,) = shapes
        raise ConfigError(
            f"{file}: {module} has lora_{there} and no lora_{'B' if there == 'A' else 'A'}", fix="save the adapter again"
        )
    a, b = shapes["A"], shapes["B"]
    if len(a) != 2 or len(b) != 2:
        raise ConfigError(f"{file}: {module} has lora_A of {a}, lora_B of {b}; both are matrices", fix="save the adapter again")
    if (a[0], b[1]) != (rank, rank):
        raise ConfigError(
            f"{file}: {module} has rank {a[0]} (lora_A) and {b[1]} (lora_B), adapter_config.json says {rank}",
            fix="set r, or the module's rank in rank_pattern, to what it was trained with",
        )
    if linear and (b[0], a[1]) != linear:
        raise ConfigError(
            f"{file}: {module} has {b[0]} outputs and {a[1]} inputs, the base's has {linear[0]} and {linear[1]}",
            fix="give an adapter of this base",
        )


def _check_targets(folder: str, settings: AdapterSettings, adapted: Collection[str], base: LinearModules) -> None:
    """The file must hold what the settings name and nothing else: PEFT would leave the rest out, vLLM would not."""
    if more := [module for module in adapted if not settings.adapts(module)]:
        raise ConfigError(
            f"{folder}/{FILE} has {more[0]}, which target_modules in adapter_config.json does not name",
            fix="set target_modules to the modules that the adapter was trained on",
        )
    # Experts are separate modules in some releases of transformers only.
    missing = [module for module in base if ".experts." not in module and settings.adapts(module) and module not in adapted]
    if missing:
        raise ConfigError(
            f"{folder}/{FILE} lacks {missing[0]}, which target_modules in adapter_config.json names",
            fix="save the adapter again, whole, or set target_modules to the modules that it was trained on",
        )
