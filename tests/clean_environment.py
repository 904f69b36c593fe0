"""The package as pip installs it, in a separate environment with the dependencies that it asks for and no others."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


#: Folders of the project from which no wheel contains anything; setuptools would take what it finds in build/ for ours.
_ELSEWHERE = (".*", "adapters", "benchmarks", "build", "data", "models", "tests", "__pycache__", "*.egg-info")


def wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the project. Nothing is downloaded: the build tools are installed here."""
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*_ELSEWHERE))
    build = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (made,) = folder.glob("*.whl")
    return made


def install(made: Path, folder: Path) -> Path:
    """The Python of an environment with the wheel and its dependencies, which are those installed here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(site)
    (info,) = site.glob("prefillshare-*.dist-info")
    for one in _closure(Distribution.at(info)):
        for name in {Path(file).parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(one.locate_file(name))
    return folder / "bin" / "python"


def _closure(of: Distribution) -> list[Distribution]:
    """The distribution's dependencies, direct and indirect, without extras."""
    needed: dict[str, Distribution] = {}
    waiting = [(of, frozenset({""}))]
    while waiting:
        one, extras = waiting.pop()
        for text in one.requires or ():
            wanted = Requirement(text)
            if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            if wanted.name not in needed:
                needed[wanted.name] = distribution(wanted.name)
                waiting.append((needed[wanted.name], frozenset({"", *wanted.extras})))
    return list(needed.values())
