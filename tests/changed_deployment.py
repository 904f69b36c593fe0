"""Changes of a deployment's tree, and what is said of one that is wrong."""

from __future__ import annotations

import pytest

from prefillshare.kvshare import config
from prefillshare.kvshare.errors import ConfigError


def put(data: dict, path: str, value) -> dict:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    node = data
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
    node[last] = value
    return data


def refusal(data) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.parse(data)
    return caught.value
