"""Processes that import vLLM start and end sooner, because Python's garbage collector is off meanwhile.

Imports create half a million objects that stay. Scanning them for garbage again and again was more than a quarter of the work
of importing vLLM, and every later full collection would scan them once more while an event loop waits. So the collector is
off while a process imports, and the objects that exist afterwards are exempt from collection for good.

Seam: multiprocessing/spawn.py (`get_preparation_data`); vllm/v1/worker/gpu_worker.py and vllm/v1/engine/core.py (`shutdown`)
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

#: The module that spawned processes import first.
_FIRST = "prefillshare.kvshare_vllm.engine.spawned"


def pause() -> None:
    gc.disable()


def end_soon() -> None:
    """Have this process end without collecting garbage: with vLLM imported that took four seconds, and it was killed."""
    atexit.register(gc.freeze)
    atexit.register(gc.disable)


def stay_frozen() -> None:
    """Have this process leave its frozen objects to the kernel. At an engine's end vLLM shows them to the collector again, for
    engines that end inside a process which lives on; scanning them took more than half of the time to end."""
    gc.unfreeze = lambda: None


def resume() -> None:
    """May be called again, and without a pause before it."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


@contextmanager
def paused() -> Iterator[None]:
    """Pause the collector while this process imports."""
    pause()
    try:
        yield
    finally:
        resume()


@contextmanager
def of_spawned() -> Iterator[None]:
    """Have processes that are spawned meanwhile, and those that they spawn, pause the collector before they import anything,
    until the plugin is loaded. A spawned process imports its parent's main module first. Here another module takes its place,
    so the spawned process cannot run functions of the parent's main module."""
    main = sys.modules["__main__"]
    spec, main.__spec__ = main.__spec__, find_spec(_FIRST)
    try:
        yield
    finally:
        main.__spec__ = spec
