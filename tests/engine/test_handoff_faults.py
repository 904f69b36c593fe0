"""Faults between the end of a prefill and the end of the transfer: the client sees the tokens of an undisturbed run."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import psutil
import pytest
from conftest import ids, system, wait_until
from faults import kept_whole, processes

from benchmarks.faults.processes import stopped
from prefillshare.apply import apply
from prefillshare.kvshare import metrics_text
from prefillshare.kvshare.config import parse
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

pytestmark = pytest.mark.engine

BLOCK, LEASE_S, LOAD_TIMEOUT_S = 32, 9, 13


@pytest.fixture(scope="module")
def running(tmp_path_factory, smollm):
    folder = tmp_path_factory.mktemp("handoff-faults")
    base = make_base("llama", folder / "base", smollm)
    adapters = make_seeded_adapters(base, folder / "adapters", names=("a",))
    with system(
        {
            "base": {"model": str(base), "dtype": "float32", "max_model_len": 512, "block_size": BLOCK},
            "prefill": {"replicas": 2, "kv_cache_gib": 0.05, "cpu_cores": "0"},
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
            # No fault here is to be detected by a replica's silence.
            "router": {"wedged_after_s": 60, "eager_prefill": False},
            "cluster": {"kv_lease_s": LEASE_S, "kv_load_timeout_s": LOAD_TIMEOUT_S},
        }
    ) as it:
        yield it


@pytest.fixture(autouse=True)
def _whole_before_and_after(running):
    with kept_whole(running):
        yield


@pytest.fixture
def take(running, oracle):
    """take(prompt): begins a turn on a context of its own; the future's result is checked by the oracle."""
    with ThreadPoolExecutor(4) as pool:

        def begin(prompt: list[int]) -> Future:
            session = running.client.create_session()
            return pool.submit(
                lambda: oracle.turn(session, "a", token_ids=prompt, max_tokens=12, ignore_eos=True)[0]
            )

        yield begin


def decode_processes(running) -> list[psutil.Process]:
    (replica,) = running.info()["agents"]
    return processes(running, "agents", replica)


def holding(running, *, count: int = 1, but: str = "", within_s: float = LEASE_S - 3) -> list[str]:
    """The prefill replicas that hold a finished prompt for a decode engine to read, once there are `count`."""

    def leased():
        stats = running.stats_by_replica()["prefill"]
        found = [replica for replica, s in stats.items() if s["blocks_used"] and not s["active"] and replica != but]
        return found if len(found) == count else None

    return wait_until(leased, within_s)


def late_reads(running) -> float:
    text = httpx.get(f"{running.http_url.removesuffix('/v1')}/metrics", timeout=30).text
    return metrics_text.total(text, "prefillshare_late_reads_total", decoder="a")


def resumed_once(turn: Future):
    result = turn.result(timeout=60)
    assert result.usage.resumes == 1
    assert len(result.token_ids) == 12
    return result


def test_a_handshake_that_hangs_is_given_up(running, take):
    """These two engines have not met yet, so that they must shake hands before the first read."""
    with ExitStack() as silent:
        with stopped(decode_processes(running)):
            turn = take(ids(100, salt=1))
            (source,) = holding(running)
            silent.enter_context(stopped(processes(running, "prefill", source)))
        assert resumed_once(turn).usage.prefill_replica == source


def test_a_prefill_replica_that_dies_between_handoff_and_read_costs_another_prefill(running, take):
    with stopped(decode_processes(running)):
        turn = take(ids(100, salt=2))
        (source,) = holding(running)
        processes(running, "prefill", source)[0].kill()
        wait_until(lambda: source not in running.info()["prefill"], 10)
    resumed_once(turn)


def test_kv_whose_lease_ended_before_the_read_is_not_used(running, take):
    with stopped(decode_processes(running)):
        turn = take(ids(100, salt=3))
        holding(running)
        before = late_reads(running)
        time.sleep(LEASE_S + 1)
    resumed_once(turn)
    assert late_reads(running) == before + 1


def test_a_load_that_hangs_is_given_up(running, take):
    with stopped(decode_processes(running)):
        turn = take(ids(100, salt=6))
        (source,) = holding(running)
        (other,) = holding(running, but=source, within_s=2 * LOAD_TIMEOUT_S)  # the turn goes on while the decode engine hangs
    assert resumed_once(turn).usage.prefill_replica == source != other


def test_a_prefill_replica_that_is_stopped_waits_until_its_prompts_are_read(running, take):
    before = running.deployment
    plain = before.model_dump(mode="json")
    plain["prefill"]["replicas"] = 1
    fewer = threading.Thread(target=apply, args=(parse(plain),))
    try:
        with stopped(decode_processes(running)):
            # Long enough that the second is placed while the first is being computed, and so on the other replica.
            turns = [take(ids(450, salt=4)), take(ids(450, salt=5))]
            sources = holding(running, count=2)
            fewer.start()
            wait_until(lambda: len(running.info()["prefill"]) == 1, LEASE_S - 4)
            time.sleep(1)  # a replica that does not wait is gone by now
        results = [turn.result(timeout=60) for turn in turns]
        fewer.join(timeout=120)
        assert not fewer.is_alive()
    finally:
        apply(before)
    assert {r.usage.prefill_replica for r in results} == set(sources)
    assert [r.usage.resumes for r in results] == [0, 0]
