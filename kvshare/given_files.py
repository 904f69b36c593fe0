"""Files and folders that a user names, looked at before any work begins. All commands use these checks, which raise ConfigError
with the field and a fix.

They read headers and settings only. Without them, transformers and PEFT take the name of a folder that is not there, or lacks a
file, for that of a repository, and ask a hub for it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefillshare.kvshare import adapter_files, adapter_settings, fingerprint
from prefillshare.kvshare.adapter_settings import AdapterSettings
from prefillshare.kvshare.contract import DecoderContract, KVShape
from prefillshare.kvshare.errors import ConfigError, about

_MODEL_FIX = "give the folder of a model in Hugging Face format"


def folder(path: Path, field: str) -> None:
    """A folder of any kind."""
    _is_folder(path, field, "give the path of a folder")


def model(folder: Path, field: str) -> None:
    """A model with its tokenizer."""
    _is_folder(folder, field, _MODEL_FIX)
    with about(field):
        _weights_of_model(folder)
        fingerprint.tokenizer(folder)
        fingerprint.chat_template(folder)


def model_shape(file: Path, field: str) -> None:
    """The config.json of a model, whose weights need not be there."""
    readable(file, field)
    with about(field):
        config = fingerprint.read_json(file.parent, file.name)
        KVShape.of_config(config, str(file))


def decoder(folder: Path, base: Path, field: str, template: str | None = None) -> None:
    """An adapter or a model with weights of its own, which was trained against this base and chat template (text; None: the
    base's own). Raises ContractMismatch as well."""
    weights(folder, field)
    with about(field):
        if (folder / adapter_settings.FILE).is_file():
            settings = AdapterSettings.read(str(folder))
            adapter_files.check(str(folder), settings, adapter_files.linear_modules(str(base)))
        DecoderContract.read(folder).check(DecoderContract.of_base(base, template=template), str(folder))


def weights(folder: Path, field: str) -> None:
    """The weights of an adapter or of a model, whatever it was trained against."""
    fix = "give the folder of a LoRA adapter saved by PEFT or of a model in Hugging Face format"
    _is_folder(folder, field, fix)
    with about(field):
        if (folder / adapter_settings.FILE).is_file():
            fingerprint.read_json(folder, adapter_settings.FILE)
            file = folder / adapter_files.FILE
            if not file.is_file():
                raise ConfigError(f"{folder} has no {file.name}", fix="save the adapter again, with PEFT's save_pretrained")
            fingerprint.safetensors_header(file)
        elif (folder / "config.json").is_file():
            _weights_of_model(folder)
        else:
            raise ConfigError(f"{folder} has neither {adapter_settings.FILE} nor config.json", fix=fix)


def readable(file: Path, field: str) -> None:
    """A file of any kind."""
    if not file.is_file():
        what = "a folder, not a file" if file.is_dir() else "not there"
        raise ConfigError(f"{file} is {what}", field=field, fix="give the path of a file")
    with about(field), _readable(file):
        file.open("rb").close()


def lines(file: Path, field: str) -> None:
    """A text file in UTF-8 that is not empty."""
    readable(file, field)
    fix = "give a file of JSON lines in UTF-8"
    with about(field), _readable(file):
        try:
            with file.open(encoding="utf-8") as text:
                is_empty = not text.read(1)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8: {error}", fix=fix) from None
        if is_empty:
            raise ConfigError(f"{file} is empty", fix=fix)


def writable(file: Path, field: str) -> None:
    """A file that will be written. Folders above it are made."""
    if file.is_dir():
        raise ConfigError(f"{file} is a folder", field=field, fix="give the path of a file")
    if file.exists() and not os.access(file, os.W_OK):
        raise ConfigError(f"{file} may not be written", field=field, fix="give another file, or change its permissions")
    writable_folder(file.parent, field)


def writable_folder(folder: Path, field: str) -> None:
    """A folder in which files will be written; it is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}", field=field, fix="give another place") from None


def made_folder(folder: Path, field: str) -> None:
    """A folder that will be made, or made anew."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder", field=field, fix="give another place")
    writable_folder(folder.parent, field)


def _weights_of_model(folder: Path) -> None:
    KVShape.of(folder)
    for file in fingerprint.weight_files(folder):
        fingerprint.safetensors_header(file)


def _is_folder(folder: Path, field: str, fix: str) -> None:
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "not there"
        raise ConfigError(f"{folder} is {what}", field=field, fix=fix)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", fix="give another file, or change its permissions") from None
