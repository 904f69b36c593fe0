"""The fork server of a deployment that has its own Ray cluster on this machine (kvshare_vllm/forkserver).

The cluster's node has the server's name as a label, so that every command that deploys to the cluster finds the same server:
replicas are replaced when what starts them changes.

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
#: Environment variable: the name of a running fork server, for several deployments one after another, or OFF.
SETTING = "PREFILLSHARE_FORK_SERVER"
OFF = "off"


@contextmanager
def started(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the labels of a cluster whose workers the fork server forks. There are none on GPUs, where starting engines this
    way is untested, and none if an engine's OpenMP runtime could not begin anew after a fork."""
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
        server.kill()  # the processes that it has forked go on
        server.communicate()
        address.unlink(missing_ok=True)


def start(address: Path, *modules: str, **options) -> subprocess.Popen:
    """Start the server. It can be asked at once, and answers when its imports are done. `modules`: imported instead of vLLM's.
    It ends when its standard input is closed."""
    with socket.socket(socket.AF_UNIX) as listener:
        with named(address) as name:
            listener.bind(name)
        listener.listen(64)
        command = [sys.executable, "-m", "prefillshare.kvshare_vllm.forkserver.server", str(listener.fileno()), *modules]
        files = [listener.fileno()]
        return subprocess.Popen(command, pass_fds=files, stdin=subprocess.PIPE, start_new_session=True, **options)


def runtime_env(folder: Path, spares: int = 0) -> dict[str, str]:
    """The runtime_env that starts a replica in the cluster to which this process is connected. `spares`: number of processes
    that the replica will spawn."""
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
