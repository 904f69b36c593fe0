"""Which changes of a deployment routers take over while they run, which replace them, which are refused
(kvshare/config/changes.py)."""

from __future__ import annotations

from prefillshare.kvshare.config import changes
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.yaml_tree import Node


def fixed_for_router(deployment: Node) -> object:
    """The fields that a running router cannot take over. When they change, it is replaced once its turns have ended."""
    return tuple((path, value) for path, change, value in changes.leaves(deployment) if not change.is_taken_over)


def taken_over(running: Node, wanted: Node) -> Node:
    """What a router that runs `running` serves when it is told to serve `wanted`: fixed fields stay as they were."""
    kept = {}
    for name, change in changes.of(type(wanted)).items():
        before = getattr(running, name)
        if change is None:
            kept[name] = taken_over(before, getattr(wanted, name))
        elif not change.is_taken_over:
            kept[name] = before
    return wanted.model_copy(update=kept)


def refuse(running: Node, wanted: Node, path: str = "") -> None:
    """Raises ConfigError for the first field that may not change. `path`: where both nodes are in the file."""
    for (field, change, before), (_, _, after) in zip(changes.leaves(running), changes.leaves(wanted), strict=True):
        if change.refused and before != after:
            raise ConfigError(change.refused, field=f"{path}{field}", fix=change.fix)
