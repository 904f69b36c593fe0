"""The planner's presets are what they say, and its last line of output is what it found."""

import json
import sys

import pytest

from benchmarks.agents import plan
from benchmarks.agents.measures import Objective
from benchmarks.agents.workload import Scale, poisson, sessions
from benchmarks.shared import result
from prefillshare.kvshare.errors import ConfigError


@pytest.fixture
def planned(monkeypatch, tmp_path, capsys):
    """planned(arguments): what is found, and what was written."""
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    monkeypatch.setattr(plan, "RESULTS", tmp_path)

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["plan", *arguments])
        plan.main()
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found, {file.name: json.loads(file.read_text()) for file in tmp_path.iterdir()}

    return run


@pytest.mark.parametrize("preset", plan.PRESETS.values(), ids=plan.PRESETS)
def test_a_preset_has_room_for_its_longest_session(preset):
    assert preset.site.kv_tokens >= Scale.named(preset.scale).longest
    assert preset.what


def test_a_thousand_replicas_are_a_thousand():
    site = plan.PRESETS["thousand"].site
    assert site.prefill + site.decode == 1000


def test_sharing_finds_more_cached_than_each_model_for_itself(planned):
    found, written = planned("--sessions", "6", "--agents", "4", "--at-once", "3")
    modes = written["plan_own.json"]["loads"]["4"]["3"]
    assert modes["none"]["hit_ratio"] < 0.7 < modes["prefillshare"]["hit_ratio"] <= modes["icarus"]["hit_ratio"]
    assert modes["none"]["session_s_p95"] > modes["prefillshare"]["session_s_p95"]
    ratios = found["prefillshare"]["4"]
    expected = modes["prefillshare"]["turns_per_s"] / modes["none"]["turns_per_s"]
    assert ratios["throughput"] == pytest.approx(expected, abs=0.01)
    assert (ratios["published_throughput"], found["icarus"]["4"]["published_p95"]) == (3.6, 5.1)


def test_a_rate_needs_fewer_replicas_where_models_share(planned):
    arguments = ("--sessions", "30", "--agents", "4", "--per-s", "1.0", "--ttft-s", "2", "--good", "0.9")
    found, written = planned(*arguments)
    none, shared = found["4"]["none"], found["4"]["prefillshare"]
    assert none["prefill"] + none["decode"] > shared["prefill"] + shared["decode"]
    assert min(none["good"], shared["good"]) >= 0.9
    assert list(written) == ["plan_need.json"]


def test_one_replica_less_would_not_do():
    preset, objective = plan.PRESETS["papers"], Objective(2.0, 0.1)
    played = poisson(sessions("react", 30, 4, 0, Scale.named("papers")), 1.0, 0)
    tried = []
    found = plan.need("none", preset, played, objective, 0.9, lambda: tried.append(1))
    assert found["good"] >= 0.9
    assert found["prefill"] > 1
    less = plan.replace(preset.site, prefill=found["prefill"] - 1, decode=found["decode"])
    assert plan.share_good(plan.Simulation("none", less, preset.of("none")).run(played), objective) < 0.9
    assert tried


def test_measured_costs_take_the_place_of_a_data_sheets(planned, tmp_path):
    costs = plan.PRESETS["papers"].of("none")
    of = {"costs": {"costs": {**vars(costs), "step_s": 0.05}}}
    (tmp_path / "agents.json").write_text(json.dumps({
        "systems": {"none": of, "prefillshare": of, "vllm": {}}, "config": {"budget": {"kv_gib": 8}},
        "command": "python -m benchmarks.agents", "hardware": {"cpu": "a CPU", "cores": 2},
    }))  # fmt: skip
    found, written = planned("--costs", "agents", "--sessions", "4", "--agents", "2", "--at-once", "2")
    assert set(found) == {"prefillshare"}
    assert "a CPU" in written["plan_agents.json"]["config"]["what"]


def test_costs_without_the_baselines_are_refused(planned, tmp_path):
    of = {"costs": {"costs": vars(plan.PRESETS["papers"].of("none"))}}
    (tmp_path / "agents.json").write_text(json.dumps({"systems": {"icarus": of}, "config": {"budget": {"kv_gib": 1}}}))
    with pytest.raises(ConfigError, match="no costs of mode none"):
        planned("--costs", "agents")


@pytest.mark.parametrize("content", [None, "{", '{"systems": {}, "config": {"budget": {"kv_gib": 1}}}'])
def test_costs_that_were_not_measured_are_refused(planned, tmp_path, content):
    if content:
        (tmp_path / "agents.json").write_text(content)
    with pytest.raises(ConfigError, match="no measured costs") as refused:
        planned("--costs", "agents")
    assert refused.value.field == "--costs"
