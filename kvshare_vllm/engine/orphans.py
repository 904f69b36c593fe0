"""An engine's process ends with the process whose engine it is.

vLLM ends its engines when it is told to, and Ray ends what a worker has started; both may be killed before they do. An engine
that outlives them holds its memory, and nobody can reach it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from multiprocessing import connection


@functools.cache
def end_with_parent() -> None:
    """For an engine's own process, once its parent has spawned it."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_after, args=(parent.sentinel,), name="end with parent", daemon=True).start()


def _end_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
