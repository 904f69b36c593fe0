"""Several hosts on this machine, for tests and benchmarks: network namespaces on one bridge, each with its own address, link
and processes."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

IP = shutil.which("ip") or "/usr/sbin/ip"


def ip(*words: str) -> str:
    done = subprocess.run([IP, *words], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str:
    """Why hosts cannot be made here; empty if they can."""
    name = "probe-" + secrets.token_hex(4)
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except (RuntimeError, OSError) as error:
        return str(error)
    return ""


class Host:
    """`address`: the host's on the bridge; `space`: its network namespace. Processes started on it see no other network."""

    def __init__(self, tag: str, number: int, bridge: str):
        self.address, self.space, self._link = f"10.213.{int(tag, 16) % 256}.{number}", f"{tag}-{number}", f"{tag}l{number}"
        self._started: list[subprocess.Popen] = []
        self._bridge, self._inside = bridge, f"{tag}i{number}"

    def make(self) -> None:
        inside, bridge = self._inside, self._bridge
        ip("netns", "add", self.space)
        ip("link", "add", self._link, "type", "veth", "peer", "name", inside)
        ip("link", "set", inside, "netns", self.space)
        ip("link", "set", self._link, "master", bridge, "up")
        ip("-n", self.space, "addr", "add", f"{self.address}/24", "dev", inside)
        ip("-n", self.space, "link", "set", inside, "up")
        ip("-n", self.space, "link", "set", "lo", "up")

    def on_it(self, command: Sequence[str | Path]) -> list[str | Path]:
        """The command that runs this one on the host."""
        return [IP, "netns", "exec", self.space, *command]

    def start(self, command: list[str | Path], log: Path, **env: str) -> subprocess.Popen:
        with log.open("a") as out:
            process = subprocess.Popen(self.on_it(command), stdout=out, stderr=out, env={**os.environ, **env})
        self._started.append(process)
        return process

    def run(self, command: list[str | Path], timeout_s: float = 120, **env: str) -> str:
        done = subprocess.run(
            self.on_it(command), capture_output=True, text=True, timeout=timeout_s,
            env={**os.environ, **env},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def cut(self) -> None:
        """Drop all traffic in and out, without telling anybody."""
        ip("link", "set", self._link, "down")

    def heal(self) -> None:
        ip("link", "set", self._link, "up")

    def kill(self) -> None:
        """Kill all processes of this host at once."""
        for pid in ip("netns", "pids", self.space).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        self.kill()
        for process in self._started:
            process.wait(timeout=30)
        ip("netns", "del", self.space)


class Hosts:
    """`count` hosts that this machine can reach, too. `tag`: what their names begin with."""

    def __init__(self, count: int):
        self.tag, self._count = secrets.token_hex(2), count
        self._bridge = f"p{self.tag}"
        self.all: list[Host] = []

    def __enter__(self) -> list[Host]:
        try:
            ip("link", "add", self._bridge, "type", "bridge")
            ip("addr", "add", f"10.213.{int(self.tag, 16) % 256}.254/24", "dev", self._bridge)
            ip("link", "set", self._bridge, "up")
            for number in range(1, self._count + 1):
                self.all.append(Host(self.tag, number, self._bridge))
                self.all[-1].make()
        except BaseException:  # also an exit that a signal asks for
            self.__exit__()
            raise
        return self.all

    def __exit__(self, *_) -> None:
        for host in self.all:
            with suppress(RuntimeError, OSError, subprocess.SubprocessError):
                host.remove()
        with suppress(RuntimeError, OSError, subprocess.SubprocessError):
            ip("link", "del", self._bridge)
