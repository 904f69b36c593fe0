"""A Ray cluster of our own, whose first start fails."""

from __future__ import annotations

import psutil
import pytest
from ray._private import services

from prefillshare import cluster
from prefillshare.kvshare.config import Deployment

pytestmark = pytest.mark.engine

DEPLOYMENT = Deployment.model_validate({"base": {"model": "m"}, "decode": [{"pool": "p", "model": "d"}]})


def named(processes) -> list[str]:
    """Names of those that are Ray's."""
    return sorted(process.name() for process in processes if process.name() in ("gcs_server", "raylet"))


def test_after_a_start_that_failed_one_cluster_runs_and_nothing_of_the_first(monkeypatch):
    get_node, before = services.get_node, psutil.Process().children(recursive=True)

    def once(*args):
        monkeypatch.setattr(services, "get_node", get_node)
        assert named(set(psutil.Process().children(recursive=True)) - set(before)) == ["gcs_server", "raylet"]
        raise TimeoutError("the node timed out")

    monkeypatch.setattr(services, "get_node", once)
    with cluster.started(DEPLOYMENT):
        started = set(psutil.Process().children(recursive=True)) - set(before)
        assert services.get_node is get_node, "no start failed"
        assert named(started) == ["gcs_server", "raylet"]
    _, left = psutil.wait_procs(started, timeout=30)
    assert not named(left)
