"""Tells users which extra of this package brings a missing module."""

from __future__ import annotations

from prefillshare.kvshare.errors import ConfigError

_ENGINES = "'prefillshare[gpu]' where there are GPUs; on CPUs take a checkout and `make setup`"
_TRAINING = "'prefillshare[train]'"
_SUITES = "'prefillshare[eval]'"
#: Top-level module -> the extra that brings it. All other modules come with the engines.
_EXTRAS = {"peft": _TRAINING, "accelerate": _TRAINING, "gguf": _TRAINING}
_EXTRAS |= dict.fromkeys(("hassil", "home_assistant_intents", "reasoning_gym"), _SUITES)
_HERE = "prefillshare"


def missing(error: ModuleNotFoundError) -> ConfigError | None:
    """The error as a message for users; None if the missing module is our own, and belongs to no extra."""
    module = (error.name or "").partition(".")[0]
    if not module or module == _HERE:
        return None
    return ConfigError(f"{module} is not installed", fix=f"pip install {_EXTRAS.get(module, _ENGINES)}")
