"""Asks the kernel for AMX's tiles, without which an instruction on them ends the process.

On CPUs that have them, vLLM chooses its attention over tiles for bfloat16, and takes it that somebody has asked.

Seam: vllm/v1/attention/backends/cpu_attn.py (`torch.cpu._is_amx_tile_supported`)

Goes when: vLLM asks for them itself.
"""

from __future__ import annotations

import torch


def ask() -> None:
    """For this process and its threads. May be called again."""
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
