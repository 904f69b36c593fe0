"""Runs `prefillshare prove` on a GPU machine without a network: python kit/prove.py [arguments of prefillshare prove]

Made by deploy/kit/gather.py. Looks whether the machine has what the packages beside this file rely on, unpacks them once, and
runs the command with them. If there are parts of a torch (torch.tar.xz.00 and so on), that one is used, else the machine's.
`--look` only looks. Needs nothing but Python's standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

KIT = Path(__file__).resolve().parent
PACKAGES, OWN_TORCH = "site", "torch"
ARCHIVE = "site.tar.xz"
#: Folder of what is unpacked -> the room that it needs.
ROOM_BYTES = {PACKAGES: 2**30, OWN_TORCH: 2 * 2**30}
TORCH = (2, 11)


def main(arguments: list[str]) -> None:
    about = json.loads((KIT / "manifest.json").read_text())
    archives = {PACKAGES: {ARCHIVE: about["sha256"][ARCHIVE]}}
    if any((KIT / part).is_file() for part in about.get("torch", ())):
        archives[OWN_TORCH] = about["torch"]
    wrong = machine_problems(about, archives)
    if OWN_TORCH not in archives:
        wrong += torch_problems(about, os.environ)
    if not wrong and "--look" not in arguments:
        folders = [unpacked(name, parts) for name, parts in archives.items()]
        environment = os.environ | own_environment(folders)
        if OWN_TORCH in archives:
            wrong += torch_problems(about, environment)
    for problem in wrong:
        print(f"prove.py: {problem}", file=sys.stderr)
    if wrong or "--look" in arguments:
        print(f"prove.py: {'not ready' if wrong else 'ready'}", file=sys.stderr)
        raise SystemExit(bool(wrong))
    command = [sys.executable, "-m", "prefillshare", "prove", *arguments]
    os.execve(sys.executable, command, environment)


def own_environment(folders: list[Path]) -> dict[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH", "")])),
        "PYTHONSAFEPATH": "1",  # else a checkout in the current folder would be imported instead
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }


def machine_problems(about: Mapping, archives: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What stands in the way, each with what to do about it. `archives`: folder -> its archive's parts -> their SHA-256."""
    found, here = [], ".".join(map(str, sys.version_info[:2]))
    if here != (wanted := about["python"]):
        found.append(f"this is Python {here}; the kit's packages are for {wanted} (run it with python{wanted})")
    if not (shutil.which("gcc") or shutil.which("clang") or os.environ.get("CC")):
        found.append("there is no C compiler, and Triton compiles its launchers (install gcc, or set CC)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        found.append(f"there is no Python.h, and Triton's launchers need it (install python{here}-dev)")
    room = sum(ROOM_BYTES[name] for name in archives if not (KIT / name).is_dir())
    if shutil.disk_usage(KIT).free < room:
        found.append(f"{KIT} has less than {room >> 20} MiB left to unpack the packages (copy the kit elsewhere)")
    for parts in archives.values():
        for part, sha256 in parts.items():
            if not (KIT / part).is_file():
                found.append(f"{part} is missing (copy it here; or remove the others, and the machine's torch is used)")
            elif hashlib.sha256((KIT / part).read_bytes()).hexdigest() != sha256:
                found.append(f"{part} is damaged (copy it again)")
    return found


def torch_problems(about: Mapping, environment: Mapping[str, str]) -> list[str]:
    """What is wrong with the torch of this environment."""
    look = "import json, torch; ok = torch.cuda.is_available(); print(json.dumps(["
    look += "torch.__version__, torch.version.cuda, ok and torch.cuda.get_device_capability()]))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False, env=dict(environment))
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return [f"torch cannot be imported: {last[0]} (install torch {TORCH[0]}.{TORCH[1]} or newer, for CUDA 13)"]
    version, cuda, capability = json.loads(done.stdout.splitlines()[-1])
    found = []
    if tuple(map(int, version.split("+")[0].split(".")[:2])) < TORCH:
        found.append(f"torch is {version} (the kit needs {TORCH[0]}.{TORCH[1]} or newer)")
    if not (cuda or "").startswith("13."):
        found.append(f"torch is built for CUDA {cuda} (the kit's kernels need a torch for CUDA 13)")
    if not capability:
        found.append("torch finds no GPU (nvidia-smi shows whether there is one, and whether the driver is new enough)")
    elif capability != about["compute_capability"]:
        want = ".".join(map(str, capability))
        found.append(f"the GPU has compute capability {want} (make the kit with --compute-capability {want})")
    return found


def unpacked(name: str, parts: Mapping[str, str]) -> Path:
    """The folder with what is in an archive. It gets its name when it is whole: an interrupted start leaves no half of it."""
    folder = KIT / name
    if folder.is_dir():
        return folder
    print(f"prove.py: unpacking {', '.join(parts)}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=KIT) as work:
        with tempfile.TemporaryFile(dir=work) as archive:
            for part in sorted(parts):
                with open(KIT / part, "rb") as content:
                    shutil.copyfileobj(content, archive)
            archive.seek(0)
            with tarfile.open(fileobj=archive, mode="r:xz") as tar:
                tar.extractall(Path(work, name), filter="data")
        Path(work, name).rename(folder)
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
