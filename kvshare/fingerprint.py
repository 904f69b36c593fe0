"""Fingerprints of a model's files: what they are, not how they are stored. Pure Python: no torch, no tensors in memory.

Weights are hashed tensor by tensor in order of name, so that sharding does not matter. Hashing 16 GB takes a minute;
results are remembered per file (path, size, time of change) in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

from kvshare.errors import ConfigError

#: Keys of config.json that do not change what the model computes.
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}
_CHUNK_BYTES = 1 << 22


def weights(folder: str | Path) -> str:
    """SHA-256 over (name, dtype, shape, bytes) of every tensor in the folder's safetensors files."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} holds no *.safetensors file", fix="save the model in safetensors format")
    remembered = _remembered(files)
    if remembered.get("digest"):
        return remembered["digest"]
    tensors = {}
    for file in files:
        for name, entry in _header(file).items():
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
    _remember(remembered["key"], digest)
    return digest


def config(folder: str | Path) -> str:
    data = {k: v for k, v in read_json(folder, "config.json").items() if k not in _VOLATILE}
    return of_json(data)


def tokenizer(folder: str | Path) -> str:
    """Hash of what turns text into ids: tokenizer.json without its padding and truncation settings."""
    data = read_json(folder, "tokenizer.json")
    return of_json({k: v for k, v in data.items() if k not in ("padding", "truncation", "version")})


def chat_template(folder: str | Path) -> str:
    """Hash of the chat template's text; "none" where the tokenizer has none."""
    file = Path(folder) / "chat_template.jinja"
    text = file.read_text() if file.is_file() else read_json(folder, "tokenizer_config.json").get("chat_template")
    return hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else ("none" if text is None else of_json(text))


def of_json(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_json(folder: str | Path, name: str) -> dict[str, Any]:
    path = Path(folder) / name
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {name}", fix="give a complete model folder in Hugging Face format") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return data


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> dtype, shape, start and length in bytes. Format: safetensors, 8 bytes of length, then JSON."""
    try:
        with file.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            if length > file.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(source.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(f"{file} is not a safetensors file: {error}", fix="copy or save the file again") from None
    entries = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        begin, end = item["data_offsets"]
        entries[name] = {"dtype": item["dtype"], "shape": item["shape"], "start": 8 + length + begin, "bytes": end - begin}
    return entries


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prefillshare" / "fingerprints.json"


def _remembered(files: list[Path]) -> dict[str, str]:
    key = of_json([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    try:
        return {"key": key, "digest": json.loads(_cache_file().read_text()).get(key, "")}
    except (OSError, ValueError, AttributeError):
        return {"key": key, "digest": ""}


def _remember(key: str, digest: str) -> None:
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        known[key] = digest
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(known))
        part.replace(path)
    except OSError:
        pass  # a read-only home only costs time
