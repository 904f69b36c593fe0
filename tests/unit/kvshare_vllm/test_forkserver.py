"""Processes that are forked instead of started: they are what they were asked to be, and all starts without a server, too."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.shared.hosts import Hosts, why_not
from prefillshare.forkserver import start
from prefillshare.kvshare_vllm import forkserver
from prefillshare.kvshare_vllm.forkserver import openmp
from prefillshare.kvshare_vllm.forkserver.passing import named

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
STAND_IN_COMMAND = (sys.executable, "-I", "-S", Path(forkserver.__file__).with_name("stand_in.py"))
RUNTIME = Path(sys.prefix) / "lib" / openmp.RUNTIME
#: Imported by the server, and slow to import as far as these tests go.
MARK = "this_module_was_imported_by_the_server"

TELLS = f"""
import json, os, sys
print(json.dumps({{
    "pid": os.getpid(), "argv": sys.argv[1:], "folder": os.getcwd(), "mark": os.environ.get("MARK"), "title": __name__,
    "imported": "{MARK}" in sys.modules, "input": sys.stdin.read(), "path": sys.path[0], "group": os.getpgid(0),
}}))
"""

SPAWNS = f"""
import atexit, multiprocessing, os, sys
from prefillshare.kvshare_vllm.forkserver import spare

def child(connection):
    inherited = os.environ.get("MARK"), os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    connection.send((os.getpid(), os.getppid(), "{MARK}" in sys.modules, inherited))
    atexit.register(print, "heard")
    sys.exit(7)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    os.environ["MARK"] = "set by its parent"
    os.nice(7)
    os.sched_setaffinity(0, {{max(os.sched_getaffinity(0))}})
    for _ in range(2):
        ours, its = context.Pipe()
        process = context.Process(target=child, args=(its,))
        with spare.become_what_is_spawned():
            process.start()
        pid, parent, imported, inherited = ours.recv()
        assert (pid, parent) == (process.pid, os.getpid())
        assert inherited == ("set by its parent", os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0))
        process.join(30)
        print(process.exitcode, imported)
"""


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "script.py").write_text(text)
        return str(tmp_path / "script.py")

    return write


@contextmanager
def running_server(tmp_path, module: str = MARK):
    (tmp_path / f"{MARK}.py").write_text("try:\n    import ray\nexcept ImportError:\n    ray = None\nassert ray is None\n")
    address = tmp_path / "server.socket"
    process = start(address, module, cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    try:
        yield address, process
    finally:
        process.stdin.close()
        assert process.wait(10) == 0


@pytest.fixture
def server(tmp_path):
    with running_server(tmp_path) as both:
        yield both


def stand_in(address, *argv: str, spares: int = 0, **options) -> subprocess.Popen:
    command = [*STAND_IN_COMMAND, address, str(spares), *argv]
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}} | options
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, **pipes, text=True, **options)


def test_a_worker_is_what_python_would_have_been_with_the_modules_there(server, script, tmp_path):
    process = stand_in(server[0], script(TELLS), "a", "b c", cwd=tmp_path, env=os.environ | {"MARK": "its own"})
    out, err = process.communicate("typed", timeout=30)
    told = json.loads(out)
    assert told.pop("pid") == told.pop("group") != process.pid
    assert told == {
        "argv": ["a", "b c"],
        "folder": str(tmp_path),
        "mark": "its own",
        "title": "__main__",
        "imported": True,
        "input": "typed",
        "path": str(tmp_path),
    }
    assert (process.returncode, err) == (0, "")


@pytest.mark.skipif(bool(why := why_not()), reason=f"network namespaces need root and iproute2: {why}")
def test_a_worker_is_on_the_host_of_the_one_that_asks(server, script):
    text = "import os\nprint(sorted(os.listdir('/sys/class/net')))\nprint(os.stat('/proc/self/ns/net').st_ino)\n"
    with Hosts(1) as [host]:
        log = server[0].with_name("log")
        asker = host.start([*STAND_IN_COMMAND, server[0], "0", script(text)], log, PYTHONPATH=str(ROOT))
        assert asker.wait(30) == 0
        devices, network = log.read_text().splitlines()
        assert int(network) == int(host.run(["stat", "--dereference", "--format=%i", "/proc/self/ns/net"]))
        assert devices == str(sorted(host.run(["ls", "/sys/class/net"]).split()))


def test_what_it_spawns_was_forked_too_and_is_its_child_and_the_next_one_is_spawned(server, script):
    out, err = stand_in(server[0], script(SPAWNS), spares=1).communicate(timeout=60)
    assert (out.split("\n")[:-1], err) == (["heard", "7 True", "heard", "7 False"], "")


def test_a_spare_that_is_not_wanted_ends_with_its_replica(server, script):
    text = "import os, psutil\nprint(*[child.pid for child in psutil.Process().children()])\n"
    out, err = stand_in(server[0], script(text), spares=2).communicate(timeout=30)
    assert not err
    spares = [int(pid) for pid in out.split()]
    assert len(spares) == 2
    for pid in spares:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(10)


def test_its_death_ends_its_stand_in_and_nobody_else(server, script):
    text = "import os, sys\nprint(os.getpid(), flush=True)\nsys.stdin.read()\n"
    both = [stand_in(server[0], script(text)) for _ in range(2)]
    pids = [int(one.stdout.readline()) for one in both]
    os.killpg(pids[0], signal.SIGKILL)  # as Ray does
    both[0].wait(10)
    assert both[1].poll() is None
    assert psutil.pid_exists(pids[1])
    os.kill(pids[1], signal.SIGKILL)
    both[1].wait(10)
    for one in both:
        one.communicate()


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\5{", b"\0\0\0\2{}", b"\0\0\0\2xx"])
def test_nonsense_does_not_end_the_server(server, script, sent):
    with socket.socket(socket.AF_UNIX) as connection:
        with named(server[0]) as name:
            connection.connect(name)
        with suppress(BrokenPipeError):
            connection.sendall(sent)
    out, _ = stand_in(server[0], script(TELLS)).communicate("", timeout=30)
    assert json.loads(out)["imported"]


def test_its_socket_may_stand_far_down(tmp_path, script):
    folder = tmp_path / ("far" * 50)
    folder.mkdir()
    with running_server(folder) as (address, _):
        out, _ = stand_in(address, script(TELLS)).communicate("", timeout=30)
    assert json.loads(out)["imported"]


def test_without_a_server_it_is_python(tmp_path, script):
    for address in (tmp_path / "nobody", tmp_path):
        process = stand_in(address, script(TELLS), "a")
        out, _ = process.communicate("typed", timeout=30)
        told = json.loads(out)
        assert told["pid"] == process.pid
        assert told["argv"] == ["a"]
        assert not told["imported"]


def test_what_was_forked_outlives_the_server(tmp_path, script):
    with running_server(tmp_path) as (address, _):
        process = stand_in(address, script("import sys\nprint(1, flush=True)\nprint(sys.stdin.read())\n"))
        assert process.stdout.readline() == "1\n"
    out, err = process.communicate("after", timeout=10)
    assert (out, err) == ("after\n", "")


COUNTS = """
import ctypes, os
runtime = ctypes.CDLL(None)
print(runtime.omp_get_max_threads(), *sorted(os.sched_getaffinity(0)))
"""


@pytest.mark.skipif(not RUNTIME.is_file(), reason="Intel's OpenMP is not installed")
def test_openmp_begins_anew_with_the_environment_of_the_process(tmp_path, script, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", str(RUNTIME))
    (tmp_path / "uses_openmp.py").write_text("import ctypes\nctypes.CDLL(None).omp_get_max_threads()\n")
    core = max(os.sched_getaffinity(0))
    settings = {"OMP_NUM_THREADS": "3", "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{core}]"}
    with running_server(tmp_path, "uses_openmp") as (address, _):
        out, err = stand_in(address, script(COUNTS), env=os.environ | settings).communicate(timeout=30)
    assert (out.split(), err) == (["3", str(core)], "")
