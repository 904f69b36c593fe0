"""Clusters are started on loopback and with tokens, and joined; what cannot be started or joined is told with a fix."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from ray._private import node as ray_node
from ray._private import services
from ray._private.authentication import authentication_token_setup

from prefillshare import cluster, ray_address, ray_messages, records
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.errors import ConfigError, Unavailable


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The folder of records."""
    monkeypatch.setattr(records.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return records.folder()


@pytest.fixture(autouse=True)
def _rays_words(monkeypatch):
    monkeypatch.setattr(ray_messages, "to_file", lambda: None)


@pytest.fixture
def answers(monkeypatch):
    """Every address answers as a Ray cluster; -> those that were asked."""
    asked = []
    monkeypatch.setattr(ray_address, "check", lambda address, field=None: asked.append((address, field)))
    return asked


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


def test_a_cluster_that_cannot_be_joined_is_tried_once(fails_times, answers):
    done = fails_times(2)
    with pytest.raises(ConfigError), cluster.joined("10.0.0.1:6379"):
        pass
    assert done.count("started") == 1


@pytest.fixture
def starts(mine, answers, monkeypatch):
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
    with cluster.joined("127.0.0.1:6379") as address:
        assert (address, starts["kept"]) == ("127.0.0.1:6379", True)


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


def test_there_is_a_private_token_before_ray_would_make_one(starts, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    token, seen = tmp_path / ".ray/auth_token", []
    monkeypatch.setattr(cluster, "_start", lambda **_: seen.append((token.read_text(), token.stat().st_mode & 0o777)))
    for _ in range(2):
        with cluster.started(deployment()):
            pass
    (first, mode), again = seen
    assert (len(first) >= 32, mode, again) == (True, 0o600, (first, 0o600))
    assert list(token.parent.iterdir()) == [token]


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_is_given_is_left_alone(starts, monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(name, "given")
    with cluster.started(deployment()):
        assert not (tmp_path / ".ray/auth_token").exists()


def test_what_the_address_auto_stands_for_is_asked_first_and_joined(starts, answers, monkeypatch):
    monkeypatch.setattr(ray_address, "on_this_machine", lambda: ["10.0.0.1:6379"])
    with cluster.joined("auto", "cluster.address") as address:
        assert address == "10.0.0.1:6379"
    assert answers == [("10.0.0.1:6379", "cluster.address")]


def test_of_several_clusters_none_is_joined_silently(starts, answers, monkeypatch):
    monkeypatch.setattr(ray_address, "on_this_machine", lambda: ["10.0.0.1:6379", "10.0.0.1:6380"])
    refused = pytest.raises(ConfigError, match=r"cluster\.address: 2 Ray clusters run on this machine: 10\.0\.0\.1:6379, 10")
    with refused, cluster.joined("auto", "cluster.address"):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6380")
    with cluster.joined("auto", "cluster.address") as address:
        assert address == "10.0.0.1:6380"


def test_a_cluster_that_does_not_let_this_user_in_is_told_with_what_it_wants(answers, monkeypatch):
    def refuses(**kw):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr("ray.init", refuses)
    wanted = r"cannot join the Ray cluster at 10\.0\.0\.1:6379: ConnectionError.*fix: give the cluster's token \(RAY_AUTH_TOKEN"
    with pytest.raises(ConfigError, match=wanted), cluster.joined("10.0.0.1:6379"):
        pass


def test_what_runs_leaves_a_record_while_it_runs(starts):
    with cluster.started(deployment(http_port=8010)):
        (record,) = records.records()
        assert (record.name, record.address, record.http_port) == ("prefillshare", "127.0.0.1:6379", 8010)
    assert records.records() == []
    there = Deployment.model_validate({**deployment().model_dump(), "cluster": {"address": "10.0.0.1:6379"}})
    with cluster.lent_to(there):
        assert [record.address for record in records.records()] == ["10.0.0.1:6379"]
    assert records.records() == []


def test_a_name_that_is_taken_is_refused_before_anything_starts(starts, answers):
    with cluster.started(deployment()):
        starts.clear()
        with pytest.raises(ConfigError, match=r"name: a deployment of this name runs already: prefillshare: base m,"):
            cluster.check(deployment(http_port=8010))
        assert not starts


def test_where_nothing_runs_that_is_said_and_a_hanging_serve_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(cluster, "FOUND_S", 0.05)
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_, **kw: (_ for _ in ()).throw(KeyError("none")))
    with pytest.raises(ConfigError, match="nothing is running there"):
        cluster.running_handle()
    never = threading.Event()
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_, **kw: never.wait(10))
    with pytest.raises(Unavailable, match="Ray Serve does not answer"):
        cluster.running_handle()
    never.set()


#: Starts processes as Ray does, while gRPC, imported before what starts clusters, is busy; prints how many became no program.
STARTS = """
import signal, subprocess, threading
from contextlib import suppress
from prefillshare.client import Client
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
