"""Ray on loopback: a local cluster whose processes listen on 127.0.0.1 and nowhere else.

Ray replaces a loopback address by one that other machines reach, when it starts a cluster as well as when it joins one, unless
it runs where it supports no clusters of several machines (macOS, Windows). A deployment whose surfaces are on loopback wants
what Ray does there: then all that Ray opens, and all that engines and routers open beside it, is on loopback.

Seam: ray/_private/services.py (`resolve_ip_for_localhost`, `get_node_ip_address`), ray/_private/ray_constants.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefillshare.kvshare.loopback import is_loopback


@contextmanager
def loopback_kept(host: str | None) -> Iterator[None]:
    """`ray.init` inside takes a loopback address as it is, if `host` is one; Ray's processes inherit that."""
    from ray._private import ray_constants

    if host is None or not is_loopback(host):
        yield
        return
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, enabled = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
