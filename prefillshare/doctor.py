"""`prefillshare doctor`: checks whether this machine can run engines, and says what to do if it cannot.

Every check reports what it has found. Nothing is started except a NIXL read between two agents, in a separate process.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from prefillshare import platform
from prefillshare.kvshare.config import Router
from prefillshare.kvshare.errors import PrefillShareError

PACKAGE = "prefillshare"
#: The backend by which NIXL moves KV, on one machine and between machines.
BACKEND = "UCX"
LOOPBACK_LIMIT_S = 60.0
#: GiB of /dev/shm: Ray's object store and the transports' shared memory; a container has 64 MiB unless told otherwise.
SHARED_MEMORY_GIB = 2.0
OPEN_FILES = 4096
GIB = 2**30
#: Port -> what it is for; among them the router's default ports.
PORTS = {
    Router().http_port: "router.http_port",
    Router().grpc_port: "router.grpc_port",
    6379: "the port of a Ray cluster (ray start --port)",
    8265: "the port of Ray's dashboard (ray start --dashboard-port)",
}


class Level(StrEnum):
    OK, WARNING, WRONG = "ok", "warning", "wrong"


@dataclass(frozen=True)
class Finding:
    """`fix`: what to do, unless the level is OK."""

    about: str
    level: Level
    found: str
    fix: str = ""


def versions() -> Iterator[Finding]:
    """Versions of the packages that the project's metadata requires."""
    wrong = []
    for line in importlib.metadata.requires(PACKAGE) or ():
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((wanted, "is not installed"))
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            wrong.append((wanted, f"is {there}"))
    for wanted, what in wrong:
        yield Finding("versions", Level.WRONG, f"{wanted.name} {what}", f"pip install '{wanted.name}{wanted.specifier}'")
    if not wrong:
        yield Finding("versions", Level.OK, f"Python {sys.version.split()[0]}, packages as asked for")
    build = platform.vllm_build()
    fix = f"pip install '{PACKAGE}[gpu]', or make setup for the CPU build"
    yield Finding("vLLM", Level.OK, build) if build else Finding("vLLM", Level.WRONG, "is not installed", fix)


def nixl() -> Iterator[Finding]:
    command = [sys.executable, "-m", "prefillshare.nixl_loopback", BACKEND]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOPBACK_LIMIT_S)
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(command, 1, "", f"it did not end within {LOOPBACK_LIMIT_S:g} s")
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]
        fix = "look at UCX_TLS and UCX_NET_DEVICES (ucx_info -d lists the transports); also install nixl-cu12 or nixl-cu13, to"
        fix += " match torch's CUDA version"
        yield Finding("NIXL", Level.WRONG, f"a read by {BACKEND} failed: {why}", fix)
        return
    found = json.loads(done.stdout.splitlines()[-1])
    rate = f"{found['bytes_per_s'] / 1e9:.1f} GB/s from memory to memory"
    yield Finding("NIXL", Level.OK, f"{BACKEND}: {rate}; backends there: {', '.join(found['backends'])}")


def shared_memory(folder: str = "/dev/shm") -> Iterator[Finding]:
    if not Path(folder).is_dir():
        yield Finding("shared memory", Level.WRONG, f"there is no {folder}", "mount a tmpfs there")
        return
    free = shutil.disk_usage(folder).free / GIB
    fix = f"give {folder} {SHARED_MEMORY_GIB:g} GiB or more (docker: --shm-size; Kubernetes: an emptyDir of medium Memory)"
    level = Level.OK if free >= SHARED_MEMORY_GIB else Level.WARNING
    yield Finding("shared memory", level, f"{free:.1f} GiB free in {folder}", "" if level is Level.OK else fix)


def limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files == resource.RLIM_INFINITY or files >= OPEN_FILES
    yield Finding("open files", Level.OK if enough else Level.WARNING, f"at most {files}",
                  "" if enough else f"ulimit -n {OPEN_FILES}")  # fmt: skip
    devices = sorted(Path("/dev/infiniband").glob("uverbs*"))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not devices:
        yield Finding("RDMA", Level.OK, "no device; KV between machines takes TCP")
    elif locked != resource.RLIM_INFINITY:
        fix = "ulimit -l unlimited (Kubernetes: LimitMEMLOCK=infinity of the nodes' container runtime)"
        yield Finding("RDMA", Level.WRONG, f"{len(devices)} devices, but only {locked // 1024} KiB may be locked", fix)
    else:
        yield Finding("RDMA", Level.OK, f"{len(devices)} devices")


def ports(wanted: Mapping[int, str] = PORTS) -> Iterator[Finding]:
    """Whether another process listens on a port that we need, and which process."""
    listening = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    for port, about in wanted.items():
        if port in listening:
            pid = listening[port]  # None for other users' processes
            by = f"process {pid} ({psutil.Process(pid).name()})" if pid else "another process"
            fix = f"fine if that is a deployment of yours; otherwise end it, or change {about}"
            yield Finding("ports", Level.WARNING, f"{port} is taken by {by}", fix)
    if free := [port for port in wanted if port not in listening]:
        yield Finding("ports", Level.OK, f"{', '.join(map(str, free))} free")


def accelerators() -> Iterator[Finding]:
    if platform.on_cpu():
        yield from _cpu()
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPUs", Level.WRONG, platform.NO_GPU, platform.NO_GPU_FIX)
        return
    count = torch.cuda.device_count()
    yield Finding("GPUs", Level.OK, ", ".join(torch.cuda.get_device_name(n) for n in range(count)))
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    if apart := [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]:
        fix = "KV between them goes through the host; see nvidia-smi topo -m, and IOMMU and ACS settings"
        yield Finding("GPU peer access", Level.WARNING, f"not between {apart[0][0]} and {apart[0][1]}", fix)
    elif pairs:
        yield Finding("GPU peer access", Level.OK, "between all")


def _cpu() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    yield Finding("CPU", Level.OK if cores > 1 else Level.WARNING, f"{cores} cores",
                  "" if cores > 1 else "two engines share a core: use a machine with more")  # fmt: skip
    preloaded = platform.engine_environment().get("LD_PRELOAD", "")
    for library, package in (("tcmalloc", "apt-get install libtcmalloc-minimal4"), ("libiomp5", "pip install intel-openmp")):
        if library not in preloaded:
            yield Finding("CPU", Level.WARNING, f"no {library}: engines run at half their speed", package)


def of_deployment(file: Path) -> Iterator[Finding]:
    """Everything that `prefillshare check` would refuse."""
    from prefillshare.argument_check import check_arguments
    from prefillshare.engines import kv_contract
    from prefillshare.kvshare.config import load
    from prefillshare.preflight import base_kv_makers, check_machine, ecache_cost
    from prefillshare.router import tenants

    try:
        deployment = load(file)
        tenants.load(deployment.router.auth)
        contract = kv_contract(deployment)
        check_machine(deployment)
        checked = check_arguments(deployment)
    except PrefillShareError as error:
        yield Finding("deployment", Level.WRONG, f"{error.field or file}: {error.message}", error.fix or "")
        return
    seen = "files, ports, cores" + (" and memory" if platform.on_cpu() else "; vLLM looks at the GPUs' memory itself")
    if deployment.cluster.address:
        seen = f"files; the machines of the Ray cluster at {deployment.cluster.address} are not seen from here"
    yield Finding("deployment", Level.OK, f"{file}: {seen}")
    for warning in checked.warnings:
        yield Finding("deployment", Level.WARNING, warning)
    if checked.unchecked:
        text = f"not checked: whether vLLM accepts the engines' arguments ({checked.unchecked})"
        yield Finding("deployment", Level.OK, text)
    for line in (*base_kv_makers(deployment), *ecache_cost(deployment, contract.shape)):
        yield Finding("deployment", Level.OK, line)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (versions, accelerators, shared_memory, limits, ports, nixl)


def doctor_command(file: Path | None) -> int:
    """Prints what each check finds; returns 1 if anything is wrong."""
    from rich.console import Console
    from rich.markup import escape

    console, worst = Console(), Level.OK
    colours = {Level.OK: "green", Level.WARNING: "yellow", Level.WRONG: "red"}
    checks = [*CHECKS, *([lambda: of_deployment(file)] if file else [])]
    for check in checks:
        for finding in check():
            console.print(f"[{colours[finding.level]}]{finding.level:>7}[/]  {finding.about}: {escape(finding.found)}")
            if finding.fix:
                console.print(f"         fix: {escape(finding.fix)}")
            worst = finding.level if finding.level is Level.WRONG else worst
    return int(worst is Level.WRONG)
