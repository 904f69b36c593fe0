"""Engines that tests start in their own process start with vLLM imported: their processes are forked from the fork server and
become children of this process.

An intermediate process makes a spare, hands it over, and ends. Linux gives an orphan to the nearest ancestor that asks for it
(PR_SET_CHILD_SUBREAPER). This process asks only while a spare is made, so that it does not get other processes' orphans.
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

import psutil
from conftest import wait_until

from prefillshare.kvshare_vllm.forkserver import spare
from prefillshare.kvshare_vllm.forkserver.passing import Program, named
from prefillshare.kvshare_vllm.forkserver.stand_in import STARTED

_SUBREAPER = 36
_BETWEEN = """
import socket, sys
from prefillshare.kvshare_vllm.forkserver import spare
[one] = spare._spares
with socket.socket(fileno=int(sys.argv[1])) as asker:
    socket.send_fds(asker, [one.pid.to_bytes(4, "big")], [one.connection.fileno()])
"""
PATIENCE_S = 120


class LentSpares(list):
    """Takes the place of spares that were made in advance; it always has another. `folder`: where it puts a script."""

    def __init__(self, server: Path, folder: Path):
        super().__init__()
        self._server, self._script = server, folder / "between.py"
        self._script.write_text(_BETWEEN)

    def __bool__(self) -> bool:
        return True

    def pop(self) -> spare._Spare:
        libc = ctypes.CDLL(None)
        libc.prctl(_SUBREAPER, 1)
        try:
            return self._lent()
        finally:
            libc.prctl(_SUBREAPER, 0)

    def _lent(self) -> spare._Spare:
        ours, its = socket.socketpair()
        with ours, its, socket.socket(socket.AF_UNIX) as server, named(self._server) as name:
            for one in (ours, server):
                one.settimeout(PATIENCE_S)
            server.connect(name)
            Program(["1", str(self._script), str(its.fileno())], files=[0, 1, 2, its.fileno()]).send(server)
            assert server.recv(1) == STARTED
            told, [connection], *_ = socket.recv_fds(ours, 4, 1)
        pid = int.from_bytes(told, "big")
        wait_until(lambda: psutil.Process(pid).ppid() == os.getpid(), step_s=0.001)
        return spare._Spare(pid, socket.socket(fileno=connection))
