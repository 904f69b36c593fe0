"""Modules have what others take from them by name: also in code that only long runs reach, such as that of benchmarks."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = (
    "benchmarks", "decode_service", "finetuning", "kvshare", "kvshare_vllm", "prefill_service", "prefillshare", "proof",
    "router",
)  # fmt: skip
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
#: Of every module.
ALWAYS = {"__name__", "__file__", "__doc__", "__path__"}


def file_of(name: str) -> Path | None:
    """The project's file of a module, if it is one of the project's."""
    parts = name.split(".")
    inside = parts[1:] if parts[0] == "prefillshare" and len(parts) > 1 and parts[1] in FOLDERS else parts
    if not inside or inside[0] not in FOLDERS:
        return None
    path = ROOT.joinpath(*inside)
    found = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    return found[0] if found else None


@cache
def names_in(file: Path) -> frozenset[str]:
    """What a module's code binds at its top, also inside `if`, `with` and `try`."""
    bound = set()
    waiting = list(ast.parse(file.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        bound |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    folder = file.parent if file.name == "__init__.py" else None
    return frozenset(bound | {child.stem for child in (folder.iterdir() if folder else ())})


def missing(text: str) -> list[str]:
    """What code takes from modules of the project that they do not have."""
    tree, modules, wrong = ast.parse(text), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if module := file_of(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = module
                elif (of := file_of(node.module)) and alias.name not in names_in(of):
                    wrong.append(f"line {node.lineno}: {node.module} has no {alias.name}")
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in stored:
            module = modules.get(node.value.id)
            if module and node.attr not in names_in(module) | ALWAYS:
                wrong.append(f"line {node.lineno}: {node.value.id} has no {node.attr}")
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_taken_from_a_module_is_there(file):
    assert not missing(file.read_text())


def test_what_is_not_there_is_found():
    assert missing("from benchmarks.shared import environment\nenvironment.revision()\nenvironment.nothing()") == [
        "line 3: environment has no nothing"
    ]
    assert missing("from prefillshare.platform import versions, nothing") == [
        "line 1: prefillshare.platform has no nothing"
    ]
