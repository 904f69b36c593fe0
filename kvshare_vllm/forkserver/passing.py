"""How a process tells another what to become: it sends all that a child of its own would inherit. Standard library only."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field

_HEAD = 4
_MAX_FILES = 64


@dataclass(frozen=True)
class Program:
    """What `python *argv` would be if started here and now. `files`: the numbers of the descriptors that it has. `namespaces`:
    which it is in, as `_namespaces` says; `asker`: a process in them, which is alive until the program runs."""

    argv: list[str]
    files: list[int] = field(default_factory=lambda: [0, 1, 2])
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: str = field(default_factory=os.getcwd)
    cores: list[int] = field(default_factory=lambda: sorted(os.sched_getaffinity(0)))
    niceness: int = field(default_factory=lambda: os.getpriority(os.PRIO_PROCESS, 0))
    namespaces: dict[str, int] = field(default_factory=lambda: _namespaces())
    asker: int = field(default_factory=os.getpid)

    def send(self, connection: socket.socket) -> None:
        body = json.dumps(asdict(self)).encode()
        socket.send_fds(connection, [len(body).to_bytes(_HEAD, "big")], self.files)
        connection.sendall(body)


@dataclass(frozen=True)
class Received:
    """A received program. `files`: its descriptors, under the numbers that they have in this process."""

    program: Program
    files: list[int]

    def adopt(self) -> None:
        """Give this process the program's files, environment, folder, cores, niceness and namespaces. The caller runs its code.

        Raises OSError if it may not enter a namespace."""
        from prefillshare.kvshare_vllm.forkserver import openmp  # the stand-in adopts nothing, and has to start at once

        above = max([*self.program.files, *self.files], default=0) + 1
        moved = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in self.files]
        self.close()
        for file, number in zip(moved, self.program.files, strict=True):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(self.program.env)
        _enter(self.program.namespaces, self.program.asker)
        os.chdir(self.program.folder)
        os.sched_setaffinity(0, self.program.cores)
        os.setpriority(os.PRIO_PROCESS, 0, self.program.niceness)
        openmp.begin_anew()
        gc.enable()

    def close(self) -> None:
        for file in self.files:
            os.close(file)


def receive(connection: socket.socket) -> Received | None:
    """The program that the other end sends; None if it closed before that. Raises OSError, ValueError or TypeError if what it
    sent is not a program."""
    head, files, _, _ = socket.recv_fds(connection, _HEAD, _MAX_FILES)
    with ExitStack() as unless_received:
        for file in files:
            unless_received.callback(os.close, file)
        body = _exactly(connection, int.from_bytes(head, "big")) if len(head) == _HEAD else None
        if body is None:
            return None
        received = Received(Program(**json.loads(body)), files)
        unless_received.pop_all()
        return received


@contextmanager
def named(path: os.PathLike | str) -> Iterator[str]:
    """A short name for a socket: the kernel accepts 107 bytes, and TMPDIR may be longer. Raises OSError without its folder."""
    folder, name = os.path.split(path)
    folder = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{name}"
    finally:
        os.close(folder)


def _namespaces() -> dict[str, int]:
    """Of this process: what it sees of the network, and the mounts, because /sys lists the network's devices."""
    return {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "mnt")}


def _enter(namespaces: dict[str, int], process: int) -> None:
    """Enter those of the namespaces of `process` that are not this process's own."""
    import ctypes  # see above

    ours = _namespaces()
    files = [os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY) for kind, one in namespaces.items() if one != ours[kind]]
    libc = ctypes.CDLL(None, use_errno=True) if files else None
    for file in files:
        if libc.setns(file, 0):
            raise OSError(ctypes.get_errno(), f"cannot enter a namespace of process {process}")
        os.close(file)


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    body = bytearray()
    while len(body) < size:
        part = connection.recv(size - len(body))
        if not part:
            return None
        body += part
    return bytes(body)
