"""Runs `prefillshare prove` on a GPU machine without a network: python kit/prove.py [arguments of prefillshare prove]

Made by deploy/kit/gather.py. Looks whether the machine has what the packages beside this file rely on, unpacks them once, and
runs the command with them. If there are parts of a torch (torch.tar.xz.00 and so on), that one is used, else the machine's.
`--look` only looks. Needs nothing but Python's standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
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
#: Of what is unpacked, and what is compiled from it.
ROOM_BYTES = {PACKAGES: 2 * 2**30, OWN_TORCH: 3 * 2**30}
TORCH, GLIBC = (2, 11), (2, 31)
#: Variables that name folders of things compiled at first use.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT")


def main(arguments: list[str]) -> None:
    if not (KIT / "manifest.json").is_file():
        raise SystemExit(f"prove.py: {KIT} is no kit (make one: python deploy/kit/gather.py, then run the prove.py in it)")
    about = json.loads((KIT / "manifest.json").read_text())
    archives = {PACKAGES: {ARCHIVE: about["sha256"][ARCHIVE]}}
    if any((KIT / part).is_file() for part in about.get("torch", ())):
        archives[OWN_TORCH] = about["torch"]
    wrong = machine_problems(about, archives)
    if OWN_TORCH not in archives or "--look" in arguments:
        wrong += torch_problems(about, os.environ, own=OWN_TORCH in archives)
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
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **{name: os.environ.get(name, str(KIT / "caches" / name.lower())) for name in CACHES},
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
    if platform.machine() != "x86_64":
        found.append(f"this is {platform.machine()}; the kit's packages are for x86-64")
    libc, version = platform.libc_ver()
    if libc == "glibc" and tuple(map(int, version.split(".")[:2])) < GLIBC:
        found.append(f"glibc is {version}; the kit's packages need {GLIBC[0]}.{GLIBC[1]} or newer (use a newer system)")
    if not os.access(KIT, os.W_OK):
        found.append(f"{KIT} cannot be written to, and packages are unpacked there (copy the kit elsewhere)")
    room = sum(ROOM_BYTES[name] for name, parts in archives.items() if not folder(name, parts).is_dir())
    if shutil.disk_usage(KIT).free < room:
        found.append(f"{KIT} has less than {room >> 20} MiB left to unpack the packages (copy the kit elsewhere)")
    for name, parts in archives.items():
        for part, sha256 in parts.items():
            if not (KIT / part).is_file():
                other = "; or remove the other parts, and the machine's torch is used" if name == OWN_TORCH else ""
                found.append(f"{part} is missing (copy it here{other})")
            elif hashlib.sha256((KIT / part).read_bytes()).hexdigest() != sha256:
                found.append(f"{part} is damaged (copy it again)")
    return found


def torch_problems(about: Mapping, environment: Mapping[str, str], *, own: bool = False) -> list[str]:
    """What is wrong with the torch of this environment. `own`: it is only asked about the GPU, since the kit has another."""
    look = "import json, torch; ok = torch.cuda.is_available(); print(json.dumps(["
    look += "torch.__version__, torch.version.cuda, ok and torch.cuda.get_device_capability()]))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False, env=dict(environment))
    if done.returncode and own:
        return []
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return [f"torch cannot be imported: {last[0]} (install torch {TORCH[0]}.{TORCH[1]} or newer, for CUDA 13)"]
    version, cuda, capability = json.loads(done.stdout.splitlines()[-1])
    found = [] if own else version_problems(version, cuda)
    if not capability:
        found.append("torch finds no GPU (nvidia-smi shows whether there is one, and whether the driver is new enough)")
    elif capability != about["compute_capability"]:
        want = ".".join(map(str, capability))
        found.append(f"the GPU has compute capability {want} (make the kit with --compute-capability {want})")
    return found


def version_problems(version: str, cuda: str | None) -> list[str]:
    found = []
    if tuple(map(int, version.split("+")[0].split(".")[:2])) < TORCH:
        found.append(f"torch is {version} (the kit needs {TORCH[0]}.{TORCH[1]} or newer)")
    if not (cuda or "").startswith("13."):
        found.append(f"torch is built for CUDA {cuda} (the kit's kernels need a torch for CUDA 13)")
    return found


def folder(name: str, parts: Mapping[str, str]) -> Path:
    """Where an archive is unpacked. Another kit's archive has another folder."""
    return KIT / f"{name}-{hashlib.sha256(''.join(parts.values()).encode()).hexdigest()[:12]}"


def unpacked(name: str, parts: Mapping[str, str]) -> Path:
    """The folder with what is in an archive. It gets its name when it is whole: an interrupted start leaves no half of it."""
    whole = folder(name, parts)
    if whole.is_dir():
        return whole
    print(f"prove.py: unpacking {', '.join(parts)}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=KIT) as work:
        with tempfile.TemporaryFile(dir=work) as archive:
            for part in sorted(parts):
                with open(KIT / part, "rb") as content:
                    shutil.copyfileobj(content, archive)
            archive.seek(0)
            with tarfile.open(fileobj=archive, mode="r:xz") as tar:
                tar.extractall(Path(work, name), filter="data")
        try:
            Path(work, name).rename(whole)
        except OSError:
            if not whole.is_dir():  # else another run was faster
                raise
    return whole


if __name__ == "__main__":
    main(sys.argv[1:])
