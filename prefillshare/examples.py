"""Deployment files that come with the package."""

from __future__ import annotations

from pathlib import Path

import prefillshare
from prefillshare.kvshare.errors import ConfigError

#: Beside this package in a checkout, else inside it.
FOLDER = next(folder for root in prefillshare.__path__ if (folder := Path(root) / "deploy" / "configs").is_dir())


def scenarios() -> dict[str, str]:
    """Name of an example -> what it is for."""
    return {file.stem: file.read_text().splitlines()[0].removeprefix("# ") for file in sorted(FOLDER.glob("*.yaml"))}


def text(name: str) -> str:
    """The example's content. Raises ConfigError if there is none of this name."""
    if name not in (known := scenarios()):
        raise ConfigError(f"no example is called {name!r}", fix=f"one of {', '.join(known)}")
    return (FOLDER / f"{name}.yaml").read_text()
