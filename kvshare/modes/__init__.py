"""Sharing modes: one class per mode that declares its policy. Nothing outside this package compares mode names."""

from prefillshare.kvshare.modes.base import SharingMode
from prefillshare.kvshare.modes.droidspeak import DroidSpeak
from prefillshare.kvshare.modes.icarus import Icarus
from prefillshare.kvshare.modes.none import PerModel
from prefillshare.kvshare.modes.prefillshare import PrefillShare

_MODES: dict[str, SharingMode] = {mode.name: mode for mode in (PrefillShare(), Icarus(), DroidSpeak(), PerModel())}


def get_mode(name: str) -> SharingMode:
    """The mode called `name`; KeyError lists the known ones."""
    try:
        return _MODES[name]
    except KeyError:
        raise KeyError(f"unknown sharing mode {name!r}; known: {', '.join(mode_names())}") from None


def mode_names() -> tuple[str, ...]:
    return tuple(_MODES)


def modes() -> tuple[SharingMode, ...]:
    return tuple(_MODES.values())


__all__ = ["SharingMode", "get_mode", "mode_names", "modes"]
