"""The chart's pods on three hosts, with prefill and decode on different ones and KV over TCP: results are exact, also after an
upgrade, when a link is cut for a while and when a host is gone. The hosts are network namespaces, which need root;
tests/chart.py plays KubeRay's part."""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml
from chart import groups, ray_start, rendered, serve_config
from conftest import ids, wait_until
from oracle import TOLERANCE, Oracle

from benchmarks.shared.hosts import Hosts, why_not
from prefillshare import forkserver
from prefillshare.client import Client, collect
from prefillshare.kvshare import metrics_text
from prefillshare.kvshare.config import parse
from prefillshare.kvshare.errors import DeadlineExceeded, Unavailable
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(bool(why := why_not()), reason=f"network namespaces need root and iproute2: {why}"),
]

BIN = Path(sys.executable).parent
TOKEN = secrets.token_hex(32)
RAY_PORT, DASHBOARD, GRPC, HTTP, METRICS = 6379, 8265, 9000, 8000, 8080
#: Environment of every process of the cluster. The hosts share one memory here; KV must take the network all the same.
ENV = {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "UCX_TLS": "tcp",
    # As KubeRay sets them (authOptions).
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    # A host whose link is cut for some seconds is not yet lost.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "25",
}
LOAD_TIMEOUT_S, WEDGED_S, CUT_S = 4, 6, 3


class Cluster:
    """`values`: the chart's values, as installed."""

    def __init__(self, hosts, values: dict, client: Client):
        (self.head, *self.decoding), self.values, self.client = hosts, values, client
        self._dashboard = f"http://{self.head.address}:{DASHBOARD}/api/serve/applications/"
        self.oracle = Oracle(parse(values["deployment"]))
        self.upgrade()

    def upgrade(self) -> None:
        """Apply changed values, as KubeRay does."""
        self._ask("PUT", json=serve_config(rendered(self.values)))

    def _ask(self, method: str, **what) -> httpx.Response:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.request(method, self._dashboard, headers=headers, timeout=60, trust_env=False, **what).raise_for_status()

    def message(self) -> str:
        """Why Ray Serve has not deployed what it was told to, as a RayService shows it."""
        told = self._ask("GET").json()["applications"]
        return told["prefillshare"]["message"] if told else ""

    def serves(self, *decoders: str) -> bool:
        try:
            return {d.name for d in self.client.decoders()} == {*decoders} and not self.client.not_ready_because()
        except (Unavailable, DeadlineExceeded):
            return False

    def replicas(self) -> list[dict]:
        address = f"{self.head.address}:{RAY_PORT}"
        told = self.head.run([BIN / "prefillshare", "status", "--json", "--address", address], **ENV)
        return json.loads(told.splitlines()[-1])["replicas"]

    def usable(self) -> dict[str, set[str]]:
        """Pool -> addresses of the hosts that have a usable replica of it."""
        found: dict[str, set[str]] = {}
        for replica in self.replicas():
            if replica["usable"]:
                found.setdefault(replica["pool"], set()).add(replica["node"])
        return found

    def turn(self, decoder: str, prompt: list[int], tokens: int = 12, while_running=None):
        """Take a turn and check that it agrees with the reference. `while_running()` is called after some tokens."""
        pieces, session = [], self.client.create_session()
        for piece in session.stream(decoder, token_ids=prompt, max_tokens=tokens, ignore_eos=True, logprobs=0, timeout_s=120):
            pieces.append(piece)
            if while_running and sum(len(p.token_ids) for p in pieces) >= 8:
                while_running()
                while_running = None
        turn = collect(pieces)
        assert len(turn.token_ids) == tokens
        assert self.oracle.diff(decoder, prompt, turn.token_ids, turn.logprobs) <= TOLERANCE
        return turn

    def host_of(self, replica: str):
        (node,) = [one["node"] for one in self.replicas() if one["replica"] == replica]
        (host,) = [host for host in self.decoding if host.address == node]
        return host


def start(host, folder: Path, group: dict, head: str = "") -> None:
    """Start a pod of the group."""
    first = {"port": f"{RAY_PORT}", "temp-dir": f"{folder / 'ray'}"}
    labels = f"{forkserver.LABEL}={os.environ[forkserver.SETTING]}"
    here = {"node-ip-address": host.address, "num-cpus": "2", "object-store-memory": "100000000", "labels": labels}
    command = ray_start(group, **({"address": f"{head}:{RAY_PORT}"} if head else first), **here)
    (container,) = group["template"]["spec"]["containers"]
    env = {e["name"]: e["value"] for e in container["env"] if e["name"] != "HOME"}
    log = folder / f"node-{host.address}.log"
    process = host.start(["bash", "-c", command], log, **ENV, **env)

    def joined() -> bool:
        assert process.poll() is None, log.read_text()
        return "Ray runtime started" in log.read_text()

    wait_until(joined, 120)  # two at once would choose the same socket names


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, smollm):
    made = tmp_path_factory.mktemp("hosts")
    base = make_base("llama", made / "base", smollm)
    adapters = {n: str(p) for n, p in make_seeded_adapters(base, made / "adapters", names=("a", "b", "c")).items()}
    deployment = {
        "base": {"model": str(base), "dtype": "float32", "max_model_len": 512, "block_size": 32},
        "prefill": {"kv_cache_gib": 0.05, "cpu_cores": "0", "resources": {"prefill": 1}},
        "decode": [{
            "pool": "agents", "replicas": 2, "kv_cache_gib": 0.05, "cpu_cores": "1", "max_lora_rank": 8,
            "local_prefill": "never", "adapters": {name: adapters[name] for name in ("a", "b")}, "resources": {"decode": 1},
        }],
        "router": {
            "host": "0.0.0.0", "http_port": HTTP, "grpc_port": GRPC, "resources": {"router": 1}, "wedged_after_s": WEDGED_S,
        },
        "cluster": {"address": "auto", "kv_load_timeout_s": LOAD_TIMEOUT_S},
    }  # fmt: skip
    # The head's host has the prefill engine, too.
    decode = {"replicas": 2, "maxReplicas": 2, "gpus": {"count": 0}}
    values = {
        "deployment": deployment, "models": {"hostPath": str(made)},
        "head": {"rayResources": {"router": 1, "prefill": 1}}, "workers": {"prefill": None, "decode": decode},
    }  # fmt: skip
    of = groups(rendered(values))
    # Not under pytest's folder: the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="ps", ignore_cleanup_errors=True) as short, Hosts(3) as hosts:
        head, *decoding = hosts
        start(head, Path(short), of["head"])
        for host in decoding:
            start(host, Path(short), of["decode"], head.address)
        with Client(f"{head.address}:{GRPC}", retries=None) as client:
            made = Cluster(hosts, values, client)

            def ready() -> bool:
                assert not (why := made.message()), why
                return made.serves(base.name, "a", "b")

            wait_until(ready, 450, 1)
            yield made


def test_prefill_and_decode_are_on_different_hosts_and_exact(cluster):
    assert cluster.usable() == {"prefill": {cluster.head.address}, "agents": {host.address for host in cluster.decoding}}
    session = cluster.client.create_session(token_ids=ids(100))
    for number, decoder in enumerate("abab"):
        result, _ = cluster.oracle.turn(session, decoder, token_ids=ids(9, salt=number), max_tokens=12, ignore_eos=True)
        assert number or result.usage.kv_bytes_transferred > 0


def test_an_upgrade_changes_what_runs_and_keeps_the_engines_and_their_caches(cluster):
    (pool,), prompt = cluster.values["deployment"]["decode"], ids(90, salt=10)
    cluster.turn("a", prompt)
    before, served = cluster.replicas(), {decoder.name for decoder in cluster.client.decoders()}
    added = str(Path(pool["adapters"]["a"]).with_name("c"))
    pool["adapters"]["c"] = added

    turn = cluster.turn("b", ids(50, salt=11), 300, cluster.upgrade)
    assert turn.usage.resumes == 0
    wait_until(lambda: cluster.serves(*served, "c"), 60)
    cluster.oracle = Oracle(parse(cluster.values["deployment"]))
    assert cluster.turn("c", prompt).usage.cached_tokens == 64
    assert {replica["replica"] for replica in cluster.replicas()} == {replica["replica"] for replica in before}


def test_what_cannot_change_while_it_runs_is_refused_and_all_goes_on(cluster, tmp_path):
    (pool,) = cluster.values["deployment"]["decode"]
    right = dict(pool["adapters"])
    pool["adapters"]["a"] = pool["adapters"]["b"]
    cluster.upgrade()
    wait_until(lambda: "adapter 'a' is not the one that runs under this name" in cluster.message(), 60)
    cluster.turn("a", ids(40, salt=12))
    pool["adapters"] = right
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(cluster.values["deployment"]))
    with pytest.raises(AssertionError, match="helm upgrade"):  # KubeRay would not know of the change
        cluster.head.run([BIN / "prefillshare", "apply", file], **ENV)
    cluster.upgrade()
    wait_until(lambda: not cluster.message(), 60)
    cluster.turn("a", ids(40, salt=13))


def test_every_host_exports_what_runs_on_it(cluster):
    """A Prometheus that scrapes every host, as on KubeRay, finds every router and replica."""

    def exported(host) -> tuple[set[str], bool]:
        text = httpx.get(f"http://{host.address}:{METRICS}/metrics", timeout=30, trust_env=False).text
        engines = metrics_text.samples(text, "ray_vllm_num_requests_running")
        return {one.labels["model_name"] for one in engines}, bool(metrics_text.samples(text, "ray_prefillshare_turns_total"))

    expected = [({"prefill"}, True)] + [({"agents"}, False)] * len(cluster.decoding)
    wait_until(lambda: [exported(host) for host in (cluster.head, *cluster.decoding)] == expected, 60, 1)


def test_a_link_that_is_cut_for_a_while_costs_time_and_nothing_else(cluster):
    """The link is cut in the middle of a turn; it is the one that carries its tokens."""

    prompt = ids(90, salt=20)
    host = cluster.host_of(cluster.turn("a", prompt).usage.decode_replica)

    def cut_for_a_while():
        host.cut()
        threading.Timer(CUT_S, host.heal).start()

    began = time.monotonic()
    turn = cluster.turn("a", prompt, 300, cut_for_a_while)
    assert time.monotonic() - began >= CUT_S or turn.usage.resumes  # it did run there
    wait_until(lambda: cluster.usable().get("agents") == {host.address for host in cluster.decoding}, 60, 1)


def test_turns_pass_a_host_that_cannot_be_reached_and_come_back_to_it(cluster):
    lost, _ = cluster.decoding
    lost.cut()
    try:
        for number in range(4):
            cluster.turn("ab"[number % 2], ids(80, salt=30 + number))
    finally:
        lost.heal()
    wait_until(lambda: cluster.usable().get("agents") == {host.address for host in cluster.decoding}, 90, 1)
    for number in range(4):
        cluster.turn("ab"[number % 2], ids(80, salt=40 + number))


def test_a_host_that_is_gone_takes_no_turn_with_it(cluster):
    prompt = ids(70, salt=50)
    host = cluster.host_of(cluster.turn("b", prompt).usage.decode_replica)

    def pull_the_plug():
        host.cut()
        host.kill()

    turn = cluster.turn("b", prompt, 300, pull_the_plug)
    assert turn.usage.resumes >= 1
    left = {other.address for other in cluster.decoding} - {host.address}
    wait_until(lambda: cluster.usable() == {"prefill": {cluster.head.address}, "agents": left}, 90, 1)
    cluster.turn("a", ids(75, salt=51))
