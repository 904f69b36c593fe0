"""An engine's process groups share one gloo thread that polls, and still work."""

import os
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, distributed_c10d

from prefillshare.kvshare_vllm.patches import gloo_loops

GROUPS = 5


@pytest.fixture
def groups(monkeypatch):
    """make() -> (groups, threads that came with them)"""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    # PyTorch's own, whatever engines have made of it in this process; what it was is put back at the end.
    monkeypatch.setattr(distributed_c10d, "ProcessGroupGloo", torch._C._distributed_c10d.ProcessGroupGloo)

    def make():
        before = set(os.listdir("/proc/self/task"))
        made = [distributed_c10d.ProcessGroupGloo(HashStore(), 0, 1, timedelta(seconds=10)) for _ in range(GROUPS)]
        return made, len(set(os.listdir("/proc/self/task")) - before)

    return make


def test_groups_share_one_polling_thread_and_still_work(groups):
    """Where they do so by themselves, PyTorch has learnt it: remove the class."""
    by_themselves, threads = groups()
    gloo_loops.share()
    gloo_loops.share()
    sharing, fewer = groups()
    assert threads - fewer == GROUPS - 1
    assert all(isinstance(group, distributed_c10d.ProcessGroupGloo) for group in sharing)
    for number, group in enumerate([*by_themselves, *sharing]):
        values = torch.full((3,), float(number))
        group.allreduce([values]).wait()
        group.barrier().wait()
        assert values.tolist() == [float(number)] * 3
