"""What the agents benchmark compares gets the same budget, and is asked the same."""

from __future__ import annotations

import json

import httpx
import pytest

from benchmarks.agents import crosscheck, driver, experiments, report, systems
from benchmarks.agents.driver import Cost, Stock, TurnRecord
from benchmarks.agents.measures import Objective, summary
from benchmarks.agents.workload import Scale, write_trace
from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.modes import get_mode, mode_names

NAMES = ("a", "b")


@pytest.mark.parametrize("name", systems.UNIFIED)
def test_one_engine_gets_all_of_the_memory_and_both_cores(tmp_path, name):
    adapters = {name: tmp_path / name for name in NAMES}
    for folder in adapters.values():
        folder.mkdir()
    tree = systems.unified_deployment(systems.UNIFIED[name], tmp_path, adapters, systems.Budget(kv_gib=1.5))
    (pool,) = tree.decode
    assert tree.shared_prefill is None
    assert (pool.replicas, pool.kv_cache_gib, pool.cpu_cores, list(pool.adapters)) == (1, 1.5, "0-1", list(NAMES))


def test_the_headline_compares_one_engine_with_one_of_stock_vllm():
    def figures(turns_per_s: float, p95: float) -> dict:
        return {"turns_per_s": {"value": turns_per_s}, "session_s_p95": {"value": p95}}

    names = (
        "react, 2 models, 6 at once",
        "react, 4 models, 2 at once",
        "low-sharing, 4 models, 6 at once",
        "react, 8 models, 0.15/s",
        "uneven, 4 models, 0.1/s in bursts",
    )
    found = {
        "vllm": {"experiments": {name: figures(1.0, 8.0) for name in names}},
        "unified-icarus": {"experiments": {name: figures(1.5, 4.0) for name in names}},
    }
    assert report.unified_vs_vllm(found) == {
        "throughput": {"react-2": {"icarus": 1.5}, "low-sharing": {"icarus": 1.5}, "react-8, 0.15/s": {"icarus": 1.5}},
        "p95": {"react-2": {"icarus": 2.0}, "low-sharing": {"icarus": 2.0}, "react-8, 0.15/s": {"icarus": 2.0}},
    }


@pytest.mark.parametrize("mode", [name for name in systems.SYSTEMS if name in mode_names()])
def test_every_mode_gets_the_same_memory_and_cores(tmp_path, mode):
    adapters = {name: tmp_path / name for name in NAMES}
    for folder in adapters.values():
        folder.mkdir()
    tree = systems.deployment(mode, tmp_path, adapters, systems.Budget(kv_gib=1.5))
    (pool,) = tree.decode
    prefill = pool.prefill if mode == "none" else tree.prefill
    assert (pool.sharing, list(pool.adapters)) == (mode, list(NAMES))
    assert prefill.kv_cache_gib + pool.kv_cache_gib == 1.5
    assert (prefill.cpu_cores, pool.cpu_cores) == ("0", "1")
    assert pool.prefill_policy == ("never" if get_mode(mode).base_in_place else None)


def test_the_headline_compares_the_decider_with_the_better_fixed_policy():
    def of(*turns_per_s: float) -> dict:
        return {"experiments": {f"experiment {n}": {"turns_per_s": {"value": value}} for n, value in enumerate(turns_per_s)}}

    found = {"prefillshare": of(1.0, 2.0), "always-prefillshare": of(2.0, 1.0), "auto-prefillshare": of(1.9, 2.2)}
    assert report.auto_vs_better(found) == {"experiment 0": 0.95, "experiment 1": 1.1}
    assert report.auto_vs_better({"prefillshare": of(1.0)}) == {}


def served(lines: list[str], status: int = 200) -> tuple[httpx.Client, list[dict]]:
    """A server that streams these lines, and what it was asked."""
    asked: list[dict] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(status, text="\n\n".join(lines) + "\n\n")

    return httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)), asked


def piece(*token_ids: int, **more) -> str:
    return "data: " + json.dumps({"choices": [{"text": "", "token_ids": list(token_ids)}], **more})


LAST = "data: " + json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}})


def test_stock_vllm_is_sent_the_whole_context_each_turn():
    client, asked = served([piece(7), piece(8, 9), LAST, "data: [DONE]"])
    conversation, arrived = Stock(client, NAMES, [1, 2, 3, 4, 5]), []
    assert conversation.turn(1, [6, 6], 3, arrived.append) == Cost(cached_tokens=4, computed_tokens=3)
    conversation.turn(0, [10], 3, arrived.append)
    assert [request["prompt"] for request in asked] == [[1, 2, 3, 4, 5, 6, 6], [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10]]
    assert [request["model"] for request in asked] == ["b", "a"]
    assert arrived == [1, 2, 1, 2]


@pytest.mark.parametrize(("lines", "status", "why"), [
    ([piece(7), LAST], 200, "after 1 of 3 tokens"),
    ([piece(7, 8, 9)], 200, "after 3 of 3 tokens"),  # and no usage
    (["no such model"], 404, "no such model"),
])  # fmt: skip
def test_what_is_not_a_whole_answer_fails_the_turn(lines, status, why):
    client, _ = served(lines, status)
    conversation = Stock(client, NAMES, [1])
    with pytest.raises(Unavailable, match=why):
        conversation.turn(0, [2], 3, lambda count: None)


def test_a_server_that_is_gone_fails_the_turn():
    def gone(request):
        raise httpx.ConnectError("refused")

    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(gone))
    with pytest.raises(Unavailable, match="refused"):
        Stock(client, NAMES, [1]).turn(0, [2], 3, lambda count: None)


def test_experiments_have_names_of_their_own_and_play_what_they_say(tmp_path):
    chosen = experiments.full(8)
    assert len({experiment.name for experiment in chosen}) == len(chosen)
    for experiment in chosen:
        played = experiment.played(0, Scale.named("small"))
        assert len(played) == experiment.sessions
        assert {turn.agent for session in played for turn in session.turns} <= set(range(experiment.agents))
    write_trace(played, tmp_path / "trace.jsonl")
    recorded = experiments.Experiment("trace", experiment.agents, 0, trace=tmp_path / "trace.jsonl")
    again = recorded.played(0, Scale.named("small"))
    assert [session.turns for session in again] == [session.turns for session in played]


def records(latency_s: float) -> list[TurnRecord]:
    made = []
    for session in range(4):
        for turn in range(2):
            asked = session * latency_s + turn * latency_s / 2
            ends = asked + latency_s / 2
            cost = Cost(90, 10, 5, 0, latency_s / 8)
            made.append(TurnRecord(session, turn, turn, asked, [asked + latency_s / 4, ends], ends, cost))
    return made


def test_the_report_says_how_much_better_sharing_is(tmp_path):
    names = [experiment.name for experiment in experiments.full(8)]
    objective = Objective(1.0, 1.0)
    ours, other = summary([records(1.0)], objective), summary([records(3.0)], objective)
    found = {
        "prefillshare": {
            "experiments": dict.fromkeys(names, ours | {"evicted_blocks": 3}),
            "simulated": dict.fromkeys(names, other),
        },
        "none": {"experiments": dict.fromkeys(names, other)},
    }
    headline = report.headline(found, ["none"])
    assert headline[f"prefillshare to none, {names[0]}: throughput"] == pytest.approx(3.0, abs=0.01)
    assert headline[f"prefillshare to none, {names[0]}: p95"] == pytest.approx(3.0, abs=0.01)
    assert headline[f"none, {names[0]}: hit ratio"] == 0.9
    assert headline["simulation error, session_s_p95"] == pytest.approx(2.0, abs=0.01)
    result = {
        "systems": found,
        "config": {
            "experiments": names, "repeats": 1, "budget": vars(systems.Budget(kv_gib=1)), "objective": vars(objective)
        },
        "headline": headline,
        "versions": {"torch": "2"},
        "hardware": {"cpu": "a CPU", "cores": 2},
        "command": "make bench",
        "date": "2026-01-01T00:00",
        "revision": "abc",
    }
    page = report.markdown(result, "plots.png")
    for name in names:
        assert f"## {name}" in page
    assert "session_s_p95 200 %" in page
    report.plot(result, tmp_path / "plots.png")
    assert (tmp_path / "plots.png").stat().st_size > 10_000


def test_a_turn_that_fails_ends_its_session_and_says_why():
    client, _ = served(["busy"], 503)
    played = experiments.short(2)[0].played(0, Scale.named("small"))
    seen = driver.closed(played, lambda context: Stock(client, ("a", "b", "c", "d"), context), 2, "text")
    assert [record.error for record in seen] == ["Unavailable"] * len(played)


def guidellm_report(well: int) -> dict:
    def seen(value: float) -> dict:
        return {"successful": {"median": value, "mean": value, "count": well}}

    names = ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency", "prompt_token_count")
    metrics = dict(zip(names, map(seen, (500.0, 50.0, 2.0, 512.0)), strict=True))
    return {"benchmarks": [{"metrics": metrics, "duration": 8.0}]}


def test_guidellms_report_is_read_in_seconds():
    assert crosscheck.figures_of(guidellm_report(4), 4) == {
        "ttft_p50_s": 0.5, "inter_token_p50_s": 0.05, "requests_per_s": 0.5, "prompt_tokens": 512.0,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="3 of 4 requests went well"):
        crosscheck.figures_of(guidellm_report(3), 4)
