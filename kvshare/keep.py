"""What an engine is asked to keep in its prefix cache (kvshare_vllm/engine/retention.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """Keep the whole blocks of a prompt's first `tokens` tokens under `name`, in place of what is kept under it so far.

    `ttl_s`: seconds from when their KV is there. `priority`: the higher, the later the blocks are given up if requests need
    room.
    """

    name: str
    tokens: int
    ttl_s: float
    priority: int = 0
