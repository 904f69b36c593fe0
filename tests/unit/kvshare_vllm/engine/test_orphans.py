"""No engine outlives the process whose engine it is, however that ends."""

import subprocess
import sys

import psutil
import pytest

pytestmark = pytest.mark.slow

REPLICA = """
import multiprocessing, time

def engine(pipe):
    from prefillshare.kvshare_vllm.engine import orphans
    orphans.end_with_parent()
    orphans.end_with_parent()
    pipe.send(multiprocessing.current_process().pid)
    time.sleep(60)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    ours, its = spawn.Pipe()
    process = spawn.Process(target=engine, args=(its,))
    process.start()
    print(ours.recv(), flush=True)
    time.sleep(60)
"""


def test_an_engine_ends_with_a_replica_that_is_killed(tmp_path):
    (tmp_path / "replica.py").write_text(REPLICA)
    replica = subprocess.Popen([sys.executable, tmp_path / "replica.py"], stdout=subprocess.PIPE, text=True)
    with replica:
        engine = psutil.Process(int(replica.stdout.readline()))
        assert engine.is_running()
        replica.kill()
    gone, left = psutil.wait_procs([engine], timeout=10)
    assert (gone, left) == ([engine], [])
