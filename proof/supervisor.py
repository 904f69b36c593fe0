"""Runs stages one after the other, each in its own process: a stage that breaks or hangs costs only what it did not tell."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from prefillshare.platform import engine_environment
from prefillshare.proof.asked import Asked
from prefillshare.proof.found import Part, Progress, Status, parse
from prefillshare.proof.stages import Stage

#: A stage is not begun with less time left.
LEAST_S = 30.0
#: Seconds that a stage has to end its engines before its processes are killed.
END_S = 10.0
_LOG_LINES = 12
_LOOK_S = 0.5

#: Stage, asked, file descriptor -> command.
Command = Callable[[Stage, Asked, int], list[str]]


def command(stage: Stage, asked: Asked, descriptor: int) -> list[str]:
    return [sys.executable, "-m", "prefillshare.proof.stage", stage.name, json.dumps(asdict(asked)), str(descriptor)]


def run(
    chosen: Sequence[Stage], asked: Asked, limit_s: float, logs: Path, command: Command = command
) -> Iterator[tuple[Stage, Part | Progress]]:
    """Yields what stages tell, as they tell it. `limit_s`: for all together. `logs`: a folder for what they print."""
    until = time.monotonic() + limit_s
    logs.mkdir(parents=True, exist_ok=True)
    for stage in chosen:
        left = until - time.monotonic()
        if left < min(LEAST_S, limit_s / 2):
            yield stage, Part(stage.name, Status.SKIPPED, f"no time is left of {limit_s:g} s")
            continue
        log = logs / f"{stage.name}.log"
        for told in _run(stage, asked, min(stage.limit_s, left), log, command):
            yield stage, told


def _run(stage: Stage, asked: Asked, limit_s: float, log: Path, command: Command) -> Iterator[Part | Progress]:
    read, write = os.pipe()
    until = time.monotonic() + limit_s
    with open(log, "wb") as output, os.fdopen(read) as told:
        try:
            process = subprocess.Popen(
                command(stage, replace(asked, until=until), write),
                pass_fds=[write],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | engine_environment(),
                start_new_session=True,
            )
        finally:
            os.close(write)
        try:
            parts, is_late = yield from _told(told, process, until)
            if is_late:
                yield Part(stage.name, Status.UNFINISHED, f"it did not end within {limit_s:.0f} s; see {log}")
                return
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
        finally:
            _end(process)
    if process.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        yield Part(stage.name, Status.UNFINISHED, f"it ended with status {process.returncode}; see {log}", {"log": last})
    elif not parts:
        yield Part(stage.name, Status.UNFINISHED, f"it ended without a result; see {log}")


def _told(pipe, process: subprocess.Popen, until: float) -> Generator[Part | Progress, None, tuple[int, bool]]:
    """Yields what comes until the process ends; returns the number of parts, and whether the time is over. The process's
    engines may outlive it, and with them the pipe."""
    parts = 0
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with suppress(ValueError, OSError):  # closed meanwhile
            for text in pipe:
                lines.put(text)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while time.monotonic() < until:
        has_ended = process.poll() is not None
        try:
            text = lines.get(timeout=_LOOK_S)
        except queue.Empty:
            if has_ended:
                return parts, False
            continue
        if text is None:
            return parts, False
        told = parse(text)
        parts += isinstance(told, Part)
        yield told
    return parts, True


def _end(process: subprocess.Popen) -> None:
    """End the stage with all its processes: those of its process group, and those that have left it but descend from it."""
    of_it = []
    with suppress(psutil.NoSuchProcess):
        of_it = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in of_it:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(of_it, timeout=END_S)
    with suppress(subprocess.TimeoutExpired):  # one that waits for a device's driver may not end
        process.wait(END_S)
