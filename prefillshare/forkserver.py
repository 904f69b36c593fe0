"""The fork server of a deployment that has a Ray cluster of its own on this machine (kvshare_vllm/forkserver).

The cluster's node bears the server's name as a label, so that every command that deploys to it finds the same: replicas are
replaced when what starts them changes.

Seam: ray/_private/runtime_env/py_executable.py, ray/_private/runtime_env/context.py (`exec_worker`: a line for the shell)
"""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefillshare.kvshare_vllm import forkserver
from prefillshare.kvshare_vllm.forkserver.openmp import RUNTIME
from prefillshare.kvshare_vllm.forkserver.passing import named
from prefillshare.platform import engine_environment, on_cpu

logger = logging.getLogger(__name__)

LABEL = "prefillshare/fork-server"
#: Environment variable: the name of one that runs already, for several deployments one after another, or OFF.
SETTING = "PREFILLSHARE_FORK_SERVER"
OFF = "off"


@contextmanager
def started(folder: Path) -> Iterator[dict[str, str]]:
    """The labels of a cluster whose workers it forks. None on GPUs, where no engine has been seen to start so, and none where
    an engine's OpenMP would not begin anew."""
    if name := os.environ.get(SETTING):
        yield {} if name == OFF else {LABEL: name}
        return
    if not on_cpu() or RUNTIME not in engine_environment().get("LD_PRELOAD", ""):
        yield {}
        return
    name = secrets.token_hex(8)
    with running(folder, name):
        yield {LABEL: name}


@contextmanager
def running(folder: Path, name: str) -> Iterator[None]:
    address = socket_of(folder, name)
    server = start(address, env=os.environ | engine_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        if server.poll() is not None:
            logger.warning("The fork server ended with status %d; replicas have started without it", server.returncode)
    finally:
        server.kill()  # what it has forked goes on
        server.communicate()
        address.unlink(missing_ok=True)


def start(address: Path, *modules: str, **options) -> subprocess.Popen:
    """From now on it can be asked; it answers when it has imported. `modules`: others than vLLM's. It ends with its input."""
    with socket.socket(socket.AF_UNIX) as listener:
        with named(address) as name:
            listener.bind(name)
        listener.listen(64)
        command = [sys.executable, "-m", "prefillshare.kvshare_vllm.forkserver.server", str(listener.fileno()), *modules]
        files = [listener.fileno()]
        return subprocess.Popen(command, pass_fds=files, stdin=subprocess.PIPE, start_new_session=True, **options)


def runtime_env(folder: Path, spares: int = 0) -> dict[str, str]:
    """What starts a replica in the cluster that this process is connected to. `spares`: processes that it will spawn."""
    import ray

    if not ray.is_initialized():
        return {}
    names = {node["Labels"].get(LABEL) for node in ray.nodes() if node["Alive"]}
    if len(names) != 1 or None in names:
        return {}
    stand_in, address = Path(forkserver.__file__).with_name("stand_in.py"), socket_of(folder, *names)
    return {"py_executable": shlex.join([sys.executable, "-I", "-S", str(stand_in), str(address), str(spares)])}


def socket_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.socket"
