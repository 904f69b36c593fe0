"""Each example runs as users run it, against one real system: that of the page on one's own adapter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import System
from example_programs import EXAMPLES, PYTHON, ROOT, Turn, turns

from prefillshare.apply import apply
from prefillshare.kvshare.config import parse
from smollm.conftest import DEPLOYMENT, OWN

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
        done = subprocess.run(["bash", "-euc", command], cwd=self.folder, env=env, capture_output=True, text=True, timeout=240)
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
def own(checkout, running) -> Checkout:
    """With the page's decoder, trained and added to what runs, as the page says for a deployment that runs."""
    checkout.run(commands("Train"))
    (told,) = re.findall(r"^prefillshare serve (\S+)", commands("Serve"), re.M)
    assert ROOT / told == DEPLOYMENT
    plain = running.deployment.model_dump(mode="json")
    (folder,) = [pool["adapters"][OWN] for pool in yaml.safe_load(DEPLOYMENT.read_text())["decode"]]
    plain["decode"][0]["adapters"][OWN] = str(checkout.folder / folder)
    apply(parse(plain))
    yield checkout
    apply(running.deployment)


def ran(program: str, *words: str) -> str:
    """What an example prints."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([PYTHON, EXAMPLES / program, *words], env=outside, capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def check(taken: list[Turn], decoders: list[str], own: list[int]) -> None:
    """The decoders took their turns, and computed what was new. `own`: at most so many tokens of a prompt are the agent's own,
    which the context does not keep."""
    assert [turn.decoder for turn in taken] == decoders
    assert taken[0].cached <= BLOCK
    new = taken[0].prompt
    for before, its_own, turn in zip(taken, own, taken[1:], strict=False):
        assert turn.cached >= before.prompt - its_own - 2 * BLOCK, taken
        assert turn.prompt == turn.cached + turn.computed
        new += turn.prompt - (before.prompt - its_own + before.generated)
    assert sum(turn.computed for turn in taken) <= 1.05 * new + len(taken) * BLOCK, taken


def test_the_environment_has_a_client_and_no_engine():
    code = "import prefillshare.client, importlib.util as u; print([n for n in ('torch', 'vllm', 'ray') if u.find_spec(n)])"
    assert subprocess.run([PYTHON, "-I", "-c", code], capture_output=True, text=True, timeout=60).stdout == "[]\n"


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_agents_of_openais_sdk_hand_over_and_compute_what_is_new(running, api):
    printed = ran("agents_sdk.py", "--base-url", running.http_url, "--api", api)
    taken = turns(printed)
    planner, caller, coder = 190, 205, 25
    check(taken, ["base", "tools", "base", "arithmetic", "base"], [planner, caller, planner, coder, planner])
    assert [turn.where.count(" -> ") for turn in taken] == [1, 1, 0, 0, 0]
    assert [turn.where for turn in taken[2:]] == ["streamed"] * 3
    assert re.search(r"^\d+ euros$", printed, re.M)  # what the tool caller's function has returned


def test_nodes_of_langgraph_compute_what_is_new(running):
    printed = ran("langgraph_agents.py", "--base-url", running.http_url)
    taken = turns(printed)
    check(taken, ["base", "tools", "arithmetic", "base"], [25, 150, 25, 25])
    assert [turn.where.rpartition(", ")[2] for turn in taken] == ["begun", *["continued"] * 3]


def test_a_grpc_session_computes_what_is_new(running):
    printed = ran("grpc_session.py", "--address", running.grpc_address)
    check(turns(printed), ["base", "arithmetic", "tools", "base"], [20, 25, 40, 20])
    assert re.search(r"^the session holds \d+ tokens\nafterwards: .*session", printed, re.M)


def test_forks_read_one_context_and_what_they_write_is_joined(running):
    first, *forks, joined = turns(ran("forks.py", "--address", running.grpc_address))
    assert [turn.decoder for turn in forks] == ["base", "arithmetic", "tools", "base"]
    for turn in (*forks, joined):
        assert turn.cached >= first.prompt - 2 * BLOCK
    written = sum(turn.generated for turn in forks)
    assert joined.computed <= written + 40 + 2 * BLOCK


def test_ones_own_adapter_is_checked_and_answers_from_the_bases_kv(running, own):
    own.run(commands("Check"))
    first, second = (list(map(int, line.split()[1:])) for line in ask(running).splitlines())
    context = first[0]
    assert second[1] >= context - 2 * BLOCK
    assert second[2] <= second[0] - context + 2 * BLOCK


def ask(running: System) -> str:
    """Runs what the page's section "Ask" shows, and returns what its program prints."""
    router = running.deployment.router
    (section,) = re.findall(r"^## Ask\n(.*)", PAGE, re.M | re.S)
    section = section.replace(":8000", f":{router.http_port}").replace(":9000", f":{router.grpc_port}")
    (call,), (program,) = (re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S) for language in ("bash", "python"))
    answer = json.loads(subprocess.run(["bash", "-euc", call], capture_output=True, text=True, timeout=60, check=True).stdout)
    assert (answer["model"], answer["usage"]["completion_tokens"] > 0) == ("own", True)
    return subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, timeout=60, check=True).stdout
