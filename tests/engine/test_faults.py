"""Replicas die, hang, are stopped and come back: the client sees one stream with exactly the tokens of an undisturbed run.

What one test has struck comes back while the next test strikes the other pool: each test waits only for the pools it strikes.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import ids, system, wait_until
from faults import disturbed, kill, kill_busy, processes, wait_whole
from oracle import Oracle
from ray import serve
from ray.exceptions import RayError

from benchmarks.faults.hang_ups import hang_up
from benchmarks.faults.processes import stopped, titled
from prefillshare.apply import apply
from prefillshare.kvshare import adapter_settings, metrics_text
from prefillshare.kvshare.config import parse
from prefillshare.kvshare.errors import ConfigError, EngineStartError, NotFound
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base, make_full_decoder

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_held_after")]

BLOCK, LEASE_S = 32, 15
WEDGED_AFTER_S = 4


@pytest.fixture(scope="module")
def running(tmp_path_factory, smollm):
    folder = tmp_path_factory.mktemp("faults")
    base = make_base("llama", folder / "base", smollm)
    adapters = make_seeded_adapters(base, folder / "adapters", names=("a", "b"))
    with system(
        {
            "base": {"model": str(base), "dtype": "float32", "max_model_len": 512, "block_size": BLOCK},
            "prefill": {"replicas": 2, "kv_cache_gib": 0.05, "cpu_cores": "0"},
            "decode": [
                {
                    "pool": "agents",
                    "replicas": 2,
                    "kv_cache_gib": 0.05,
                    "cpu_cores": "1",
                    "max_lora_rank": 8,
                    "local_prefill": "never",
                    "adapters": {name: str(path) for name, path in adapters.items()},
                }
            ],
            "router": {"wedged_after_s": WEDGED_AFTER_S, "eager_prefill": False},
            "cluster": {"kv_lease_s": LEASE_S, "kv_load_timeout_s": 5},
        }
    ) as it:
        yield it


def test_a_decode_replica_that_dies_in_the_middle_of_a_sampled_turn_loses_no_token(running, oracle):
    sampling = {"temperature": 0.9, "seed": 11}
    wait_whole(running, "agents")
    prompt = ids(70, salt=1)
    whole = running.client.create_session().turn("a", token_ids=prompt, max_tokens=60, ignore_eos=True, **sampling)
    victims = []

    def die():
        victims.extend(kill_busy(running, "agents"))

    turn = disturbed(running, oracle, "a", prompt, die, max_tokens=60, **sampling)
    assert turn.token_ids == whole.token_ids
    assert turn.usage.resumes >= 1
    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in victims), 20)


def test_a_prefill_replica_that_died_after_the_last_turn_costs_a_prefill_and_nothing_else(running, oracle):
    wait_whole(running, "prefill")
    session = running.client.create_session()
    first, _ = oracle.turn(session, "a", token_ids=ids(150, salt=3), max_tokens=6, ignore_eos=True)
    kill(running, "prefill", first.usage.prefill_replica)
    second, _ = oracle.turn(session, "b", token_ids=ids(5, salt=4), max_tokens=6, ignore_eos=True)
    assert second.usage.prefill_replica != first.usage.prefill_replica
    assert second.usage.cached_tokens == 0


def test_an_engine_that_dies_takes_its_replica_along_and_both_come_back(running, oracle):
    wait_whole(running, "prefill")
    session = running.client.create_session()
    first, _ = oracle.turn(session, "a", token_ids=ids(100, salt=9), max_tokens=6, ignore_eos=True)
    _, *engine = processes(running, "prefill", first.usage.prefill_replica)
    for process in engine:
        os.kill(process.pid, signal.SIGKILL)
    second, _ = oracle.turn(session, "b", token_ids=ids(5, salt=10), max_tokens=6, ignore_eos=True)
    assert second.usage.prefill_replica != first.usage.prefill_replica
    wait_until(lambda: first.usage.prefill_replica not in running.info()["prefill"], 60)


def test_a_decode_replica_that_hangs_in_the_middle_is_given_up_and_let_back_in(running, oracle):
    wait_whole(running, "agents")
    with ExitStack() as until_the_end:

        def hang():
            (busy,) = {r for r, s in running.stats_by_replica()["agents"].items() if s["active"]}
            until_the_end.enter_context(stopped(processes(running, "agents", busy)))

        turn = disturbed(running, oracle, "b", ids(90, salt=2), hang, max_tokens=60)
        assert turn.usage.resumes == 1
        assert len(turn.token_ids) == 60
        assert [r["usable"] for r in running.info()["agents"].values()].count(False) == 1


def test_a_prefill_replica_that_hangs_is_given_up_within_the_deadline(running, oracle):
    wait_whole(running, "prefill")
    session = running.client.create_session()
    first, _ = oracle.turn(session, "a", token_ids=ids(150, salt=5), max_tokens=6, ignore_eos=True)
    with stopped(processes(running, "prefill", first.usage.prefill_replica)):
        began = time.monotonic()
        second, _ = oracle.turn(session, "b", token_ids=ids(5, salt=6), max_tokens=6, ignore_eos=True)
        assert second.usage.prefill_replica != first.usage.prefill_replica
        assert time.monotonic() - began < 5 * WEDGED_AFTER_S


def test_an_engine_that_hangs_while_its_replica_answers_is_given_up(running, oracle):
    wait_whole(running, "prefill")
    session = running.client.create_session()
    first, _ = oracle.turn(session, "a", token_ids=ids(150, salt=7), max_tokens=6, ignore_eos=True)
    _, *engine = processes(running, "prefill", first.usage.prefill_replica)
    assert engine
    with stopped(engine):
        second, _ = oracle.turn(session, "b", token_ids=ids(5, salt=8), max_tokens=6, ignore_eos=True)
        assert second.usage.prefill_replica != first.usage.prefill_replica


def test_serves_controller_that_dies_takes_nothing_along_and_comes_back(running, oracle):
    """Neither the running turn nor a cache is lost. The controller that comes back finds the same replicas and looks after them
    as before."""
    wait_whole(running)
    session = running.client.create_session()
    oracle.turn(session, "a", token_ids=ids(150, salt=13), max_tokens=6, ignore_eos=True)
    before = {pool: set(replicas) for pool, replicas in running.info().items()}
    (controller,) = titled("ray::ServeController")

    disturbed(running, oracle, "b", ids(90, salt=14), controller.kill, max_tokens=60)
    wait_until(lambda: [one for one in titled("ray::ServeController") if one.pid != controller.pid], 60)
    wait_until(serve_runs, 60, 1)
    second, _ = oracle.turn(session, "b", token_ids=ids(5, salt=15), max_tokens=6, ignore_eos=True)
    assert second.usage.cached_tokens >= 128
    assert second.usage.resumes == 0
    assert {pool: set(replicas) for pool, replicas in running.info().items()} == before
    kill(running, "prefill", second.usage.prefill_replica)
    wait_until(lambda: second.usage.prefill_replica not in running.info()["prefill"], 60)


def serve_runs() -> bool:
    """Whether the controller says that all replicas are healthy. A controller that has just begun does not answer yet."""
    try:
        return serve.status().applications["prefillshare"].status.value == "RUNNING"
    except RayError:
        return False


def test_http_clients_that_hang_up_end_their_turns_and_are_no_replicas_fault(running):
    """There are more at once than the engines take, so that some still wait in the queue."""
    wait_whole(running)

    def counted() -> dict[tuple, float]:
        text = httpx.get(f"{running.http_url.removesuffix('/v1')}/metrics", follow_redirects=True, timeout=30).text
        names = ("prefillshare_resumes_total", "prefillshare_turns_total")
        found = [sample for name in names for sample in metrics_text.samples(text, name)]
        return {(sample.name, *sorted(sample.labels.items())): sample.value for sample in found if sample.value}

    before = counted()
    with ThreadPoolExecutor(16) as clients:
        list(clients.map(lambda number: hang_up(running.http_url, "a", number, 380), range(80)))
    # Their turns have ended at once. If a prefill's answer was on its way by then, the lease of its KV expires by itself.
    wait_until(lambda: {name.rpartition(".")[2] for name in running.held()} <= {"blocks_used"}, 10)
    running.wait_until_nothing_is_held(LEASE_S + 5)
    new = {name: value - before.get(name, 0) for name, value in counted().items() if value != before.get(name, 0)}
    assert set(new) == {("prefillshare_turns_total", ("decoder", "a"), ("outcome", "cancelled"))}
    assert new.popitem()[1] > 20  # the other clients hung up before they had a turn


def test_replica_counts_adapters_and_pools_change_while_turns_run(running, oracle, tmp_path):
    """One change has it all: fewer replicas, one more adapter, one more pool; and then back."""
    wait_whole(running)
    before = running.deployment
    extra = make_seeded_adapters(Path(before.base.model), tmp_path / "adapters", names=("c",))
    full = make_full_decoder(Path(before.base.model), tmp_path / "full", seed=4)
    plain = before.model_dump(mode="json")
    plain["prefill"]["replicas"] = 1
    agents = plain["decode"][0]
    agents |= {"replicas": 1, "adapters": agents["adapters"] | {name: str(path) for name, path in extra.items()}}
    other = {"pool": "coder", "adapters": {}, "model": str(full), "serve_base": False, "local_prefill": None}
    plain["decode"].append(agents | other)
    after, turns = parse(plain), []
    stop = threading.Event()

    def keep_taking(name: str):
        while not stop.is_set():
            prompt = ids(40 + len(turns), salt=100 + len(turns))
            turns.append(running.client.create_session().turn(name, token_ids=prompt, max_tokens=30, ignore_eos=True))
            stop.wait(0.5)  # engines start meanwhile, on the same cores

    with ThreadPoolExecutor(3) as pool:
        taking = [pool.submit(keep_taking, name) for name in ("a", "b", "base")]
        try:
            apply(after)
            now = Oracle(after)
            for name in ("c", "coder", "a"):
                now.turn(running.client.create_session(), name, token_ids=ids(70, salt=90), max_tokens=8, ignore_eos=True)
            assert {n: len(r) for n, r in running.info().items()} == {"prefill": 1, "agents": 1, "coder": 1}
            models = httpx.get(f"{running.http_url}/models").json()["data"]
            assert {m["id"] for m in models} == {"base", "a", "b", "c", "coder"}
            apply(before)
            with pytest.raises(NotFound, match="unknown decoder 'c'"):
                running.client.create_session().turn("c", token_ids=ids(9), max_tokens=1)
        finally:
            stop.set()
    assert all(one.exception() is None for one in taking), [one.exception() for one in taking]
    assert len(turns) > 20
    assert all(turn.usage.completion_tokens == 30 for turn in turns)


def test_an_apply_that_engines_refuse_leaves_everything_as_it_was(running, oracle, tmp_path, monkeypatch):
    """The adapter passes the check of its files, but no engine loads it: first in a running pool, then in a pool of its own."""
    wait_whole(running)
    before = running.deployment
    bad = make_seeded_adapters(Path(before.base.model), tmp_path, names=("bad",))["bad"]
    settings = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    session, plain = running.client.create_session(), before.model_dump(mode="json")
    oracle.turn(session, "a", token_ids=ids(70, salt=51), max_tokens=4, ignore_eos=True)
    replicas = {pool: set(members) for pool, members in running.info().items()}
    agents = plain["decode"][0]
    joined = agents | {"adapters": agents["adapters"] | {"bad": str(bad)}}
    alone = agents | {"pool": "alone", "replicas": 1, "serve_base": False, "adapters": {"bad": str(bad)}}
    for decode, kind, message in (
        ([joined], ConfigError, r"decode\.0\.adapters\.bad: engines cannot serve .*bad: vLLM does not yet support DoRA\."),
        ([agents, alone], EngineStartError, r"adapter bad: vLLM does not yet support DoRA\."),
    ):
        after = parse(plain | {"decode": decode})
        with monkeypatch.context() as patched:
            patched.setattr(adapter_settings, "_refuse_other_kinds", lambda *_: None)
            with pytest.raises(kind, match=message):
                apply(after)
        result, _ = oracle.turn(session, "b", token_ids=ids(3, salt=52), max_tokens=4, ignore_eos=True)
        assert result.usage.cached_tokens >= 64
        with pytest.raises(NotFound, match="unknown decoder 'bad'"):
            running.client.create_session().turn("bad", token_ids=ids(9), max_tokens=1)
        apply(before)
        assert {pool: set(members) for pool, members in running.info().items()} == replicas


def test_cached_prefixes_are_predicted_exactly_where_nothing_is_evicted(running, oracle):
    wait_whole(running)
    session = running.client.create_session()
    oracle.turn(session, "a", token_ids=ids(130, salt=11), max_tokens=4, ignore_eos=True)
    time_of_events = time.monotonic() + 5
    while True:
        fork = session.fork()
        result, _ = oracle.turn(fork, "b", token_ids=ids(3, salt=12), max_tokens=2, ignore_eos=True)
        if result.usage.predicted_tokens == result.usage.cached_tokens == 128 or time.monotonic() > time_of_events:
            break
    assert result.usage.predicted_tokens == result.usage.cached_tokens == 128
