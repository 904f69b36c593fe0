"""The deployment file: read, checked field by field, and its files found (docs/configuration.md).

    tree.py   the fields, with meaning, range and default; router.py, placement.py and access.py are parts of it
    errors.py what is wrong with a file, in its own words
    files.py  what it names on disk
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prefillshare.kvshare.config.errors import as_config_error, shown
from prefillshare.kvshare.config.files import with_files_found
from prefillshare.kvshare.config.router import Router
from prefillshare.kvshare.config.tree import Base, Cluster, DecodePool, Deployment, Engines, Logs, Prefill, Tracing
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.yaml_tree import read


def parse(data: Any, folder: Path | None = None) -> Deployment:
    """Check a deployment given as plain data. Model paths become absolute. Raises ConfigError naming every bad field."""
    if not isinstance(data, dict):
        raise ConfigError(
            f"a deployment is a mapping with the keys {', '.join(Deployment.model_fields)}, got {shown(data)}",
            fix="deploy/configs/ holds one example per scenario",
        )
    try:
        deployment = Deployment.model_validate(data)
    except ValidationError as error:
        raise as_config_error(error, Deployment) from None
    return with_files_found(deployment, folder or Path.cwd())


def load(path: str | Path) -> Deployment:
    """Read and check a deployment file."""
    path = Path(path)
    data = read(path, "deployment file", fix="deploy/configs/ holds one example per scenario")
    return parse(data, path.resolve().parent)


__all__ = [
    "Base", "Cluster", "DecodePool", "Deployment", "Engines", "Logs", "Prefill", "Router", "Tracing", "load", "parse",
]  # fmt: skip
