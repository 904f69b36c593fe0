"""Ray on loopback: a local cluster whose processes listen on 127.0.0.1 and nowhere else.

Ray replaces a loopback address by one that other machines can reach, both when it starts a cluster and when it joins one. It
does not do so on systems where it supports no clusters of several machines (macOS, Windows). A deployment whose surfaces are on
loopback needs the same on Linux: then every port that Ray, engines and routers open is on loopback.

A signal to this process's group (from a terminal, from `timeout`, from a shell that ends a job) is for this process alone,
which then ends Ray's in order. If they got it, too, running turns would be lost, and Ray would wait a minute for its own head.

Seam: ray/_private/services.py (`resolve_ip_for_localhost`, `get_node_ip_address`, `ConsolePopen`),
ray/_private/ray_constants.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from prefillshare.kvshare.loopback import is_loopback


@contextmanager
def loopback_kept(host: str | None) -> Iterator[None]:
    """Within this context `ray.init` keeps a loopback address, if `host` is one; Ray's processes inherit the setting."""
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


@contextmanager
def in_process_groups_of_their_own() -> Iterator[None]:
    """Within this context `ray.init` starts each of Ray's processes in a process group of its own. They end with this process
    all the same: Ray asks the kernel for that."""
    from ray._private import services

    stock = services.ConsolePopen
    services.ConsolePopen = partial(stock, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = stock
