"""What the extras of this package bring, for whoever has installed it without."""

from __future__ import annotations

from prefillshare.kvshare.errors import ConfigError

_ENGINES = "'prefillshare[gpu]' where there are GPUs; on CPUs take a checkout and `make setup`"
_TRAINING = "'prefillshare[train]'"
#: Top-level module -> the extra that brings it. Whatever else is missing comes with engines.
_EXTRAS = {"peft": _TRAINING, "accelerate": _TRAINING, "gguf": _TRAINING, "reasoning_gym": "'prefillshare[eval]'"}
_HERE = "prefillshare"


def missing(error: ModuleNotFoundError) -> ConfigError | None:
    """The same for people; None if it is no extra that is missing, but something of ours."""
    module = (error.name or "").partition(".")[0]
    if not module or module == _HERE:
        return None
    return ConfigError(f"{module} is not installed", fix=f"pip install {_EXTRAS.get(module, _ENGINES)}")
