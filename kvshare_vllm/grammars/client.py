"""The router's side of the process that compiles grammars (process.py), which is started at its first job, and again
if it died.

Owns the process and the thread that reads its verdicts; the thread ends with the process.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress

from prefillshare.kvshare.errors import Unavailable

#: Verdicts on a child that had to be killed while it compiled, or died.
TOO_MUCH_CPU, TOO_MUCH_TIME, DIED = "cpu", "wall", "died"
#: Seconds that the process may take to start: it imports for seconds, and for longer on a busy machine.
START_S = 120.0
#: Seconds after which a compilation that has not had its CPU time is given up: the machine is too busy.
LONGEST_S = 90.0
_MODULE = "prefillshare.kvshare_vllm.grammars.process"


class GrammarClient:
    """`tokenizer_info`: returns what the process must know of the tokenizer; called off the event loop. One event loop."""

    def __init__(self, tokenizer_info, cpu_s: float):
        self._tokenizer_info, self._cpu_s = tokenizer_info, cpu_s
        self._numbers, self._starting = itertools.count(), asyncio.Lock()
        self._process: subprocess.Popen | None = None
        self._reader: threading.Thread | None = None
        self._asked: dict[int | str, asyncio.Future] = {}

    async def try_out(self, kind: str, spec: str) -> str | None:
        """What is wrong with a grammar; None if nothing is. Raises Unavailable if the process does not start or dies."""
        async with self._starting:
            if self._process is None or self._process.poll() is not None:
                await self._start()
        number = next(self._numbers)
        job = {"id": number, "kind": kind, "spec": spec, "cpu_s": self._cpu_s, "wall_s": LONGEST_S}
        return await self._ask(number, job, LONGEST_S + START_S)

    async def _start(self) -> None:
        await asyncio.to_thread(self.close)
        info = await asyncio.to_thread(self._tokenizer_info)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-m", _MODULE], env=environment, **pipes)
        loop, process = asyncio.get_running_loop(), self._process
        self._reader = threading.Thread(target=self._read, args=(loop, process), name="grammar-verdicts", daemon=True)
        self._reader.start()
        await self._ask("ready", info, START_S)

    async def _ask(self, number: int | str, told, patience_s: float) -> str | None:
        self._asked[number] = verdict = asyncio.get_running_loop().create_future()
        process = self._process
        try:
            async with asyncio.timeout(patience_s):
                await asyncio.to_thread(_write, process, json.dumps(told).encode() + b"\n")
                return await verdict
        except (TimeoutError, OSError) as error:
            process.kill()  # it would not answer other requests either
            raise Unavailable(f"grammars cannot be compiled now: {error or 'no answer'}", fix="try again") from error
        finally:
            del self._asked[number]

    def _read(self, loop: asyncio.AbstractEventLoop, process: subprocess.Popen) -> None:
        for line in process.stdout:
            verdict = json.loads(line)
            _call(loop, self._told, verdict["id"], verdict.get("problem"))
        _call(loop, self._ended, process)

    def _told(self, number: int | str, problem: str | None) -> None:
        verdict = self._asked.get(number)
        if verdict is not None and not verdict.done():
            verdict.set_result(problem)

    def _ended(self, process: subprocess.Popen) -> None:
        for verdict in self._asked.values() if process is self._process else ():
            if not verdict.done():
                verdict.set_exception(OSError("the process that compiles them has ended"))

    def close(self) -> None:
        """Ends the process and its thread."""
        if (process := self._process) is not None:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
            self._reader.join()
            process.stdout.close()
            self._process = None


def _write(process: subprocess.Popen, line: bytes) -> None:
    process.stdin.write(line)
    process.stdin.flush()


def _call(loop: asyncio.AbstractEventLoop, work, *args) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(work, *args)
