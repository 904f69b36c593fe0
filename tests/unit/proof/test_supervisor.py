"""Stages in processes of their own: what they tell arrives, and one that breaks or hangs costs only itself."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from prefillshare.proof import supervisor
from prefillshare.proof.asked import Asked
from prefillshare.proof.found import Part, Progress, Status
from prefillshare.proof.stages import Stage
from prefillshare.proof.supervisor import run

ASKED = Asked("/nowhere")
_BEGIN = """
import os, subprocess, sys, time
from prefillshare.proof.found import Part, Progress, Status, line
pipe = os.fdopen(int(sys.argv[1]), "w", buffering=1)
def tell(told):
    print(line(told), file=pipe)
"""
TELLS = "tell(Progress(1, 2, 'half')); tell(Part('one', Status.PASSED, 'good', {'n': 1}))"
BREAKS = "tell(Part('before', Status.MEASURED, '3 s')); print('what went wrong'); raise SystemExit(3)"
HANGS = "tell(Part(str(subprocess.Popen(['sleep', '600']).pid), Status.MEASURED, '')); time.sleep(600)"


def told(programs: dict[str, str], tmp_path, limit_s: float = 60, stage_limit_s: float = 30) -> list[Part | Progress]:
    def command(stage: Stage, asked: Asked, descriptor: int) -> list[str]:
        assert asked == replace(ASKED, until=asked.until)
        assert 0 < asked.until - time.monotonic() <= min(limit_s, stage_limit_s)
        return [sys.executable, "-c", _BEGIN + programs[stage.name], str(descriptor)]

    stages = [Stage(name, "", None, 0, stage_limit_s) for name in programs]
    return [one for _, one in run(stages, ASKED, limit_s, tmp_path / "logs", command)]


def ends(pid: int, within_s: float = 5) -> bool:
    try:
        psutil.Process(pid).wait(within_s)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


def test_what_a_stage_tells_arrives_in_order(tmp_path):
    assert told({"a": TELLS}, tmp_path) == [Progress(1, 2, "half"), Part("one", Status.PASSED, "good", {"n": 1})]


def test_a_stage_that_breaks_keeps_what_it_told_and_the_next_one_runs(tmp_path):
    before, broken, *after = told({"a": BREAKS, "b": TELLS}, tmp_path)
    assert (before.name, before.status) == ("before", Status.MEASURED)
    assert (broken.name, broken.status) == ("a", Status.UNFINISHED)
    assert "status 3" in broken.found
    assert str(tmp_path / "logs" / "a.log") in broken.found
    assert broken.figures["log"] == "what went wrong"
    assert len(after) == 2


@pytest.mark.slow
def test_nothing_is_left_of_a_stage_that_is_killed(tmp_path):
    kills = "tell(Part(str(subprocess.Popen(['sleep', '600']).pid), Status.MEASURED, '')); os.kill(os.getpid(), 9)"
    child, broken = told({"a": kills}, tmp_path)
    assert (broken.status, "status -9" in broken.found) == (Status.UNFINISHED, True)
    assert ends(int(child.name))


@pytest.mark.slow
def test_a_stage_that_hangs_is_ended_with_all_its_processes(tmp_path):
    began = time.monotonic()
    child, late, *after = told({"a": HANGS, "b": TELLS}, tmp_path, stage_limit_s=3)
    assert time.monotonic() - began < 20
    assert (late.name, late.status, "3 s" in late.found) == ("a", Status.UNFINISHED, True)
    assert ends(int(child.name))
    assert len(after) == 2


def test_a_stage_for_which_no_time_is_left_is_skipped(tmp_path, monkeypatch):
    passed_s = 0.0
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + passed_s))
    stages = [Stage(name, "", None, 0) for name in "ab"]
    parts = []
    for _, one in run(stages, ASKED, 240, tmp_path, lambda *to: [sys.executable, "-c", _BEGIN + TELLS, str(to[-1])]):
        parts += [one] if isinstance(one, Part) else []
        passed_s = 215.0
    first, last = parts
    assert (first.name, first.status) == ("one", Status.PASSED)
    assert (last.name, last.status) == ("b", Status.SKIPPED)


def test_a_stage_that_ends_without_a_result_is_not_passed_over(tmp_path):
    (only,) = told({"a": ""}, tmp_path)
    assert (only.name, only.status) == ("a", Status.UNFINISHED)


@pytest.mark.slow
def test_nothing_is_left_of_a_run_that_is_abandoned(tmp_path):
    def command(stage: Stage, asked: Asked, descriptor: int) -> list[str]:
        return [sys.executable, "-c", _BEGIN + HANGS, str(descriptor)]

    running = run([Stage("a", "", None, 0)], ASKED, 60, tmp_path, command)
    _, part = next(running)
    running.close()
    assert ends(int(part.name))
