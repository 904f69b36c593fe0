"""Restarts OpenMP's runtime in a forked process: the inherited one took its settings from the parent's environment.

Seam: Intel's libiomp5 (`omp_pause_resource_all`, OpenMP 5.0: after a hard pause the runtime begins anew when it is used, and
then this one reads the environment again; GNU's does not); vllm/utils/ompmultiprocessing.py, which says by the environment
how many threads an engine computes with and on which cores
"""

from __future__ import annotations

import ctypes

_HARD = 2
#: The runtime's file name, as in LD_PRELOAD.
RUNTIME = "libiomp5.so"


def begin_anew() -> None:
    """Restart the runtime if it is loaded. Raises RuntimeError if that fails: an engine would compute on others' cores."""
    if (pause := getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)) and pause(_HARD):
        raise RuntimeError("OpenMP's runtime could not be paused: its threads would not run on the cores of this process")
