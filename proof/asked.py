"""What a proof was asked for, and what this machine has. Plain data that goes to the stages' processes as JSON."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """`folder`: where models are made, absolute."""

    folder: str
    #: Folder of the base; None: a random one is made.
    base: str | None = None
    #: In which deployments would serve it: "float32", "bfloat16" or "float16".
    dtype: str = "float32"
    #: A config.json: the shape of the model whose decode step is measured with two streams; None: the base's.
    shape: str | None = None
    #: As few tokens and repeats as show that everything works.
    short: bool = False
    #: When the stage is ended, on the clock of time.monotonic, which all processes share. It leaves out repeats that would end
    #: later.
    until: float = math.inf


@dataclass(frozen=True)
class Machine:
    """`memory_bytes`: of the GPU, or of the machine."""

    device: str
    name: str
    memory_bytes: int

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> str:
        """The one that bases are served in here."""
        import torch

        if not self.is_gpu:
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"

    @classmethod
    def here(cls) -> Machine:
        import psutil
        import torch

        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(0)
            return cls("cuda", gpu.name, gpu.total_memory)
        return cls("cpu", f"{len(os.sched_getaffinity(0))} CPU cores", psutil.virtual_memory().total)
