"""`prefillshare prove` in its short form: every stage on real engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefillshare import forkserver

pytestmark = pytest.mark.engine

LIMIT_S = 400


def prove(folder, *arguments: str) -> tuple[int, dict, str]:
    program = Path(sys.executable).with_name("prefillshare")
    command = [program, "prove", "--short", "--output", folder / "proof.json", *arguments]
    env = {name: value for name, value in os.environ.items() if name != forkserver.SETTING}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=env)
    logs = "\n".join(file.read_text(errors="replace")[-3000:] for file in (folder / "proof-logs").glob("*.log"))
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr + logs


def test_it_proves_this_machine(tmp_path):
    """In bfloat16, so that the bound is that of a dtype which loses something."""
    stages = ("exact-icarus", "served", "steps")
    status, found, said = prove(tmp_path, "--dtype", "bfloat16", *(f"--stage={name}" for name in stages))
    parts = found["parts"]
    assert (status, found["proven"]) == (0, True), said
    exact = parts["exact icarus"]
    assert exact["max_abs_diff"] <= 1e-3 < exact["max_abs_diff_to_own_kv"]
    assert exact["preemptions"] > 0
    for mode in ("prefillshare", "icarus"):
        answers = parts[f"bfloat16 {mode}"]
        assert 0 < answers["mean_abs_diff"] <= answers["bound"] < answers["of_own_kv"]
        for how in ("prefill and decode apart", "one engine"):
            assert parts[f"speed: {mode}, {how}"]["to_stock"]["tokens_per_s"] > 0
    assert parts["transfer"]["bytes"] > 0
    assert parts["transfer"]["bytes_per_s"] > 0
    assert set(parts["steps: icarus to prefillshare"]["to_prefillshare"]) == {"1", "2"}
    assert json.loads((tmp_path / "proof.json").read_text())["versions"]["torch"]
