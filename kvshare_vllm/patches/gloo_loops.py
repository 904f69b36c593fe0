"""One gloo thread per process instead of one per process group.

vLLM makes a dozen process groups, also where an engine is a single process, and PyTorch gives each a gloo device of its own: a
thread that wakes a hundred times a second to look for the end of its work. Groups can share a device. Thirteen took 2 % of a
core while nothing ran, one takes 0.4 %.

Seam: torch/distributed/distributed_c10d.py, `ProcessGroupGloo` (torch/csrc/distributed/c10d/init.cpp, its second constructor)

Goes when: PyTorch's groups share a device by themselves, or vLLM makes no groups in an engine of one process.
"""

from __future__ import annotations

import os
from datetime import timedelta

from torch.distributed import distributed_c10d


def share() -> None:
    """From now on, gloo groups made in this process share devices. May be called again."""
    stock = getattr(distributed_c10d, "ProcessGroupGloo", None)
    if stock is None or hasattr(stock, "devices"):
        return

    class SharingGroup(stock):
        devices: tuple = ()

        def __init__(self, store, rank, size, timeout: timedelta | stock._Options = distributed_c10d.default_pg_timeout):
            options = timeout
            if isinstance(timeout, timedelta):
                SharingGroup.devices = SharingGroup.devices or tuple(_devices(stock))
                options = stock._Options()
                options._timeout, options._devices = timeout, list(SharingGroup.devices)
                options._threads = 2 * len(SharingGroup.devices)
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharingGroup


def _devices(group_class):
    """Devices as the constructor that takes a timeout makes them."""
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    return [group_class.create_device(interface=name) for name in names] or [group_class.create_default_device()]
