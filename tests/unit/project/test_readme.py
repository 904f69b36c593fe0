"""The README and the pages that explain name only what is there: commands, targets, files, keys, modes, calls."""

import importlib.util
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from google.protobuf import json_format

from prefillshare.cli import app
from prefillshare.client import RemoteSession, TurnArguments
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.modes import mode_names
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
NAMES = (
    "README.md", "CONTRIBUTING.md", "docs/client.md", "docs/using.md", "docs/deploying.md", "docs/architecture.md",
    "examples/README.md", "examples/bring_your_own_adapter.md",
)  # fmt: skip
PAGES = {name: (ROOT / name).read_text() for name in NAMES}

#: Made on the user's machine, or the user's own.
MADE = ("models", "adapters", "runs", ".venv")
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - set(MADE)


def blocks(page: str, language: str) -> list[str]:
    # Blocks inside a list are indented.
    return [inspect.cleandoc(text) for text in re.findall(rf"^ *```{language}\n(.*?)^ *```", PAGES[page], re.S | re.M)]


def commands(page: str) -> list[list[str]]:
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def spoken_commands(text: str, program: str) -> list[list[str]]:
    """Commands in running text: `make demo`, `prefillshare serve FILE`."""
    return [found.split() for found in re.findall(rf"`({program} [^`]+)`", text)]


def expanded(path: str) -> list[str]:
    """a/{b,c}.py -> a/b.py, a/c.py"""
    if not (match := re.match(r"(.*)\{(.*)\}(.*)", path)):
        return [path]
    return [f"{match[1]}{part}{match[3]}" for part in match[2].split(",")]


def test_quick_start_is_two_commands_and_ci_runs_the_tests_with_the_same():
    assert [" ".join(c) for c in shlex_lines(blocks("README.md", "bash")[0])] == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


def shlex_lines(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = spoken_commands(PAGES[page], "make") + [c for c in commands(page) if c[0] == "make"]
    assert named or page != "README.md"
    assert {target for _, target in named} <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_command_line_exists(page):
    root = typer.main.get_command(app)
    named = spoken_commands(PAGES[page], "prefillshare") + [c for c in commands(page) if c[0] == "prefillshare"]
    assert named
    for words in named:
        command = root
        for word in words[1:]:
            if not hasattr(command, "commands"):
                break
            assert word in command.commands, words
            command = command.commands[word]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, words


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page):
    words = set(re.findall(r"`([^`\s]+/[^`\s]*)`", PAGES[page]))
    words |= {word for command in commands(page) for word in command}
    paths = {path for word in words for path in expanded(word) if path.split("/")[0] in FOLDERS and "/" in path}
    assert len(paths) > 1
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_folder_map_is_of_folders_that_exist():
    folders = re.findall(r"(?:^|   )([a-z_]+/[a-z_/]*) ", blocks("README.md", "text")[0], re.M)
    assert len(folders) == 15
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("https:"):
            continue
        file, _, anchor = target.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.is_file(), text
        headings = re.findall(r"^#+ (.+)$", there.read_text(), re.M) if anchor else ()
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, text


@pytest.mark.parametrize("page", PAGES)
def test_every_key_of_the_deployment_file_exists(page):
    for section, key in re.findall(r"`(base|prefill|router|cluster)\.([a-z_]+)`", PAGES[page]):
        assert key in Deployment.model_fields[section].annotation.model_fields, f"{section}.{key}"


def test_modes_are_called_delivered_exactly_where_they_are():
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", README, re.M)
    states = {name: state for name, state in rows if "delivered" in state}
    assert {name for name, state in states.items() if state.startswith("delivered")} == set(mode_names())


def test_every_rule_is_listed_with_what_upholds_it():
    page = PAGES["docs/architecture.md"]
    assert re.findall(r"^\| \*\*(R\d)\*\* [^|]+\| [^|]+ \|$", page, re.M) == [f"R{n}" for n in range(1, 8)]


def test_python_examples_name_arguments_and_modules_that_exist():
    taken = set(TurnArguments.__annotations__)
    changed = set(inspect.signature(RemoteSession.update).parameters)
    python = [block for page in ("README.md", "docs/client.md", "docs/using.md") for block in blocks(page, "python")]
    assert len(python) > 8
    for block in python:
        compile(block, "README.md", "exec")
        for module in re.findall(r"^from (\S+) import", block, re.M):
            assert importlib.util.find_spec(module), module
        for call in re.findall(r"session\.(?:turn|stream|choices)\((.*?)\)[\n:]", block):
            assert set(re.findall(r"(\w+)=", call)) <= taken, call
        for call in re.findall(r"session\.update\((.*?)\)", block):
            assert set(re.findall(r"(\w+)=", call)) <= changed, call
    for argument in re.findall(r"`(\w+)=`", PAGES["docs/using.md"] + PAGES["docs/client.md"]):
        assert argument in taken, argument


def test_grpcurl_examples_are_calls_of_the_service():
    service = pb.DESCRIPTOR.services_by_name["PrefillShare"]
    calls = [words for words in commands("docs/client.md") if words[0] == "grpcurl"]
    assert len(calls) == 3
    for words in calls:
        name, _, method = words[-1].partition("/")
        assert name == service.full_name
        request = getattr(pb, service.methods_by_name[method].input_type.name)
        json_format.ParseDict(json.loads(words[words.index("-d") + 1]) if "-d" in words else {}, request())


def test_every_seam_is_in_the_architecture_page():
    files = [file for folder in ("kvshare_vllm", "router") for file in sorted((ROOT / folder).rglob("*.py"))]
    seams = [str(file.relative_to(ROOT)) for file in files if "Seam:" in file.read_text()]
    assert len(seams) > 6
    assert [seam for seam in seams if f"| `{seam}`" not in PAGES["docs/architecture.md"]] == []
