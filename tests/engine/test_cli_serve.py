"""`prefillshare serve` as an operator runs it: its process, where it listens, a signal, and turns that go on to their end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import clean_environment
import psutil
import pytest
import ray
import yaml
import zmq
from channels import HANDSHAKE, REPLAY, listeners, turned_away
from conftest import ids, wait_until
from ports import free_port
from ray import serve
from test_system_kinds import deployment

from prefillshare import cluster, forkserver, which
from prefillshare.app import TWICE_S
from prefillshare.client import Client
from prefillshare.kvshare.engine_settings import SHARED_PREFILL
from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare_vllm.engine.ray_node import channel_secret

pytestmark = pytest.mark.engine

COMMAND = Path(sys.executable).with_name("prefillshare")


@dataclass
class Serving:
    process: subprocess.Popen
    data: dict
    client: Client

    def connected(self):
        """Connected to its Ray cluster, as other commands are."""
        return cluster.joined(which.found(self.data["name"], None).address)

    def processes(self) -> list[psutil.Process]:
        """Its own process, and all processes that it has started."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]


@pytest.fixture(scope="module")
def data(tmp_path_factory, smollm) -> dict:
    """A deployment with one pool of decoders."""
    data = deployment(tmp_path_factory.mktemp("models"), smollm)
    return data | {"decode": data["decode"][:1]}


@pytest.fixture(scope="module")
def serving(tmp_path_factory, data):
    with served(tmp_path_factory.mktemp("serve"), data) as serving:
        yield serving


@contextmanager
def served(folder: Path, data: dict):
    """`prefillshare serve` of the deployment, on ports and under a name of its own, when it is ready."""
    data = data | {"router": {"http_port": free_port(), "grpc_port": free_port()}}
    data["name"] = f"test-{data['router']['http_port']}"
    data["cluster"] = {"kv_lease_s": 6}  # a stopping engine waits for what it has lent
    (folder / "d.yaml").write_text(yaml.safe_dump(data))
    own_fork_server = {name: value for name, value in os.environ.items() if name != forkserver.SETTING}
    process = subprocess.Popen([COMMAND, "serve", folder / "d.yaml"], env=own_fork_server, process_group=0)
    try:
        with Client(f"127.0.0.1:{data['router']['grpc_port']}", retries=None) as client:

            def ready():
                assert process.poll() is None, "the server ended before it was ready"
                try:
                    return client.not_ready_because() == ""
                except Unavailable:
                    return False

            wait_until(ready, timeout_s=400, step_s=1)
            yield Serving(process, data, client)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def command(*arguments: str) -> subprocess.CompletedProcess:
    narrow = os.environ | {"COLUMNS": "80"}
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=120, env=narrow)


def test_status_tells_decoders_and_replicas_and_nothing_of_rays(serving):
    name = serving.data["name"]
    told = command("status", "--json", "--name", name)
    assert (told.returncode, told.stderr) == (0, "")
    found = json.loads(told.stdout)
    assert found["deployment"]["name"] == name
    assert found["deployment"]["sessions"] == 0
    assert 10 < found["deployment"]["up_s"] < 600
    assert [one["state"] for one in found["routers"]] == ["usable"]
    assert all(0 < one["up_s"] < 600 for one in (*found["replicas"], *found["routers"]))
    assert {decoder["decoder"] for decoder in found["decoders"]} == {d.name for d in serving.client.decoders()}
    assert len({decoder["base_fingerprint"] for decoder in found["decoders"]}) == 1
    assert {replica["pool"] for replica in found["replicas"]} == {"prefill", serving.data["decode"][0]["pool"]}
    assert all(replica["usable"] and replica["stats"]["blocks_total"] for replica in found["replicas"])
    text = command("status", "--name", name)
    assert (text.returncode, text.stderr) == (0, "")
    assert text.stdout.startswith(f"{name}   up ")
    assert max(map(len, text.stdout.splitlines())) <= 80


def test_sessions_turns_and_hits_are_counted(serving):
    def deployment() -> dict:
        return json.loads(command("status", "--json", "--name", serving.data["name"]).stdout)["deployment"]

    before, session = deployment(), serving.client.create_session(token_ids=ids(70, salt=3))
    for number in range(3):
        session.turn("a", token_ids=ids(5, salt=number), max_tokens=2, ignore_eos=True)
    after = wait_until(lambda: (told := deployment())["sessions"] == 1 and told, 20, 1)  # the router counts them every 5 s
    assert after["turns"]["ended"] - before["turns"]["ended"] == 3
    assert after["prompt_tokens"]["cached"] - before["prompt_tokens"]["cached"] >= 2 * 64
    assert 0 < after["hit_ratio"] < 1
    session.delete()


def test_a_second_deployment_of_the_name_is_refused_and_apply_says_what_it_speaks_to(serving, tmp_path):
    file = tmp_path / "d.yaml"
    file.write_text(yaml.safe_dump(serving.data))
    again = command("serve", file)
    assert again.returncode == 2
    assert f"name: a deployment of this name runs already: {serving.data['name']}: base base, HTTP port" in again.stderr
    applied = command("apply", file)
    (told, *_) = applied.stderr.splitlines()
    assert (applied.returncode, applied.stdout) == (0, "")
    assert told.startswith(f"{serving.data['name']} at 127.0.0.1:")
    file.write_text(yaml.safe_dump(serving.data | {"name": "another"}))
    refused = command("apply", file)
    assert refused.returncode == 2
    assert "no deployment 'another' runs on this machine; these do:" in refused.stderr
    with serving.connected() as address:
        pass
    refused = command("apply", file, "--address", address)
    assert f"name: the running deployment is called {serving.data['name']}" in refused.stderr


def test_a_router_that_hangs_is_an_error_within_ten_seconds(serving):
    found = json.loads(command("status", "--json", "--name", serving.data["name"]).stdout)
    router = psutil.Process(found["routers"][0]["pid"])
    router.suspend()
    try:
        began = time.monotonic()
        told = command("status", "--name", serving.data["name"])
        assert time.monotonic() - began < 10
        assert told.returncode == 2
        assert told.stderr.startswith("error: the router does not answer: ")
        assert "\n  prefill: healthy\n" in told.stderr
    finally:
        router.resume()


def test_with_a_local_host_everything_listens_on_loopback(serving):
    serving.client.create_session().turn("a", token_ids=ids(70), max_tokens=2, ignore_eos=True)
    found = [*listeners(psutil.Process(serving.process.pid))]
    router = serving.data["router"]
    assert {router["http_port"], router["grpc_port"]} <= {one.port for one in found}
    assert [one for one in found if not one.on_loopback] == []


def test_engines_tell_nobody_without_the_deployments_key_what_they_hold(serving):
    with serving.connected():
        info = cluster.running_handle().replica_info.remote().result(timeout_s=30)
        prefill = serve.get_deployment_handle(SHARED_PREFILL, app_name=cluster.APP)
        handoff = prefill.prefill.remote(ids(100, salt=9), "handshake").result(timeout_s=60).handoff
    events = [replica["kv_events"] for pool in info.values() for replica in pool.values()]
    assert len(events) == 2
    for one in events:
        assert turned_away(zmq.SUB, one["endpoint"])
        assert turned_away(zmq.DEALER, one["replay_endpoint"], REPLAY)
    assert turned_away(zmq.REQ, "tcp://{remote_host}:{remote_port}".format(**handoff.transfer), [HANDSHAKE])


def test_the_key_stands_in_no_command_line_and_in_no_log(serving):
    with serving.connected():
        secret, folder = channel_secret(), Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    assert len(secret) == 64
    assert not [one for one in serving.processes() if one.is_running() and secret in " ".join(one.cmdline())]
    logs = [file for file in folder.rglob("*.*") if file.is_file()]
    assert len(logs) > 5
    assert not [file for file in logs if secret.encode() in file.read_bytes()]


TURN = """
import sys
from prefillshare.client import Client
with Client(sys.argv[1], retries=None) as client:
    turn = client.create_session(token_ids=[3, 4, 5]).turn("a", token_ids=[6], max_tokens=3, ignore_eos=True)
print(*turn.token_ids)
"""


def test_the_client_as_pip_installs_it_takes_a_turn(serving, tmp_path):
    """The package is installed without extras: no torch, no Ray, no vLLM."""
    python = clean_environment.install(clean_environment.wheel(tmp_path), tmp_path / "env")
    address = f"127.0.0.1:{serving.data['router']['grpc_port']}"
    done = subprocess.run([python, "-I", "-c", TURN, address], capture_output=True, text=True, timeout=60)
    assert (len(done.stdout.split()), done.stderr) == (3, "")


def test_a_deployment_of_another_name_runs_beside_it_and_a_second_signal_ends_it_at_once(serving, data, tmp_path):
    with served(tmp_path, data) as other:
        one, two = (one.client.create_session(token_ids=ids(70, salt=8)) for one in (serving, other))
        asked = {"token_ids": ids(5), "max_tokens": 8, "ignore_eos": True}
        assert one.turn("a", **asked).token_ids == two.turn("a", **asked).token_ids
        unsure = command("status", "--json")
        assert unsure.returncode == 2
        assert {serving.data["name"], other.data["name"]} <= set(re.findall(r"test-\d+", unsure.stderr))
        told = json.loads(command("status", "--json", "--name", other.data["name"]).stdout)
        assert told["deployment"]["name"] == other.data["name"]
        processes = other.processes()
        long = iter(two.stream("a", token_ids=ids(40), max_tokens=180, ignore_eos=True))
        next(long)
        began = time.monotonic()
        other.process.send_signal(signal.SIGTERM)
        other.process.send_signal(signal.SIGTERM)  # as `timeout` does, which signals the process and its group
        time.sleep(2 * TWICE_S)
        assert other.process.poll() is None
        other.process.send_signal(signal.SIGINT)
        assert other.process.wait(timeout=30) == 130
        assert time.monotonic() - began < 20
        with pytest.raises(Unavailable):
            list(long)
        # Two agents of Ray's end when they have given up its control store.
        wait_until(lambda: not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 120)
    assert one.turn("a", **asked).usage.cached_tokens > 0
    assert json.loads(command("status", "--json").stdout)["deployment"]["name"] == serving.data["name"]


def test_sigterm_lets_the_running_turn_end_and_the_process_goes_with_status_zero(serving):
    """Also if it goes to all of the process group, as from a terminal or from `timeout`."""
    stream = serving.client.create_session().stream("a", token_ids=ids(40), max_tokens=120, ignore_eos=True)
    pieces = [next(stream)]
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    os.killpg(serving.process.pid, signal.SIGTERM)
    reader.join(timeout=40)
    assert pieces[-1].done.usage.completion_tokens == 120
    assert serving.process.wait(timeout=60) == 0
