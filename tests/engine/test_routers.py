"""Two routers share one session store: when one dies, neither a session nor its cached KV is lost."""

from __future__ import annotations

import time

import pytest
from conftest import ids, system, wait_until
from ports import free_port

from benchmarks.faults.processes import routers
from benchmarks.shared.redis_server import RedisServer
from prefillshare.kvshare.errors import Conflict, Unavailable
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

pytestmark = pytest.mark.engine

BLOCK = 32


@pytest.fixture(scope="module")
def running(tmp_path_factory, smollm):
    folder = tmp_path_factory.mktemp("routers")
    base = make_base("llama", folder / "base", smollm)
    adapters = make_seeded_adapters(base, folder / "adapters", names=("a", "b"))
    redis = RedisServer(folder, free_port())
    redis.start()
    try:
        with system(
            {
                "base": {"model": str(base), "dtype": "float32", "max_model_len": 512, "block_size": BLOCK},
                "prefill": {"kv_cache_gib": 0.05, "cpu_cores": "0"},
                "decode": [
                    {
                        "pool": "agents",
                        "kv_cache_gib": 0.05,
                        "cpu_cores": "1",
                        "max_lora_rank": 8,
                        "local_prefill": "never",
                        "adapters": {name: str(path) for name, path in adapters.items()},
                    }
                ],
                "router": {"replicas": 2, "redis_url": redis.url, "eager_prefill": False},
            }
        ) as it:
            yield it
    finally:
        redis.kill()


def persistent(call, timeout_s: float = 40.0):
    """Repeat a call as a client does whose router has died, or has died holding the session for a turn."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except (Unavailable, Conflict):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_sessions_and_their_cached_prefix_outlive_each_router(running, oracle):
    sessions = [running.client.create_session() for _ in range(3)]
    lengths, usages = [], []
    for number, session in enumerate(sessions):
        result, _ = oracle.turn(session, "a", token_ids=ids(150, salt=number), max_tokens=6, ignore_eos=True)
        lengths.append(result.context_tokens)
        usages.append(result.usage)
    port = running.deployment.router.grpc_port
    assert len(routers(port)) == 2
    for victim in routers(port):
        victim.kill()
        for number, session in enumerate(sessions):
            result, prompt = persistent(
                lambda session=session: oracle.turn(session, "b", token_ids=ids(4), max_tokens=3, ignore_eos=True)
            )
            assert len(prompt) == lengths[number] + 4
            assert result.usage.cached_tokens >= 128
            lengths[number] = result.context_tokens
            usages.append(result.usage)
        wait_until(lambda: len(routers(port)) == 2 and running.stats_by_replica(), 120)
    # The ledger is exact over the routers' deaths.
    used = [row.figures for row in running.handle.usage.remote().result(timeout_s=30)]
    for of_ledger, of_client in (
        ("turns", None), ("prompt_tokens",) * 2, ("cached_tokens",) * 2, ("computed_tokens",) * 2,
        ("generated_tokens", "completion_tokens"),
    ):  # fmt: skip
        told = sum(getattr(usage, of_client) if of_client else 1 for usage in usages)
        assert sum(getattr(figures, of_ledger) for figures in used) == told, of_ledger


def test_two_routers_do_not_take_two_turns_on_one_session(running):
    session = running.client.create_session()
    stream = session.stream("a", token_ids=ids(40), max_tokens=200, ignore_eos=True)
    next(stream)
    refused = 0
    for _ in range(8):  # each on a connection of its own, so that both routers get some
        with type(running.client)(running.grpc_address) as other, pytest.raises(Conflict, match="another turn runs"):
            other.session(session.session_id).turn("b", token_ids=ids(3), max_tokens=1)
        refused += 1
    assert refused == 8
    stream.close()
