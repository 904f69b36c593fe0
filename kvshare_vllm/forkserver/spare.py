"""Processes forked in advance for those that this one will spawn: each is a child of this one, as if it had been spawned.

Seam: multiprocessing/util.py (`spawnv_passfds`), multiprocessing/popen_spawn_posix.py; vllm/v1/engine/utils.py
(`CoreEngineProcManager`, which spawns an engine's process)
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import util
from typing import NoReturn

from setproctitle import setproctitle

from prefillshare.kvshare_vllm.forkserver.passing import Program, receive

#: A spawned process is Python with a program of multiprocessing's own, followed by this argument.
_SPAWNED = "--multiprocessing-fork"


@dataclass(frozen=True)
class _Spare:
    pid: int
    connection: socket.socket


_spares: list[_Spare] = []


def make(*forget: Callable[[], None]) -> None:
    """Fork a spare. Called while this process has no threads. `forget`: called in the spare, to close what is not for it."""
    ours, its = socket.socketpair()
    if pid := os.fork():
        its.close()
        _spares.append(_Spare(pid, ours))
        return
    for close in (ours.close, *forget, *(one.connection.close for one in _spares)):
        close()
    _spares.clear()
    _become(its)


def _become(connection: socket.socket) -> None:
    """In the spare: wait to be told what to become, run that, and end."""
    setproctitle("prefillshare: spare process of a replica")
    try:
        asked = receive(connection)
    except KeyboardInterrupt:
        asked = None
    if asked is None:  # the process whose spare this is has ended
        os._exit(0)
    connection.close()
    asked.adopt()
    at = asked.program.argv.index("-c")
    sys.argv = ["-c", *asked.program.argv[at + 2 :]]
    try:
        exec(asked.program.argv[at + 1], {"__name__": "__main__"})
    except SystemExit as ended:
        _end(ended.code or 0)
    _end(0)


def _end(status: int) -> NoReturn:
    """End as a forked process does, without taking apart what was imported: with vLLM that took most of a second. By now
    multiprocessing has waited for threads, and run what it was to run at the end."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextmanager
def become_what_is_spawned() -> Iterator[None]:
    """Have spares take the place of processes that are spawned meanwhile, as long as there are spares."""
    stock = util.spawnv_passfds

    def spawn(path, args, files):
        argv = [os.fsdecode(one) for one in args]
        if not _spares or _SPAWNED not in argv:
            return stock(path, args, files)
        one = _spares.pop()
        with one.connection as connection:
            Program(argv, files=[0, 1, 2, *map(int, files)]).send(connection)
        return one.pid

    util.spawnv_passfds = spawn
    try:
        yield
    finally:
        util.spawnv_passfds = stock
