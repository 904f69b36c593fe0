"""What is installed: one importable name, and a client that asks for no engine."""

import subprocess
import zipfile
from pathlib import Path

import clean_environment
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FILES = (
    "prefillshare/py.typed",
    "prefillshare/deploy/configs/demo.yaml",
    "prefillshare/deploy/grafana/prefillshare-overview.json",
    "prefillshare/deploy/keys/example.yaml",
    "prefillshare/deploy/prometheus/rules.yaml",
    "prefillshare/protos/prefillshare/v1/prefillshare.proto",
    "prefillshare/protos/prefillshare/v1/prefillshare_pb2.pyi",
    "prefillshare/protos/prefillshare/v1/rpc_status_pb2.py",
    "prefillshare/client/aio.py",
    "prefillshare/router/turn/turn.py",
    *(f"prefillshare/router/ui/static/{path.name}" for path in (ROOT / "router/ui/static").iterdir()),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return clean_environment.wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(made, tmp_path_factory):
    return clean_environment.install(made, tmp_path_factory.mktemp("env"))


def run(python, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([python, "-I", *words], capture_output=True, text=True, timeout=60)


def command(python, *words: str) -> subprocess.CompletedProcess:
    return run(python, "-c", "from prefillshare.cli import main; main()", *words)


def test_a_wheel_has_one_importable_name_a_licence_and_what_commands_show(made):
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"prefillshare"}
    assert set(FILES) <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "benchmarks" in name or "tests" in name]


@pytest.mark.parametrize("name", ["ray", "torch", "vllm", "nixl", "transformers", "numpy"])
def test_without_extras_no_engine_is_installed(python, name):
    assert f"No module named '{name}'" in run(python, "-c", f"import {name}").stderr


def test_the_client_needs_none(python):
    done = run(python, "-c", "from prefillshare.client import AsyncClient, Client; print(Client.__name__)")
    assert (done.stdout, done.stderr) == ("Client\n", "")


def test_commands_that_need_none_work(python, tmp_path):
    assert "Usage" in command(python, "--help").stdout
    assert command(python, "key").stdout.startswith("key ")
    listed = command(python, "examples").stdout
    assert "demo" in listed
    shown = command(python, "examples", "demo")
    assert "decode:" in shown.stdout
    unknown = command(python, "examples", "demmo")
    assert (unknown.returncode, "one of demo" in unknown.stderr) == (2, True)


def test_commands_that_need_one_say_what_to_install(python):
    done = command(python, "status")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ray is not installed (fix: pip install 'prefillshare[gpu]'")


def test_a_file_is_checked_without_them_as_far_as_it_goes(python, tmp_path):
    file = tmp_path / "deployment.yaml"
    file.write_text(command(python, "examples", "demo").stdout.replace("replicas: 1", "replicas: -1"))
    done = command(python, "check", str(file))
    assert (done.returncode, done.stderr.startswith("error: prefill.replicas:")) == (2, True)


def test_nothing_else_is_importable_from_it(python):
    for name in ("router", "protos", "kvshare", "benchmarks", "deploy"):
        assert f"No module named '{name}'" in run(python, "-c", f"import {name}").stderr
