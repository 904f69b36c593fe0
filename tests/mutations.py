"""Strategies that change what is right: plain data and bytes, and how long to look for what is not refused as it should be."""

from __future__ import annotations

import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: `make test` looks at the same cases each time; with FUZZ_EXAMPLES=N in the environment, N others are looked at. What is found
#: is kept in .hypothesis/, and looked at first from then on.
_OTHERS = int(os.environ.get("FUZZ_EXAMPLES", 0))
LOOKED_AT = settings(
    max_examples=_OTHERS or 60, derandomize=not _OTHERS, deadline=None, suppress_health_check=list(HealthCheck)
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
#: Values that YAML makes and JSON does not.
YAML_SCALARS = SCALARS | st.binary(max_size=8) | st.dates()


def values(scalars=SCALARS):
    keys = st.text(max_size=8)
    return st.recursive(scalars, lambda of: st.lists(of, max_size=3) | st.dictionaries(keys, of, max_size=3), max_leaves=8)


def places(data, path=()):
    """Paths to everything in a tree."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def trees(draw, data, scalars=SCALARS):
    """The data with one to three values changed, taken away or added. `data`: is not changed itself."""
    root = [json.loads(json.dumps(data))]
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([(0, *path) for path in places(root[0])]))
        parent = root
        for key in way:
            parent = parent[key]
        change = draw(st.sampled_from(("value", "drop", "add")))
        if change == "value":
            parent[last] = draw(values(scalars))
        elif change == "drop" and way:
            del parent[last]
        elif isinstance(parent[last], dict):
            parent[last][draw(st.text(max_size=8))] = draw(values(scalars))
    return root[0]


@st.composite
def changed_bytes(draw, content: bytes):
    """The content cut short, with bytes changed, or with something put in between."""
    change = draw(st.sampled_from(("cut", "flip", "insert", "empty", "repeat")))
    at = draw(st.integers(0, len(content)))
    if change == "cut":
        return content[:at]
    if change == "flip":
        new = draw(st.binary(min_size=1, max_size=8))
        return content[:at] + new + content[at + len(new) :]
    if change == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=64)) + content[at:]
    return b"" if change == "empty" else content * 2
