"""The server: python -m prefillshare.kvshare_vllm.forkserver.server LISTENER [MODULE ...]

`LISTENER`: file descriptor of a socket that listens. The server ends when its standard input does.

Seam: ray/_raylet (`RayConfig` takes what is particular to a worker from the environment when it is imported, so that it is not
imported here); ray/_private/workers/default_worker.py, which is the script that is run
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prefillshare.kvshare_vllm.forkserver import spare
from prefillshare.kvshare_vllm.forkserver.passing import Received, receive
from prefillshare.kvshare_vllm.forkserver.stand_in import STARTED

#: What engines and their callers need from vLLM and what takes long to import.
OF_ENGINES = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
)
#: Imported unless modules are named: what replicas and routers need, too.
PRELOADED = ("vllm.entrypoints.openai.api_server", *OF_ENGINES)
#: Seconds that a process has to send what it asks for; others wait meanwhile.
ASKING_S = 5


class _Withheld:
    """An import finder that hides Ray."""

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r} here", name=name)
        return None


@contextmanager
def _ray_withheld() -> Iterator[None]:
    """Hide Ray from modules that are imported meanwhile. Forgets vLLM's modules about Ray, so that they are imported again."""
    finder = _Withheld()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.startswith("vllm.") and name.rpartition(".")[2].startswith("ray_")]:
            folder, _, module = name.rpartition(".")
            del sys.modules[name]
            with suppress(AttributeError):
                delattr(sys.modules[folder], module)


def preload(modules: tuple[str, ...]) -> None:
    with _ray_withheld():
        for name in modules:
            importlib.import_module(name)
    gc.freeze()


def serve(listener: socket.socket) -> tuple[Received, socket.socket]:
    """Fork a process for each that asks; returns in that process, with what it is to become. Exits when standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    while True:
        ready, _, _ = select.select([0, listener], [], [])
        if 0 in ready:
            raise SystemExit
        connection, _ = listener.accept()
        connection.settimeout(ASKING_S)
        asked = None
        with suppress(OSError, ValueError, TypeError):
            asked = receive(connection)
        if asked is not None and os.fork() == 0:
            os.setpgid(0, 0)  # Ray ends a worker's whole process group after it
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return asked, connection
        if asked is not None:
            asked.close()
        connection.close()


def main(listener: str, *modules: str) -> None:
    gc.disable()
    preload(modules or PRELOADED)
    asked, connection = serve(socket.socket(fileno=int(listener)))
    connection.sendall(STARTED)
    spares, script, *arguments = asked.program.argv
    for _ in range(int(spares)):
        spare.make(connection.close, asked.close)
    asked.adopt()
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
