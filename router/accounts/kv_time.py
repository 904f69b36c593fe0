"""KV byte-seconds of one turn: the memory for KV that its sequence takes on decode replicas, times how long it takes it.

- Bytes: the whole blocks that the prompt and the tokens generated so far fill, on all GPUs of a replica together. A block that
  other turns use at the same time is counted in full for each of them, so that a tenant's figure depends on its own turns only:
  neither on who else is there, nor does it tell anything about them (R7).
- Seconds: from each call of a decode replica to its end, as the router's clock shows it. That includes the time in which the
  replica loads or makes the prompt's KV, and not the turn's wait for room. Admission sends a turn only where its blocks fit.
- KV on prefill replicas, and cached KV that no turn holds, is nobody's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefillshare.router import clock


class KVTime:
    """`bytes_per_token`: of KV, over all layers."""

    def __init__(self, block_size: int, bytes_per_token: int):
        self._block_size, self._block_bytes = block_size, block_size * bytes_per_token
        self._blocks, self._since, self._block_seconds = 0, 0.0, 0.0

    @contextmanager
    def held(self, tokens: int) -> Iterator[None]:
        """Within this context the turn's sequence is on a decode replica. `tokens`: its length at the start."""
        self._since = clock.now()
        self.grow_to(tokens)
        try:
            yield
        finally:
            self.grow_to(0)

    def grow_to(self, tokens: int) -> None:
        """The sequence that is held has this many tokens from now on."""
        self._pass()
        self._blocks = -(-tokens // self._block_size)

    @property
    def byte_seconds(self) -> int:
        """Up to now, rounded down."""
        self._pass()
        return int(self._block_seconds * self._block_bytes)

    def _pass(self) -> None:
        now = clock.now()
        self._block_seconds += self._blocks * (now - self._since)
        self._since = now
