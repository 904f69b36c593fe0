"""What is installed is what was locked, and a licence that asks for more than its notice is known."""

import fnmatch
import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LOCKS = [*sorted((ROOT / "requirements").glob("*.lock")), ROOT / "examples/requirements.lock"]
INSTALLERS = (ROOT / "requirements/install.sh", ROOT / "requirements/examples.sh", ROOT / "deploy/containers/gpu.Dockerfile")
LICENCES = (ROOT / "docs/security.md").read_text().split("\n### Licences\n")[1].split("\n## ")[0]
#: Those that ask for no more than that their notices are kept.
PERMISSIVE = re.compile(r"MIT|Apache|BSD|ISC|0BSD|PSF|Python Software Foundation|CC0|Unlicense|CNRI", re.I)
ASK_FOR_MORE = re.compile(r"GPL|MPL|Mozilla|Proprietary|End User", re.I)
#: They have none in their metadata; their licence files are BSD's, MIT's and Apache's.
IN_THEIR_FILES = {"zss", "setuptools", "oss-harmony"}


def entries(lock: Path) -> dict[str, str]:
    """Package -> all that its entry says."""
    found = re.split(r"(?m)^(?=[a-z])", re.sub(r"(?m)^ *#.*\n", "", lock.read_text()))
    return {entry.partition("==")[0]: entry for entry in found if entry}


def is_named(package: str) -> bool:
    """On the page, by itself or by a pattern."""
    return any(fnmatch.fnmatch(package, name) for name in re.findall(r"`([\w.*-]+)`", LICENCES))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_package_is_locked_by_version_and_hash(lock):
    pinned = re.compile(r"==\S+ \\\n    --hash=sha256:[0-9a-f]{64}\b")
    assert entries(lock)
    assert [name for name, entry in entries(lock).items() if not pinned.search(entry)] == []


@pytest.mark.parametrize("file", INSTALLERS, ids=lambda file: file.name)
def test_what_installs_from_a_lock_file_asks_for_its_hashes(file):
    installs = re.findall(r"(?m)^.*-r \S+\.lock.*$", file.read_text())
    assert installs
    assert all("--require-hashes" in line for line in installs)


def test_a_package_that_asks_for_more_than_its_notice_is_on_the_page():
    unknown = []
    for name in entries(ROOT / "requirements/cpu.lock"):
        told = importlib.metadata.metadata(name)
        said = [told.get("License-Expression") or "", (told.get("License") or "")[:200]]
        said = " ".join(said + [one for one in told.get_all("Classifier") or [] if one.startswith("License")])
        if (ASK_FOR_MORE.search(said) or not PERMISSIVE.search(said)) and name not in IN_THEIR_FILES and not is_named(name):
            unknown.append((name, said))
    assert unknown == []


def test_every_package_that_only_gpus_need_is_on_the_page():
    """They are not installed here: somebody has to look."""
    only = entries(ROOT / "requirements/gpu.lock").keys() - entries(ROOT / "requirements/cpu.lock").keys()
    assert "nvidia-cublas" in only
    assert sorted(name for name in only if not is_named(name)) == []
    assert not is_named("numpy")
