"""A tiny Qwen3: another architecture through the same system, with decoders of two modes over the KV of one prefill pool."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import system
from test_system_llama import SMALL_GIB, deployment, ids

from prefillshare.kvshare.modes import get_mode
from prefillshare.seeded_adapters import make_seeded_adapters

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def running(tmp_path_factory, smollm):
    folder = tmp_path_factory.mktemp("qwen3")
    data = deployment(folder, smollm, "qwen3")
    modules = get_mode("icarus").adapter_modules
    made = make_seeded_adapters(folder / "base", folder / "streams", names=("s", "t"), modules=modules)
    agents, coder, *_ = data["decode"]
    streams = agents | {
        "pool": "streams",
        "sharing": "icarus",
        "serve_base": False,
        "adapters": {name: str(path) for name, path in made.items()},
        "kv_cache_gib": 4 * SMALL_GIB,
    }
    with system(data | {"decode": [agents, coder, streams]}) as it:
        yield it


def test_adapters_full_weights_streams_and_base_are_exact_over_turns(running, oracle):
    session = running.client.create_session(token_ids=ids(70, salt=3))
    for number, name in enumerate(("a", "coder", "s", "b", "base", "t", "a")):
        result, _ = oracle.turn(session, name, token_ids=ids(9, salt=number + 20), max_tokens=20, ignore_eos=True)
        assert result.usage.completion_tokens == 20


def test_streams_in_one_batch_are_exact(running, oracle):
    def take(number: int):
        session = running.client.create_session(token_ids=ids(40 + 9 * number, salt=40 + number))
        return oracle.turn(session, "st"[number % 2], token_ids=ids(5, salt=50), max_tokens=24 + number, ignore_eos=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take, range(4)))
