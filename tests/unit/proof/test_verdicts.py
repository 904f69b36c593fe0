"""What counts as proven: within the bound, with a preemption, and only if the comparison could have failed."""

from __future__ import annotations

import json
import math

import pytest

from prefillshare import reference
from prefillshare.kvshare.errors import ConfigError, InvalidInput
from prefillshare.kvshare.modes import modes
from prefillshare.proof import cli, exact, served, stages
from prefillshare.proof.asked import Machine
from prefillshare.proof.found import Part, Progress, Status, line, parse
from prefillshare.proof.report import Results

COUNTS = {"turns": 9, "tokens": 90, "resumes": 1}


@pytest.mark.parametrize(
    ("worst", "preemptions", "to_own_kv", "status"),
    [
        (1e-5, 2, 0.5, Status.PASSED),
        (2e-3, 2, 0.5, Status.FAILED),
        (math.nan, 2, 0.5, Status.FAILED),
        (1e-5, 0, 0.5, Status.FAILED),
        (1e-5, 2, 1e-4, Status.FAILED),
    ],
)
def test_exact(worst, preemptions, to_own_kv, status):
    assert exact.verdict("icarus", worst, preemptions, to_own_kv, **COUNTS).status is status


@pytest.mark.parametrize(
    ("off", "plain", "to_own_kv", "status"),
    [
        (0.010, 0.008, 0.5, Status.PASSED),
        (0.025, 0.008, 0.5, Status.FAILED),
        (0.010, 0.008, 0.02, Status.FAILED),
        (math.nan, 0.008, 0.5, Status.FAILED),
        (1e-5, 0.0, 0.5, Status.PASSED),
        (2e-3, 0.0, 0.5, Status.FAILED),
    ],
)
def test_answers_in_the_served_dtype(off, plain, to_own_kv, status):
    assert served.verdict("icarus", "bfloat16", off, plain, to_own_kv).status is status


def test_a_difference_that_is_no_number_is_not_passed_over():
    assert math.isnan(reference.max_abs_diff([0.0, math.nan, 0.0], [0.0, 0.0, 1.0]))
    assert math.isnan(reference.largest([0.0, math.nan, 1.0]))
    assert reference.max_abs_diff([0.0, 3.0, 1.0], [0.0, 0.0, 0.0]) == 3


def test_every_mode_that_shares_has_a_stage():
    assert {f"exact-{mode.name}" for mode in modes() if mode.shares_prefill} < stages.stages().keys()


def test_stages_are_chosen_by_how_their_names_begin():
    assert [one.name for one in stages.choose(["steps", "exact-i"])] == ["exact-icarus", "steps"]
    assert [one.name for one in stages.choose([])] == list(stages.stages())
    with pytest.raises(InvalidInput, match=r"--stage.*no stage 'fast'.*served"):
        stages.choose(["fast"])


def test_what_is_told_survives_the_way_between_processes():
    for told in (Progress(1, 2, "x"), Part("a", Status.FAILED, "b", {"c": [1.5]})):
        assert parse(line(told)) == told


def test_proven_is_only_what_has_no_gap(tmp_path):
    file = tmp_path / "more" / "proof.json"
    results = Results(Machine("cpu", "2 cores", 1), "float32", file)
    assert not results.proven
    results.add(Part("m", Status.MEASURED, "", {"x": math.nan}), 1)
    assert not results.proven
    assert json.loads(file.read_text())["parts"][0]["figures"] == {"x": None}
    results = Results(results.machine, "float32", file)
    assert json.loads(file.read_text())["parts"] == []
    results.add(Progress(0, 1, ""), 1)
    results.add(Part("a", Status.PASSED, ""), 2)
    results.add(Part("b", Status.MEASURED, "", {"x": 1}), 3)
    assert results.proven
    assert json.loads(file.read_text())["proven"] is True
    for status in (Status.FAILED, Status.UNFINISHED, Status.SKIPPED):
        other = Results(results.machine, "float32", file)
        other.add(Part("a", Status.PASSED, ""), 2)
        other.add(Part("b", status, ""), 3)
        assert not other.proven
        assert [one["status"] for one in json.loads(file.read_text())["parts"]] == ["passed", status]
    assert results.summary()["parts"]["b"] == {"status": "measured", "x": 1}


def test_a_wrong_option_names_the_field():
    with pytest.raises(InvalidInput, match=r"--dtype.*int8"):
        cli.prove(dtype="int8")


def test_engines_for_gpus_without_a_gpu_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(cli.platform, "on_cpu", lambda: False)
    with pytest.raises(ConfigError, match=r"torch sees no GPU.*nvidia-smi"):
        cli.prove()


def test_a_file_that_cannot_be_written_names_the_option(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output: cannot write .*fix"):
        Results(Machine("cpu", "2 cores", 1), "float32", tmp_path / "file" / "proof.json")
