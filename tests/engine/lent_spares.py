"""Engines that tests start in their own process start with vLLM imported: theirs are forked from the fork server, which gives
each up to this process as a child of its own.

Linux gives an orphan to the nearest ancestor that asks for it (PR_SET_CHILD_SUBREAPER). This process asks while a spare is
made, and no longer: orphans of others are none of its business.
"""

from __future__ import annotations

import ctypes
import socket
from pathlib import Path

import psutil

from prefillshare.kvshare_vllm.forkserver import spare
from prefillshare.kvshare_vllm.forkserver.passing import Program, named

_SUBREAPER = 36
_SCRIPT = """
import os, socket, sys, time
between = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == between:
    time.sleep(0.001)
from prefillshare.kvshare_vllm.forkserver import spare
connection = socket.socket(fileno=int(sys.argv[1]))
connection.sendall(os.getpid().to_bytes(4, "big"))
spare._become(connection)
"""


class LentSpares(list):
    """In place of spares that were made in advance: there is always another. `folder`: for a file."""

    def __init__(self, server: Path, folder: Path):
        super().__init__()
        self._server, self._script = server, folder / "lent_spare.py"
        self._script.write_text(_SCRIPT)

    def __bool__(self) -> bool:
        return True

    def pop(self) -> spare._Spare:
        ours, its = socket.socketpair()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_SUBREAPER, 1)
        try:
            with its, socket.socket(socket.AF_UNIX) as server, named(self._server) as name:
                server.settimeout(120)
                server.connect(name)
                Program(["0", str(self._script), str(its.fileno())], files=[0, 1, 2, its.fileno()]).send(server)
            ours.settimeout(120)
            pid = int.from_bytes(ours.recv(4), "big")
        finally:
            libc.prctl(_SUBREAPER, 0)
        ours.settimeout(None)
        assert psutil.Process(pid).ppid() == psutil.Process().pid
        return spare._Spare(pid, ours)
