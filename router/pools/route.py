"""Where the turns of one decode pool run."""

from __future__ import annotations

from dataclasses import dataclass

from prefillshare.router.pools.pool import Pool


@dataclass(frozen=True)
class Route:
    """A decode pool and the prefill engines it draws on."""

    decode: Pool
    prefill: Pool
