"""The system of the campaign: two hosts, a pool of every mode on tiny random models, two routers with Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.nodes import Nodes
from benchmarks.shared.hosts import Host
from benchmarks.shared.redis_server import RedisServer
from benchmarks.shared.small import BLOCK, GRPC_PORT, HTTP_PORT, MODEL
from prefillshare import forkserver, records
from prefillshare.app import running
from prefillshare.kvshare.config import Deployment, parse
from prefillshare.kvshare.modes import get_mode
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

#: Ports below those that Ray gives to its workers.
REDIS_PORT, RAY_PORT = 7_000, 7_001
MOST_TOKENS = 1024
#: Pool -> its replicas; what strikes one pool with two replicas leaves the other one.
POOLS = {"prefill": 2, "agents": 2, "streams": 1, "speakers": 1, "alone": 1, "prefill-alone": 1}
#: Decoders that are always served, and the one that `apply` adds and takes away.
DECODERS, COMES_AND_GOES = ("a", "b", "base", "s", "d", "c"), "e"
OWN_TOKENS, OWN_LAYERS = {"b": 40}, {"d": "1-2"}
#: Short, so that leases end under readers that hang.
LEASE_S, LOAD_TIMEOUT_S, WEDGED_S, HELD_S = 6, 4, 4, 30


@dataclass(frozen=True)
class System:
    """`host`: on which the surfaces listen."""

    handle: object
    nodes: Nodes
    redis: RedisServer
    deployment: Deployment
    more: Deployment
    host: str

    @property
    def grpc_address(self) -> str:
        return f"{self.host}:{GRPC_PORT}"

    @property
    def http_url(self) -> str:
        return f"http://{self.host}:{HTTP_PORT}"


def deployments(folder: Path, redis_url: str, address: str, host: str) -> tuple[Deployment, Deployment]:
    """What runs, and the same with one decoder more."""
    base = make_base("llama", folder / "base", fetch(MODEL))
    linear = make_seeded_adapters(base, folder / "adapters", names=("a", "b", "c", "d", "e"), own_tokens=OWN_TOKENS)
    streams = make_seeded_adapters(base, folder / "streams", names=("s",), modules=get_mode("icarus").adapter_modules)
    files = {name: str(path) for name, path in (linear | streams).items()}

    def pool(name: str, decoders: str, **more) -> dict:
        place = {"decode-slot": 1} if POOLS[name] == 2 else {"head": 0.01}
        return {
            "pool": name, "replicas": POOLS[name], "kv_cache_gib": 0.05, "max_lora_rank": 8, "resources": place,
            "serve_base": False, "adapters": {one: files[one] for one in decoders}, **more,
        }  # fmt: skip

    def with_agents(decoders: str) -> Deployment:
        return parse({
            "name": "soak",
            "base": {"model": str(base), "dtype": "float32", "max_model_len": MOST_TOKENS, "block_size": BLOCK},
            "prefill": {"replicas": 2, "kv_cache_gib": 0.05, "resources": {"prefill-slot": 1}},
            "decode": [
                pool("agents", decoders, serve_base=True),
                pool("streams", "s", sharing="icarus"),
                pool("speakers", "d", sharing="droidspeak", own_layers=OWN_LAYERS),
                pool("alone", "c", sharing="none"),
            ],
            "router": {
                "host": host, "http_port": HTTP_PORT, "grpc_port": GRPC_PORT, "replicas": 2, "redis_url": redis_url,
                "resources": {"head": 0.01}, "wedged_after_s": WEDGED_S, "replica_wait_s": 60, "ui": "off",
            },
            "cluster": {"address": address, "kv_lease_s": LEASE_S, "kv_load_timeout_s": LOAD_TIMEOUT_S},
        })  # fmt: skip

    return with_agents("ab"), with_agents("abe")


@contextmanager
def running_system(folder: Path, hosts: tuple[Host, Host] | None, redis_folder: Path) -> Iterator[System]:
    """`hosts`: as of Nodes."""
    host = hosts[0].address if hosts else "127.0.0.1"
    with ExitStack() as until_the_end:
        redis = until_the_end.enter_context(RedisServer(redis_folder, REDIS_PORT))
        labels = until_the_end.enter_context(forkserver.started(records.folder()))
        nodes = until_the_end.enter_context(Nodes(folder, RAY_PORT, hosts, labels))
        deployment, more = deployments(folder, redis.url, nodes.address, "0.0.0.0" if hosts else host)
        handle = until_the_end.enter_context(running(deployment))
        yield System(handle, nodes, redis, deployment, more, host)
