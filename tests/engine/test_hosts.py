"""A Ray cluster over three hosts, prefill and decode on different ones, KV over TCP: exact, also when a link is cut for a while
and when a host is gone. The hosts are network namespaces: it needs root."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import ids, wait_until
from hosts import Hosts, why_not
from oracle import TOLERANCE, Oracle

from kvshare.config import load
from kvshare.errors import Unavailable
from prefillshare.client import Client, collect
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(bool(why := why_not()), reason=f"network namespaces need root and iproute2: {why}"),
]

BIN = Path(sys.executable).parent
RAY_PORT, GRPC, HTTP, METRICS = 6390, 9000, 8000, 8080
#: Of every process of the cluster. Hosts here share one memory; KV is to take the network all the same.
ENV = {
    "UCX_TLS": "tcp",
    "RAY_AUTH_MODE": "disabled",
    # A host whose link is cut for some seconds is not yet lost.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "25",
}
LOAD_TIMEOUT_S, WEDGED_S, CUT_S = 4, 6, 3


class Cluster:
    def __init__(self, hosts, client: Client, oracle: Oracle):
        (self.head, *self.decoding), self.client, self.oracle = hosts, client, oracle

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
        """A turn that agrees with the reference. `while_running()` is called after some tokens."""
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


def node(host, folder: Path, head: str | None, **resources: float):
    first = ["--head", f"--port={RAY_PORT}", f"--temp-dir={folder / 'ray'}", "--include-dashboard=false"]
    where = [f"--address={head}:{RAY_PORT}"] if head else first
    command = [
        BIN / "ray", "start", *where, f"--node-ip-address={host.address}", "--num-cpus=2", "--object-store-memory=100000000",
        f"--resources={json.dumps(resources)}", "--disable-usage-stats",
        f"--metrics-export-port={METRICS}", "--block",
    ]  # fmt: skip
    log = folder / f"node-{host.address}.log"
    process = host.start(command, log, **ENV)

    def joined() -> bool:
        assert process.poll() is None, log.read_text()
        return "Ray runtime started" in log.read_text()

    wait_until(joined, 60)  # two at once would choose the same names of sockets


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, smollm):
    made = tmp_path_factory.mktemp("hosts")
    base = make_base("llama", made / "base", smollm)
    adapters = {n: str(p) for n, p in make_seeded_adapters(base, made / "adapters", names=("a", "b")).items()}
    # Not under pytest's: the path of a socket is short.
    with tempfile.TemporaryDirectory(prefix="ps", ignore_cleanup_errors=True) as short, Hosts(3) as hosts:
        folder = Path(short)
        head, *decoding = hosts
        deployment = folder / "deployment.yaml"
        deployment.write_text(yaml.safe_dump({
            "base": {"model": str(base), "dtype": "float32", "max_model_len": 512, "block_size": 32},
            "prefill": {"kv_cache_gib": 0.05, "cpu_cores": "0", "resources": {"prefill": 1}},
            "decode": [{
                "pool": "agents", "replicas": 2, "kv_cache_gib": 0.05, "cpu_cores": "1", "max_lora_rank": 8,
                "adapters": adapters, "resources": {"decode": 1},
            }],
            "router": {
                "host": "0.0.0.0", "http_port": HTTP, "grpc_port": GRPC, "resources": {"router": 1}, "wedged_after_s": WEDGED_S,
            },
            "cluster": {"address": f"{head.address}:{RAY_PORT}", "kv_load_timeout_s": LOAD_TIMEOUT_S},
        }))  # fmt: skip
        node(head, folder, None, router=1, prefill=1)
        for host in decoding:
            node(host, folder, head.address, decode=1)
        served = head.start([BIN / "prefillshare", "serve", deployment], folder / "serve.log", **ENV)
        with Client(f"{head.address}:{GRPC}") as client:

            def ready() -> bool:
                assert served.poll() is None, (folder / "serve.log").read_text()
                try:
                    return client.not_ready_because() == ""
                except Unavailable:
                    return False

            wait_until(ready, 240, 1)
            yield Cluster(hosts, client, Oracle(load(deployment)))


def test_prefill_and_decode_are_on_different_hosts_and_exact(cluster):
    assert cluster.usable() == {"prefill": {cluster.head.address}, "agents": {host.address for host in cluster.decoding}}
    session = cluster.client.create_session(token_ids=ids(100))
    for number, decoder in enumerate("abab"):
        result, _ = cluster.oracle.turn(session, decoder, token_ids=ids(9, salt=number), max_tokens=12, ignore_eos=True)
        assert number or result.usage.kv_bytes_transferred > 0


def test_every_host_exports_what_runs_on_it(cluster):
    """A Prometheus that scrapes each host, as on KubeRay, finds every router and replica."""

    running = re.compile(r'ray_vllm_num_requests_running\{[^}]*model_name="([^"]+)"')

    def exported(host) -> tuple[set[str], bool]:
        text = httpx.get(f"http://{host.address}:{METRICS}/metrics", timeout=30, trust_env=False).text
        return set(running.findall(text)), "ray_prefillshare_turns_total" in text

    expected = [({"prefill"}, True)] + [({"agents"}, False)] * len(cluster.decoding)
    wait_until(lambda: [exported(host) for host in (cluster.head, *cluster.decoding)] == expected, 60, 1)


def test_a_link_that_is_cut_for_a_while_costs_time_and_nothing_else(cluster):
    """In the middle of a turn, on the way of its tokens."""

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
