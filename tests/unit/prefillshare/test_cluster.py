"""Deployments in clusters of their own are found again; what cannot be joined is told at once, with a fix."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import psutil
import pytest
from ray._private import node as ray_node
from ray._private import services
from ray._private.authentication import authentication_token_setup

from prefillshare import cluster
from prefillshare.cluster import Record
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.errors import ConfigError


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """runs(http_port, alive=) -> its address: a deployment in a cluster of its own."""
    monkeypatch.setattr(cluster.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    me = psutil.Process()

    def make(http_port, alive=True):
        started = me.create_time() if alive else 1.0
        record = Record(f"10.0.0.1:{http_port}", http_port, http_port + 1, me.pid, started)
        (cluster.folder() / f"{http_port}.json").write_text(json.dumps(asdict(record)))
        return record.address

    return make


def test_the_only_one_is_found_without_a_port(runs):
    address = runs(8000)
    assert cluster._of_this_machine(None) == address


def test_each_of_several_is_found_by_its_http_port(runs):
    addresses = {port: runs(port) for port in (8000, 8010)}
    assert {port: cluster._of_this_machine(port) for port in addresses} == addresses


def test_of_several_none_is_chosen_and_all_are_listed(runs):
    addresses = [runs(8000), runs(8010)]
    with pytest.raises(ConfigError, match="several deployments run here") as refused:
        cluster._of_this_machine(None)
    assert all(f"--address {address}" in str(refused.value) for address in addresses)


def test_another_deployments_cluster_is_not_taken_for_ones_own(runs):
    runs(8000)
    with pytest.raises(ConfigError, match=r"no deployment with router\.http_port 8010 runs here"):
        cluster._of_this_machine(8010)


def test_one_whose_process_has_died_is_forgotten(runs):
    runs(8000, alive=False)
    assert cluster._of_this_machine(None) == "auto"
    assert not list(cluster.folder().glob("*.json"))


def test_a_damaged_record_is_passed_over(runs):
    address = runs(8000)
    (cluster.folder() / "8010.json").write_text('{"address"')
    assert cluster._of_this_machine(None) == address


def test_records_of_somebody_else_are_not_believed(runs, monkeypatch):
    runs(8000)
    monkeypatch.setattr(cluster.os, "getuid", lambda: os.geteuid() + 1)
    (cluster.Path(cluster.tempfile.gettempdir()) / f"prefillshare-{os.geteuid() + 1}").mkdir()
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        cluster.records()


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("[::1]:6379", ("::1", 6379)),
        ("auto", None),
    ],
)
def test_an_address_names_host_and_port(monkeypatch, address, named):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster._named(address) == named


def test_what_nobody_listens_on_is_refused_before_ray_is_asked(monkeypatch):
    monkeypatch.setattr(cluster, "_init", lambda *args, **kw: pytest.fail("Ray was asked"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        refused = pytest.raises(ConfigError, match=rf"cluster\.address: nothing answers at {address}")
        with refused, cluster.joined(address, "cluster.address"):
            pass
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"nothing answers at {address}"), cluster.connected("auto"):
            pass


@pytest.mark.parametrize("error", [ConnectionError("x"), OSError("disk"), AssertionError("y"), KeyError("z"), TimeoutError()])
def test_whatever_ray_fails_with_is_one_message_with_a_fix(monkeypatch, error):
    def fails(**kw):
        raise error

    monkeypatch.setattr("ray.init", fails)
    with pytest.raises(ConfigError, match=f"Ray did not start: {type(error).__name__}.*fix: see the message"):
        cluster._init("local", "Ray did not start", "see the message")


@pytest.fixture
def fails_times(monkeypatch):
    """fails_times(n): Ray's next `n` starts fail; -> what was done, in order."""

    def make(n: int) -> list[str]:
        done = []

        class Node(ray_node.Node):
            def __init__(self):
                raise RuntimeError("the node timed out")

            def kill_all_processes(self, **kw):
                done.append("ended")

        def init(**kw):
            done.append("started")
            if done.count("started") <= n:
                Node()

        monkeypatch.setattr("ray.init", init)
        monkeypatch.setattr("ray.shutdown", lambda: None)
        return done

    return make


def test_a_start_that_failed_is_ended_and_tried_once_more(fails_times, caplog):
    done = fails_times(1)
    cluster._start()
    assert done == ["started", "ended", "started"]
    assert "the node timed out; trying once more" in caplog.text


def test_a_start_that_fails_twice_is_given_up_and_leaves_nothing(fails_times):
    done = fails_times(3)
    with pytest.raises(ConfigError, match=r"Ray did not start: RuntimeError: the node timed out .*doctor"):
        cluster._start()
    assert done == ["started", "ended"] * 2


def test_a_cluster_that_cannot_be_joined_is_tried_once(fails_times):
    done = fails_times(2)
    with socket.create_server(("127.0.0.1", 0)) as there:
        joined = cluster.joined(f"127.0.0.1:{there.getsockname()[1]}")
        with pytest.raises(ConfigError), joined:
            pass
    assert done.count("started") == 1


@pytest.fixture
def starts(runs, monkeypatch):
    """What Ray is started with; no Ray starts."""
    given = {}
    monkeypatch.setattr(cluster, "_init", lambda *args, **options: given.update(options, kept=kept_on_loopback()))
    monkeypatch.setattr(authentication_token_setup, "_enable_token_auth", lambda: given.update(tokens=True))
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:6379"))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    return given


def kept_on_loopback() -> bool:
    return services.resolve_ip_for_localhost("127.0.0.1") == "127.0.0.1"


def deployment(**router) -> Deployment:
    return Deployment.model_validate({"base": {"model": "m"}, "decode": [{"pool": "p", "model": "d"}], "router": router})


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_ray_is_on_loopback_where_the_surfaces_are(starts, monkeypatch, host, local):
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda _: "192.0.2.7")
    with cluster.started(deployment(host=host)):
        assert starts["tokens"]
        assert starts["kept"] is local
        assert starts.get("_node_ip_address") == ("127.0.0.1" if local else None)


def test_a_cluster_on_loopback_is_joined_there(starts, monkeypatch):
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda _: "192.0.2.7")
    with socket.create_server(("127.0.0.1", 0)) as there, cluster.joined(f"127.0.0.1:{there.getsockname()[1]}"):
        assert starts["kept"]


def test_a_cluster_that_asks_nobody_for_a_token_is_not_started(starts, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE is 'disabled'"), cluster.started(deployment()):
        pass
    assert not starts


def test_only_this_user_reads_the_token_that_ray_makes(starts, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray/auth_token"
    token.parent.mkdir()
    token.touch(0o644)
    with cluster.started(deployment()):
        assert token.stat().st_mode & 0o777 == 0o600


def test_a_cluster_named_by_its_address_or_by_ray_address_is_asked_with_the_token_that_there_is(starts, monkeypatch):
    """Ray would do so for clusters that it finds by itself only."""
    monkeypatch.setattr(authentication_token_setup.AuthenticationTokenLoader, "instance", lambda: SimpleNamespace(
        has_token=lambda ignore_auth_mode: True))  # fmt: skip
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as there:
        address = f"127.0.0.1:{there.getsockname()[1]}"
        with cluster.joined(address):
            assert starts.pop("tokens")
        monkeypatch.setenv("RAY_ADDRESS", address)
        with cluster.connected("auto"):
            assert starts["tokens"]


def test_a_cluster_that_does_not_let_this_user_in_is_told_with_what_it_wants(monkeypatch):
    def refuses(**kw):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr("ray.init", refuses)
    with socket.create_server(("127.0.0.1", 0)) as there:
        address = f"127.0.0.1:{there.getsockname()[1]}"
        wanted = rf"cannot join the Ray cluster at {address}: ConnectionError.*fix: give the cluster's token \(RAY_AUTH_TOKEN"
        with pytest.raises(ConfigError, match=wanted), cluster.joined(address):
            pass


#: Starts processes as Ray does, while gRPC is busy; prints how many of them became no program.
STARTS = """
import signal, subprocess, threading
from contextlib import suppress
from prefillshare import cluster
import grpc

def connect():
    while True:
        channel = grpc.insecure_channel("127.0.0.1:1")
        with suppress(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(timeout=0.01)
        channel.close()

for _ in range(2):
    threading.Thread(target=connect, daemon=True).start()
masked = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
print(sum(subprocess.run(["/bin/true"], preexec_fn=masked).returncode != 0 for _ in range(500)))
"""


@pytest.mark.slow
def test_grpc_ends_no_process_that_ray_starts():
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    done = subprocess.run([sys.executable, "-c", STARTS], env=clean, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stderr
