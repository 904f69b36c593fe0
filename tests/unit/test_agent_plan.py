"""The planner's presets are what they say, and its last line of output is what it found."""

import json
import sys

import pytest

from benchmarks.agents import plan
from benchmarks.agents.workload import Scale


@pytest.mark.parametrize("preset", plan.PRESETS.values(), ids=plan.PRESETS)
def test_a_preset_has_room_for_its_longest_session(preset):
    assert preset.site.kv_tokens >= Scale.named(preset.scale).longest
    assert preset.what


def test_sharing_finds_more_cached_than_each_model_for_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "--sessions", "6", "--agents", "4", "--at-once", "3"])
    plan.main()
    modes = json.loads(capsys.readouterr().out.splitlines()[-1])["4"]["3"]
    assert modes["none"]["hit_ratio"] < 0.7 < modes["prefillshare"]["hit_ratio"] <= modes["icarus"]["hit_ratio"]
    assert modes["none"]["session_s_p95"] > modes["prefillshare"]["session_s_p95"]
