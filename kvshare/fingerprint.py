"""Fingerprints of the contents of a model's files, however they are stored. Pure Python: no torch, no tensors in memory.

Weights are hashed tensor by tensor in order of name, so that sharding does not matter. Hashing 16 GB takes a minute;
results are remembered per set of files (path, size, time of change) in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
from pathlib import Path
from typing import Any

from prefillshare.kvshare.errors import ConfigError

#: Keys of config.json that do not change what the model computes.
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}
#: Keys that `rope` brings into one form.
_ROPE = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"}
_INDEX = "model.safetensors.index.json"
_CHUNK_BYTES = 1 << 22
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
#: A file younger than this may change again without a new time of change (clocks tick in milliseconds).
_SETTLED_S = 2.0


def weights(folder: str | Path) -> str:
    """SHA-256 over (name, dtype, shape, bytes) of every tensor in the folder's safetensors files."""
    files = weight_files(Path(folder))
    key = of_json([[str(f.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for f in files for s in [f.stat()]])
    if digest := _known().get(key):
        return digest
    tensors: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in files:
        for name, entry in safetensors_header(file).items():
            if name in tensors:
                raise ConfigError(f"tensor {name} is in both {tensors[name][0]} and {file}", fix="remove the stale file")
            tensors[name] = (file, entry)
    total = hashlib.sha256()
    for name in sorted(tensors):
        file, entry = tensors[name]
        total.update(f"{name}|{entry['dtype']}|{entry['shape']}|".encode())
        with file.open("rb") as source:
            source.seek(entry["start"])
            left = entry["bytes"]
            while left:
                chunk = source.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise ConfigError(f"{file} is cut short: tensor {name} is incomplete", fix="copy the file again")
                total.update(chunk)
                left -= len(chunk)
    digest = total.hexdigest()
    if all(time.time() - f.stat().st_mtime > _SETTLED_S for f in files):
        _remember(key, digest)
    return digest


def weight_files(folder: Path) -> list[Path]:
    """The files that the index names, if there is one (a folder may hold the weights in a second format, too), else all."""
    if not (folder / _INDEX).is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{folder} holds no *.safetensors file", fix="save the model in safetensors format")
        return files
    shards = read_json(folder, _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ConfigError(f"{folder / _INDEX} has no weight_map", fix="save the model again")
    files = [folder / name for name in sorted(set(shards.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}, which {_INDEX} names", fix="copy the missing files")
    return files


def config(folder: str | Path) -> str:
    """Hash of the keys of config.json that decide what the model computes; independent of the transformers version."""
    data = read_json(folder, "config.json")
    return of_json({k: v for k, v in data.items() if k not in _VOLATILE | _ROPE} | {"rope": rope(data)})


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings of a config.json in one form: transformers 5 writes `rope_parameters`, earlier ones several keys."""
    p = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    p.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    p["rope_type"] = p.pop("type", None) or p.get("rope_type") or "default"
    if p["rope_type"] in ("llama3", "yarn", "longrope"):
        trained = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        p.setdefault("original_max_position_embeddings", trained)
    if config.get("partial_rotary_factor") is not None:
        p.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in p.items()}


def tokenizer(folder: str | Path) -> str:
    """Hash of what turns text into ids: tokenizer.json without its padding and truncation settings."""
    try:
        content = hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()
    except OSError:
        content = ""  # read_json says what is wrong
    if content not in _tokenizers:
        data = read_json(folder, "tokenizer.json")
        _tokenizers[content] = of_json({k: v for k, v in data.items() if k not in ("padding", "truncation", "version")})
    return _tokenizers[content]


#: SHA-256 of a tokenizer.json's bytes -> its fingerprint, which is needed again at every change of a deployment.
_tokenizers: dict[str, str] = {}


def chat_template(folder: str | Path) -> str:
    """Hash of the chat template's text; "none" if the tokenizer has none."""
    file = Path(folder) / "chat_template.jinja"
    if file.is_file():
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {file}: {error}", fix="copy the file again") from None
    else:
        text = read_json(folder, "tokenizer_config.json").get("chat_template")
    return of_text(text) if isinstance(text, str) else ("none" if text is None else of_json(text))


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def of_json(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_json(folder: str | Path, name: str) -> dict[str, Any]:
    path = Path(folder) / name
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {name}", fix="give a complete model folder in Hugging Face format") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}", fix="copy the file again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return data


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> dtype, shape, start and length in bytes. Format: safetensors, 8 bytes of length, then JSON.

    Raises ConfigError for an incomplete file.
    """
    entries = {}
    try:
        with file.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            size = file.stat().st_size
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            for name, item in json.loads(source.read(length)).items():
                if name == "__metadata__":
                    continue
                begin, end = item["data_offsets"]
                numbers = (*item["shape"], begin, end)
                if not isinstance(item["dtype"], str) or not all(type(n) is int and n >= 0 for n in numbers):
                    raise ValueError(f"tensor {name} has no type, shape and place")
                if begin > end:
                    raise ValueError(f"tensor {name} has offsets {begin} to {end}")
                at = {"start": 8 + length + begin, "bytes": end - begin}
                entries[name] = {"dtype": item["dtype"], "shape": item["shape"], **at}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ConfigError(f"{file} is not a safetensors file: {error}", fix="copy or save the file again") from None
    for name, entry in entries.items():
        if entry["start"] + entry["bytes"] > size:
            raise ConfigError(f"{file} is cut short: tensor {name} is incomplete", fix="copy the file again")
    _check_layout(file, entries, 8 + length, size)
    return entries


def _check_layout(file: Path, entries: dict[str, dict[str, Any]], at: int, size: int) -> None:
    """The layout that the safetensors library requires: tensors without gaps up to the file's end, as large as their shapes."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1]["start"], item[1]["bytes"])):
        if entry["start"] != at:
            message = f"{file} is not a safetensors file: a gap or an overlap before tensor {name}"
            raise ConfigError(message, fix="save it again")
        at += entry["bytes"]
        item_bytes = _ITEM_BYTES.get(entry["dtype"])
        if item_bytes and math.prod(entry["shape"]) * item_bytes != entry["bytes"]:
            raise ConfigError(
                f"{file} is not a safetensors file: tensor {name} of shape {entry['shape']} has {entry['bytes']} bytes",
                fix="save it again",
            )
    if at != size:
        raise ConfigError(f"{file} is not a safetensors file: {size - at} bytes behind the last tensor", fix="save it again")


def cache_folder() -> Path:
    """The user's cache folder, for results that take time to compute."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prefillshare"


def _cache_file() -> Path:
    return cache_folder() / "fingerprints.json"


def _known() -> dict[str, str]:
    try:
        known = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(key: str, digest: str) -> None:
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(_known() | {key: digest}))
        part.replace(path)
    except OSError:
        pass  # a read-only home only costs time
