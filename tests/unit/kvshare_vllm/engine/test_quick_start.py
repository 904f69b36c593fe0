"""Nobody looks for garbage while vLLM is imported, in this process and in those that it spawns; afterwards it is looked for."""

import gc
import multiprocessing
import subprocess
import sys

import pytest

from prefillshare.kvshare_vllm.engine import quick_start

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def _collecting():
    yield
    gc.unfreeze()
    gc.enable()


def test_a_pause_ends_and_leaves_out_what_was_imported():
    with quick_start.paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000


def test_the_end_of_a_pause_that_never_began_freezes_nothing():
    quick_start.resume()
    assert gc.isenabled()
    assert not gc.get_freeze_count()


def tell(queue, generations: int) -> None:
    queue.put((gc.isenabled(), sys.modules["__main__"].__spec__.name))
    if generations > 1:
        child = SPAWN.Process(target=tell, args=(queue, generations - 1))
        child.start()
        child.join(60)


def test_spawned_processes_and_those_that_they_spawn_begin_with_a_pause():
    before = sys.modules["__main__"].__spec__
    queue = SPAWN.Queue()
    with quick_start.of_spawned():
        child = SPAWN.Process(target=tell, args=(queue, 2))
        child.start()
    assert sys.modules["__main__"].__spec__ is before
    assert [queue.get(timeout=60), queue.get(timeout=60)] == [(False, "prefillshare.kvshare_vllm.engine.spawned")] * 2
    child.join(60)
    assert child.exitcode == 0


def test_a_process_that_is_to_end_soon_looks_for_no_garbage_at_its_end():
    program = (
        "import atexit, gc\n"
        "from prefillshare.kvshare_vllm.engine import quick_start\n"
        "atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 1000))\n"
        "quick_start.end_soon()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_process_that_stays_frozen_has_nothing_to_scan_after_an_unfreeze():
    program = (
        "import gc\n"
        "from prefillshare.kvshare_vllm.engine import quick_start\n"
        "gc.freeze()\n"
        "quick_start.stay_frozen()\n"
        "gc.unfreeze()\n"
        "print(gc.get_freeze_count() > 1000)\n"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60) == "True\n"
