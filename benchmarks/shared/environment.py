"""What a result was measured on: hardware, revision, and who else used the cores meanwhile."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections import Counter
from pathlib import Path

import psutil


def hardware() -> dict[str, object]:
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    found = {
        "cpu": model.group(1) if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    return found | ({"gpu": gpu} if (gpu := _gpu()) else {})


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


_TITLES = {
    r"ProxyActor": "Serve HTTP proxy",
    r"ServeController": "Serve controller",
    r"gcs_server": "Ray GCS",
    r"/raylet ": "raylet",
    r"ray::|/ray/": "other Ray processes",  # agents, log monitor, dashboard
}


def revision() -> str:
    """The commit of the checkout, with "+changes" if tracked files differ from it; "unknown" outside a checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    here = Path(__file__).resolve().parent
    return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


class CpuUse:
    """CPU seconds since `start`: of this process and everything under it by role, and of all other processes.

    `roles`: pid -> name of known processes; others are named by their title.
    """

    def __init__(self, roles: dict[int, str]):
        self._roles = roles
        self._before = self._mine()
        self._busy_before = _busy_s()

    def seconds(self) -> dict[str, float]:
        now = self._mine()
        used: Counter[str] = Counter()
        for pid, (role, total_s) in now.items():
            used[role] += total_s - self._before.get(pid, ("", 0.0))[1]
        others = _busy_s() - self._busy_before - sum(used.values())
        return {role: s for role, s in used.most_common() if s >= 0.005} | {"everybody else": max(others, 0.0)}

    def _mine(self) -> dict[int, tuple[str, float]]:
        me = psutil.Process()
        found = {}
        for process in [me, *me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                found[process.pid] = ("client" if process.pid == me.pid else self._role(process), times.user + times.system)
            except psutil.Error:
                continue
        return found

    def _role(self, process: psutil.Process) -> str:
        if role := self._roles.get(process.pid):
            return role
        title = " ".join(process.cmdline()) or process.name()
        if engine := re.search(r"VLLM::(\w+)", title):
            parent = process.parent()
            above = self._role(parent) if parent and parent.pid != os.getpid() else ""
            return f"{above.split(' | ')[0]} | {engine.group(1)}".removeprefix(" | ")
        if replica := re.search(r"ServeReplica:[^:]+:([\w-]+)", title):
            return f"{replica.group(1)} replica"
        for pattern, role in _TITLES.items():
            if re.search(pattern, title):
                return role
        return "other"


def _busy_s() -> float:
    t = psutil.cpu_times()
    return sum(getattr(t, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
