"""A child process that reports its progress as JSON lines, is limited in time, and is ended with all that it started."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import psutil

STOP_TIMEOUT_S = 30.0
POLL_S = 0.25
LOG_TAIL_BYTES = 6000


def events(command: list[str], limit_s: float, tick: Callable[[], None] = lambda: None) -> Iterator[dict]:
    """Run `command`; yields the JSON objects it prints. `tick` is called about four times a second meanwhile.

    Raises RuntimeError with the end of its log if it fails, TimeoutError after `limit_s`. However it ends, no process that it
    started is left.
    """
    deadline = time.monotonic() + limit_s
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        seen: dict[int, psutil.Process] = {}
        try:
            for line in _lines(process, deadline, tick, seen):
                yield json.loads(line)
            code = process.wait(STOP_TIMEOUT_S)
            if code:
                raise RuntimeError(f"{' '.join(command[:4])} ended with {code}\n{_tail(log)}")
        except TimeoutError:
            raise TimeoutError(f"{' '.join(command[:4])} took more than {limit_s:g} s\n{_tail(log)}") from None
        finally:
            _end(process, seen)


def _lines(process, deadline: float, tick, seen: dict[int, psutil.Process]) -> Iterator[bytes]:
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            tick()
            if time.monotonic() > deadline:
                raise TimeoutError
            if not selector.select(POLL_S):
                continue
            seen |= _below(process.pid)
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            yield from whole


def _below(pid: int) -> dict[int, psutil.Process]:
    try:
        return {p.pid: p for p in psutil.Process(pid).children(recursive=True)}
    except psutil.Error:
        return {}


def _end(process: subprocess.Popen, seen: dict[int, psutil.Process]) -> None:
    """Ask the child to end, then end it and everything seen below it that is left (psutil recognises reused pids)."""
    left = seen | _below(process.pid)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    for kill in (False, True):
        alive = [p for p in left.values() if p.is_running()]
        for p in alive:
            try:
                (p.kill if kill else p.terminate)()
            except psutil.Error:
                continue
        psutil.wait_procs(alive, timeout=10)


def _tail(log) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
    return log.read().decode(errors="replace")
