"""Processes that import vLLM start and end sooner: meanwhile Python looks for no garbage.

Imports make half a million objects that stay. Looking through them for garbage, again and again, was more than a quarter of
the work of importing vLLM, and every full collection afterwards would look through them once more, with an event loop waiting
for it. So there is none while a process imports, and what is there then is left out for good.

Seam: multiprocessing/spawn.py (`get_preparation_data`)
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

#: What processes that are spawned import first.
_FIRST = "prefillshare.kvshare_vllm.engine.spawned"


def pause() -> None:
    gc.disable()


def end_soon() -> None:
    """This process ends without looking for garbage, too: with vLLM imported that took it four seconds, and it was killed."""
    atexit.register(gc.freeze)
    atexit.register(gc.disable)


def resume() -> None:
    """May be called again, and without a pause before it."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


@contextmanager
def paused() -> Iterator[None]:
    """While this process imports."""
    pause()
    try:
        yield
    finally:
        resume()


@contextmanager
def of_spawned() -> Iterator[None]:
    """Processes that are spawned meanwhile, and those that they spawn, pause before they import anything, until the plugin is
    loaded. A spawned process imports its parent's main module first; here that is another one, and none of the parent's own
    functions can be what it runs."""
    main = sys.modules["__main__"]
    spec, main.__spec__ = main.__spec__, find_spec(_FIRST)
    try:
        yield
    finally:
        main.__spec__ = spec
