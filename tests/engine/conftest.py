"""Systems and engines for tests that need real ones. Each module has one, which its tests share."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress

import pytest
from demo_model import smollm  # noqa: F401 - a fixture
from oracle import Oracle
from paused_imports import pytest_collection_finish, pytest_sessionstart  # noqa: F401 - hooks
from ports import free_port

from prefillshare import forkserver, records
from prefillshare.app import running
from prefillshare.client import Client
from prefillshare.kvshare.config import Deployment, parse
from prefillshare.kvshare_vllm.forkserver import spare
from prefillshare.platform import engine_environment


@pytest.fixture(scope="session", autouse=True)
def _engine_environment():
    """Give engines that are started in this process the environment that replicas get."""
    os.environ.update(engine_environment())


@pytest.fixture(scope="module", autouse=True)
def _own_environment(_engine_environment, _fork_server):
    """An engine that starts in this process leaves settings in the environment, as that it uses loopback only. They are not for
    the systems of other modules."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _fork_server(tmp_path_factory):
    """One fork server for all systems and for engines of this process, so that vLLM is imported only once."""
    from lent_spares import LentSpares

    name = f"tests-{os.getpid()}"
    with forkserver.running(records.folder(), name), pytest.MonkeyPatch.context() as patch:
        patch.setenv(forkserver.SETTING, name)
        server = forkserver.socket_of(records.folder(), name)
        patch.setattr(spare, "_spares", LentSpares(server, tmp_path_factory.mktemp("spares")))
        yield


class System:
    """A running deployment and a client for it."""

    def __init__(self, deployment: Deployment, handle, client: Client):
        self.deployment, self.handle, self.client = deployment, handle, client

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.deployment.router.http_port}/v1"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.deployment.router.grpc_port}"

    def info(self) -> dict[str, dict[str, dict]]:
        """Pool -> replica -> its description, and whether it is usable."""
        return self.handle.replica_info.remote().result(timeout_s=30)

    def stats_by_replica(self) -> dict[str, dict[str, dict[str, float]]]:
        return self.handle.replica_stats.remote().result(timeout_s=30)

    def stats(self) -> dict[str, dict[str, float]]:
        """Pool -> figures summed over its replicas."""
        pools = self.stats_by_replica()
        return {
            pool: {key: sum(r[key] for r in replicas.values()) for key in next(iter(replicas.values()))}
            for pool, replicas in pools.items()
        }

    def held(self) -> dict[str, float]:
        """Requests and KV blocks that are still held anywhere, by pool; empty if nothing is held."""
        left = {}
        for pool, figures in self.stats().items():
            for key in ("active", "running", "waiting", "blocks_used"):
                if figures[key]:
                    left[f"{pool}.{key}"] = figures[key]
        return left

    def wait_until_nothing_is_held(self, timeout_s: float = 20.0) -> None:
        """Fails with what is still held."""
        with suppress(AssertionError):
            wait_until(lambda: not self.held(), timeout_s)
        assert self.held() == {}


@contextmanager
def system(data: dict):
    """Start a deployment, given as plain data, on free ports and under a name of its own."""
    data = {**data, "router": {**data.get("router", {}), "http_port": free_port(), "grpc_port": free_port()}}
    data["name"] = f"test-{data['router']['http_port']}"
    deployment = parse(data)
    address = f"127.0.0.1:{deployment.router.grpc_port}"
    with running(deployment) as handle, Client(address, retries=None) as client:
        yield System(deployment, handle, client)


@pytest.fixture(scope="module")
def oracle(running: System) -> Oracle:
    """Of the module's own system, its fixture `running`."""
    return Oracle(running.deployment)


@pytest.fixture
def nothing_held_after(running: System):
    """When a test of the module's system has ended, no request and no KV block is held for long."""
    yield
    running.wait_until_nothing_is_held(30)


def ids(n: int, salt: int = 0) -> list[int]:
    """Token ids of a prompt; another salt gives another prompt."""
    return [(7 + 13 * i + 101 * salt) % 40000 for i in range(n)]


def wait_until(condition, timeout_s: float = 20.0, step_s: float = 0.1):
    """Poll `condition` until it returns something true; returns that, or fails with the last value."""
    import time

    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"still {value!r} after {timeout_s} s"
        time.sleep(step_s)
