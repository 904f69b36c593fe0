"""DroidSpeak through the whole system: decoders that were not trained for sharing, and one that was, over one prefill pool."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import ids, system, wait_until
from faults import disturbed, kill_busy, wait_whole

from prefillshare.kvshare import metrics_text
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base, make_full_decoder

pytestmark = pytest.mark.engine

BLOCK, LEASE_S = 32, 15


@pytest.fixture(scope="module")
def running(tmp_path_factory, smollm):
    folder = tmp_path_factory.mktemp("droidspeak")
    base = make_base("llama", folder / "base", smollm)
    adapters = make_seeded_adapters(base, folder / "adapters", names=("a", "b", "c"))
    full = make_full_decoder(base, folder / "coder", seed=6)
    small = {"kv_cache_gib": 0.05, "cpu_cores": "1"}
    agents = {"max_lora_rank": 8, "adapters": {name: str(adapters[name]) for name in "ab"}}
    with system(
        {
            "base": {"model": str(base), "dtype": "float32", "max_model_len": 512, "block_size": BLOCK},
            "prefill": {"kv_cache_gib": 0.05, "cpu_cores": "0"},
            "decode": [
                {
                    "pool": "agents",
                    "sharing": "droidspeak",
                    "replicas": 2,
                    "own_layers": {"a": "1-2", "b": "0-1"},
                    **agents,
                    **small,
                },
                {
                    "pool": "coder",
                    "sharing": "droidspeak",
                    "model": str(full),
                    # The second is chosen as soon as it is known how long layers take.
                    "own_layers": {"coder": ["1-3", "3-3"]},
                    "ttft_objective_s": 0.0001,
                    **small,
                },
                {"pool": "trained", "max_lora_rank": 8, "adapters": {"c": str(adapters["c"])}, "serve_base": False, **small},
            ],
            "router": {"canary_share": 0.5},
            "cluster": {"kv_lease_s": LEASE_S},
        }
    ) as it:
        yield it


def test_every_decoder_is_exact_over_turns(running, oracle):
    session, seen = running.client.create_session(token_ids=ids(45)), []
    for number, name in enumerate(("a", "coder", "b", "c", "base", "a", "coder", "b")):
        result, _ = oracle.turn(session, name, token_ids=ids(8, salt=number + 1), max_tokens=20, ignore_eos=True)
        seen.append(result.usage.own_layers)
    assert seen == ["1-2", "1-3", "0-1", "", "", "1-2", "3-3", "0-1"]
    running.wait_until_nothing_is_held(10)


def test_a_suffix_and_a_prompt_of_one_token_are_exact(running, oracle):
    session = running.client.create_session(token_ids=ids(40, salt=10))
    oracle.turn(session, "a", token_ids=ids(5, salt=11), suffix_ids=ids(9, salt=12), max_tokens=12, ignore_eos=True)
    oracle.turn(running.client.create_session(), "coder", token_ids=ids(1, salt=13), max_tokens=12, ignore_eos=True)


def test_turns_of_all_decoders_at_once_are_exact(running, oracle):
    def take(number: int) -> None:
        session = running.client.create_session(token_ids=ids(40 + 17 * number, salt=20 + number))
        for salt in (30, 31):
            name = ("a", "b", "coder", "c", "base")[(number + salt) % 5]
            oracle.turn(session, name, token_ids=ids(5, salt=salt), max_tokens=24, ignore_eos=True)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(take, range(10)))


def test_a_decode_replica_that_dies_in_the_middle_loses_no_token(running, oracle):
    wait_whole(running)

    def die():
        kill_busy(running, "agents")

    turn = disturbed(running, oracle, "b", ids(70, salt=60), die, max_tokens=60, temperature=0.0)
    assert turn.usage.resumes >= 1
    assert (len(turn.token_ids), turn.usage.own_layers) == (60, "0-1")


def counted(running, name: str, **labels: str) -> float:
    text = httpx.get(running.http_url.removesuffix("/v1") + "/metrics", timeout=10).text
    return metrics_text.total(text, f"prefillshare_{name}", **labels)


def test_metrics_say_which_layers_turns_had(running):
    session = running.client.create_session(token_ids=ids(40, salt=70))
    session.turn("a", token_ids=ids(3), max_tokens=1)
    assert counted(running, "own_layer_turns_total", decoder="a", layers="1-2") >= 1


def test_the_canary_measures_how_far_answers_are_from_the_decoders_own(running):
    def measured() -> bool:
        running.client.create_session(token_ids=ids(40, salt=71)).turn("coder", token_ids=ids(3), max_tokens=4)
        return counted(running, "canary_divergence_sum", decoder="coder") > 0  # at some places they do not differ

    wait_until(measured, 30)
    assert counted(running, "canary_turns_total", decoder="coder", outcome="done") >= 1
    running.wait_until_nothing_is_held(LEASE_S + 5)  # what was lent for a turn that the dead replica got
