"""The folder rule of the design: imports point down only, one importer of vLLM, nobody but the modes compares mode names."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefillshare.kvshare.modes import mode_names

ROOT = Path(__file__).parents[3]

#: From top to bottom; folders of one row do not know each other.
LAYERS = (
    {"benchmarks"},
    {"finetuning", "proof"},
    {"prefillshare"},
    {"router"},
    {"prefill_service", "decode_service"},
    {"kvshare_vllm"},
    {"kvshare"},
)
#: The rooms of a folder, likewise: its packages and modules.
ROOMS = {
    "router": (
        {"ingress"},
        {"surfaces"},
        {"responses", "ui"},
        {"core", "sessions"},
        {"turn", "ahead"},
        {"kept"},
        {"pools", "tenants", "accounts"},
        {"admission"},
        {"telemetry", "background", "service_rate", "clock", "redis_calls"},
        {"known_prefixes"},
    ),
    "kvshare_vllm": (
        {"plugin"},
        {"surface", "engine"},
        {"grammars", "models"},
        {"transfer"},
        {"patches"},
        {"sampling"},
        {"vllm_refusals", "fair_gate", "forkserver", "tool_text", "asked_formats"},
    ),
}
#: The generated stubs stand beside the layers: they import none of them.
MAY_IMPORT_PROTOS = {"benchmarks", "finetuning", "prefillshare", "router"}
MAY_IMPORT_VLLM = {"benchmarks", "finetuning", "kvshare_vllm", "proof"}
HEAVY = {"ray", "torch", "transformers", "vllm"}
FOLDERS = set().union(*LAYERS) | {"protos"}


def allowed(folder: str) -> set[str]:
    """Folders of ours that a file in `folder` may import."""
    if folder == "protos":
        return {"protos"}
    depth = next(depth for depth, layer in enumerate(LAYERS) if folder in layer)
    return {folder}.union(*LAYERS[depth + 1 :], {"protos"} if folder in MAY_IMPORT_PROTOS else ())


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every import, those inside functions and type-checking blocks too; of ours, as the folders stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, _folder(name)) for name in names)


def _folder(name: str) -> str:
    inside = name.removeprefix("prefillshare.")
    return inside if inside.split(".")[0] in FOLDERS else name


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level name, or folder of ours."""
    return ((line, name.split(".")[0]) for line, name in imported(tree))


def mode_name_comparisons(tree: ast.AST, names: tuple[str, ...]) -> Iterator[int]:
    """Lines that compare something with a mode's name. The word "none" counts beside a name that speaks of modes."""

    def is_name(node: ast.AST, beside: str) -> bool:
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return any(is_name(item, beside) for item in node.elts)
        if not isinstance(node, ast.Constant) or node.value not in names:
            return False
        return node.value != "none" or "mode" in beside.lower() or "sharing" in beside.lower()

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(is_name(side, ast.unparse(node)) for side in sides):
                yield node.lineno
        elif isinstance(node, ast.Match):
            values = [part.value for case in node.cases for part in ast.walk(case.pattern) if isinstance(part, ast.MatchValue)]
            if any(is_name(value, ast.unparse(node.subject)) for value in values):
                yield node.lineno


@pytest.fixture(scope="module")
def sources() -> dict[Path, ast.AST]:
    files = [path for folder in sorted(FOLDERS) for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT): ast.parse(path.read_text()) for path in files}


def test_every_layer_has_sources(sources):
    # finetuning may come without: an empty folder is no layer broken.
    assert FOLDERS - {path.parts[0] for path in sources} <= {"finetuning"}


def test_imports_point_down_only(sources):
    wrong = [
        f"{path}:{line} imports {name}"
        for path, tree in sources.items()
        for line, name in imports(tree)
        if name in FOLDERS and name not in allowed(path.parts[0])
    ]
    assert wrong == []


def modules(tree: ast.AST, folder: str) -> Iterator[tuple[int, str]]:
    """Line and room of every import from a folder of ours."""
    return ((line, name.split(".")[1]) for line, name in imported(tree) if name.startswith(f"{folder}."))


@pytest.mark.parametrize("folder", ROOMS)
def test_rooms_import_from_those_below_them_only(sources, folder):
    floors = ROOMS[folder]
    floor = {room: number for number, rooms in enumerate(floors) for room in rooms}
    rooms = {path.with_suffix("").parts[1] for path in sources if path.parts[0] == folder} - {"__init__"}
    assert rooms == floor.keys()
    wrong = [
        f"{path}:{line} imports {room}"
        for path, tree in sources.items()
        if path.parts[0] == folder and path.stem != folder
        for line, room in modules(tree, folder)
        if room != (own := path.with_suffix("").parts[1]) and own in floor and floor[room] <= floor[own]
    ]
    assert wrong == []


def test_only_the_plugin_imports_vllm(sources):
    wrong = [
        f"{path}:{line}"
        for path, tree in sources.items()
        for line, name in imports(tree)
        if name == "vllm" and path.parts[0] not in MAY_IMPORT_VLLM
    ]
    assert wrong == []


def test_the_lowest_layer_names_no_heavy_library(sources):
    wrong = [
        f"{path}:{line} imports {name}"
        for path, tree in sources.items()
        for line, name in imports(tree)
        if path.parts[0] == "kvshare" and name in HEAVY
    ]
    assert wrong == []


def test_the_lowest_layer_loads_no_heavy_library(sources):
    modules = [".".join(path.with_suffix("").parts) for path in sources if path.parts[0] == "kvshare"]
    program = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module('prefillshare.' + name.removesuffix('.__init__'))\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    loaded = {_folder(name).split(".")[0] for name in json.loads(done.stdout)}
    assert loaded & (HEAVY | FOLDERS) == {"kvshare", "prefillshare"}  # the latter: the package that it stands in


def test_only_the_modes_know_their_names(sources):
    wrong = [
        f"{path}:{line}"
        for path, tree in sources.items()
        for line in mode_name_comparisons(tree, mode_names())
        if path.parts[:2] != ("kvshare", "modes")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("if mode == 'prefillshare': pass", True),
        ("if pool.sharing != 'none': pass", True),
        ("x = settings.mode in ('prefillshare', 'other')", True),
        ("match pool.sharing:\n case 'none' | 'x': pass", True),
        ("if 'prefillshare' == pool.sharing: pass", True),
        ("if tool_choice == 'none': pass", False),
        ("if mode.name == other.name: pass", False),
        ("get_mode('none')", False),
    ],
)
def test_comparison_with_a_modes_name_is_recognised(code, found):
    assert bool(list(mode_name_comparisons(ast.parse(code), ("prefillshare", "none")))) is found


def test_layers_above_and_beside_are_not_allowed():
    assert allowed("kvshare") == {"kvshare"}
    assert allowed("decode_service") == {"decode_service", "kvshare_vllm", "kvshare"}
    assert allowed("router") == {"router", "prefill_service", "decode_service", "kvshare_vllm", "kvshare", "protos"}
    assert "benchmarks" not in allowed("finetuning")


def test_hidden_imports_are_seen():
    code = "def f():\n from vllm.v1 import x\nif TYPE_CHECKING:\n import prefillshare.router.turns as t\nfrom . import here\n"
    assert sorted(imports(ast.parse(code))) == [(2, "vllm"), (4, "router")]


def test_folders_inside_the_package_are_told_from_its_own_modules():
    code = "from prefillshare import router\nfrom prefillshare import app\nfrom prefillshare.app import kvshare\n"
    assert list(imports(ast.parse(code))) == [(1, "router"), (2, "prefillshare"), (3, "prefillshare")]


@pytest.mark.parametrize("patch", sorted((ROOT / "kvshare_vllm/patches").glob("[!_]*.py")), ids=lambda patch: patch.stem)
def test_each_patch_names_what_it_changes_and_says_when_it_goes(patch):
    said = ast.get_docstring(ast.parse(patch.read_text()))
    assert "Seam: " in said
    assert re.search(r"^Goes when: \w.+\.$", said, re.M)
