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
    """What `python *argv` would be if started here and now. `files`: the numbers of the descriptors that it has."""

    argv: list[str]
    files: list[int] = field(default_factory=lambda: [0, 1, 2])
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: str = field(default_factory=os.getcwd)
    cores: list[int] = field(default_factory=lambda: sorted(os.sched_getaffinity(0)))
    niceness: int = field(default_factory=lambda: os.getpriority(os.PRIO_PROCESS, 0))

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
        """Give this process the program's files, environment, folder, cores and niceness. The caller runs its code."""
        from prefillshare.kvshare_vllm.forkserver import openmp  # the stand-in adopts nothing, and has to start at once

        above = max([*self.program.files, *self.files], default=0) + 1
        moved = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in self.files]
        self.close()
        for file, number in zip(moved, self.program.files, strict=True):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(self.program.env)
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


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    body = bytearray()
    while len(body) < size:
        part = connection.recv(size - len(body))
        if not part:
            return None
        body += part
    return bytes(body)
