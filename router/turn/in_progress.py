"""Counts the turns that run now, by decoder, and waits for their end."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from prefillshare.kvshare.metrics import Metrics

logger = logging.getLogger(__name__)


class InProgress:
    def __init__(self, metrics: Metrics):
        self._metrics, self._turns = metrics, Counter()
        self._one_ended = asyncio.Event()

    @contextmanager
    def turn(self, decoder: str) -> Iterator[None]:
        self._count(decoder, +1)
        try:
            yield
        finally:
            self._count(decoder, -1)
            self._one_ended.set()

    async def ended(self, decoders: Collection[str] | None, timeout_s: float) -> None:
        """Wait until no turn of these decoders (None: of any) runs, at most `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._running(decoders):
                    self._one_ended.clear()
                    await self._one_ended.wait()
        except TimeoutError:
            logger.warning("turns of %s still run after %g s", ", ".join(self._running(decoders)), timeout_s)

    def _running(self, decoders: Collection[str] | None) -> list[str]:
        return sorted(name for name, turns in self._turns.items() if turns and (decoders is None or name in decoders))

    def _count(self, decoder: str, change: int) -> None:
        self._turns[decoder] += change
        self._metrics["turns_in_progress"].set(self._turns.total())
