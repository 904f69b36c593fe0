"""Each example runs as users run it, against one real system: that of the page on one's own adapter, with small caches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import System, system
from example_programs import EXAMPLES, PYTHON, ROOT, Turn

from prefillshare.client import Client

pytestmark = pytest.mark.engine

PAGE = (EXAMPLES / "bring_your_own_adapter.md").read_text()
BLOCK = 32


@dataclass(frozen=True)
class Checkout:
    """A folder in which the page's commands find what they name, and write what they make."""

    folder: Path

    def run(self, command: str) -> str:
        """Returns what it prints."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            ["bash", "-euc", command], cwd=self.folder, env=env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def commands(heading: str) -> str:
    """Those of a section of the page."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]
    return "".join(re.findall(r"^```bash\n(.*?)^```", section, re.M | re.S))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, smollm) -> Checkout:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("adapters", "deploy", "examples", "models", ".venv-examples"):
        (folder / name).symlink_to(ROOT / name)
    return Checkout(folder)


@pytest.fixture(scope="module")
def trained(checkout) -> Checkout:
    checkout.run(commands("Train"))
    return checkout


@pytest.fixture(scope="module")
def running(trained):
    (told,) = re.findall(r"^prefillshare serve (\S+)", commands("Serve"), re.M)
    data = yaml.safe_load((ROOT / told).read_text())
    data["base"]["model"] = str(trained.folder / data["base"]["model"])
    for part in (data["prefill"], data["decode"][0]):
        part["kv_cache_gib"] = 0.25
    adapters = data["decode"][0]["adapters"]
    adapters |= {name: str(trained.folder / folder) for name, folder in adapters.items()}
    with system(data) as it:
        yield it


def ran(program: str, *words: str) -> str:
    """What an example prints."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, EXAMPLES / program, *words], env=outside, capture_output=True, text=True, timeout=180
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def check(taken: list[Turn], decoders: list[str], new: int) -> None:
    """The decoders took their turns, and after the first one none computed more than `new` tokens, and what fills a block."""
    assert [turn.decoder for turn in taken] == decoders
    assert taken[0].cached < BLOCK
    for turn in taken[1:]:
        assert turn.computed <= new + BLOCK, taken


def test_the_environment_has_a_client_and_no_engine():
    code = "import prefillshare.client, importlib.util as u; print([n for n in ('torch', 'vllm', 'ray') if u.find_spec(n)])"
    assert subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=60).stdout == "[]\n"
    assert Client.__name__ == "Client"


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_agents_of_openais_sdk(running: System, api):
    printed = ran("agents_sdk.py", "--base-url", running.http_url, "--api", api)
    print(printed)


def test_langgraph(running: System):
    print(ran("langgraph_agents.py", "--base-url", running.http_url))


def test_grpc_session(running: System):
    print(ran("grpc_session.py", "--address", running.grpc_address))


def test_forks(running: System):
    print(ran("forks.py", "--address", running.grpc_address))
