"""ICaRus on a tiny Llama: exact for every adapter, whatever is in the batch; all KV is the base's. For another family see
test_system_qwen3.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import system
from faults import disturbed, kill_busy, wait_whole

from prefillshare.kvshare.modes import get_mode
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

pytestmark = pytest.mark.engine

BLOCK = 32
ADAPTERS = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def running(tmp_path_factory, smollm):
    folder = tmp_path_factory.mktemp("icarus")
    base = make_base("llama", folder / "base", smollm)
    adapters = make_seeded_adapters(base, folder / "adapters", names=ADAPTERS, modules=get_mode("icarus").adapter_modules)
    with system(
        {
            "base": {"model": str(base), "dtype": "float32", "max_model_len": 512, "block_size": BLOCK},
            "prefill": {"kv_cache_gib": 0.05, "cpu_cores": "0"},
            "decode": [
                {
                    "pool": "agents",
                    "sharing": "icarus",
                    "replicas": 2,
                    "kv_cache_gib": 0.05,
                    "cpu_cores": "1",
                    "max_lora_rank": 8,
                    "local_prefill": "never",
                    "adapters": {name: str(path) for name, path in adapters.items()},
                }
            ],
            "router": {"pull_back": "always", "eager_prefill": False},
        }
    ) as it:
        yield it


def ids(n: int, salt: int = 0) -> list[int]:
    return [(7 + 13 * i + 101 * salt) % 40000 for i in range(n)]


def test_every_adapter_and_the_base_are_exact_over_turns(running, oracle):
    session = running.client.create_session(token_ids=ids(45))
    for number, name in enumerate(("a", "b", "base", "c", "a", "d")):
        oracle.turn(session, name, token_ids=ids(6, salt=number + 1), max_tokens=20, ignore_eos=True)


def test_four_adapters_and_the_base_in_one_batch_are_exact(running, oracle):
    def take(number: int):
        session = running.client.create_session(token_ids=ids(40 + 9 * number, salt=20 + number))
        name = (*ADAPTERS, "base")[number % 5]
        return oracle.turn(session, name, token_ids=ids(5, salt=30), max_tokens=24 + number, ignore_eos=True)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(take, range(10)))


def test_a_response_is_pulled_back_and_never_prefilled(running, oracle):
    """In five turns of four adapters, each turn computes at most one block beyond its new input."""
    session = running.client.create_session(token_ids=ids(3 * BLOCK, salt=40))
    oracle.turn(session, "a", token_ids=ids(10, salt=41), max_tokens=50, ignore_eos=True)
    for number, name in enumerate(("b", "c", "d", "a"), 42):
        result, _ = oracle.turn(session, name, token_ids=ids(10, salt=number), max_tokens=50, ignore_eos=True)
        assert result.usage.computed_tokens <= 10 + BLOCK
    running.wait_until_nothing_is_held(10)


def test_a_decode_replica_that_dies_in_the_middle_loses_no_token(running, oracle):
    """Its turn goes on in another replica, from base KV of the prompt and the response so far."""
    wait_whole(running)

    def die():
        kill_busy(running, "agents")

    turn = disturbed(running, oracle, "c", ids(70, salt=60), die, max_tokens=60, temperature=0.0)
    assert turn.usage.resumes >= 1
    assert len(turn.token_ids) == 60
