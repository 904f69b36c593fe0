"""Which examples make up which step: depends on seed and step only, so that a resumed run goes on as it would have."""

from __future__ import annotations

import random
from collections.abc import Sequence

#: Examples are sorted by length within windows of this many batches, so that a batch has like lengths; batches are shuffled.
WINDOW = 16


class Batches:
    """`lengths`: tokens per example. Every epoch has every example once; a last batch may be smaller."""

    def __init__(self, lengths: Sequence[int], batch_size: int, epochs: int, seed: int):
        self._lengths, self._size, self._seed = lengths, batch_size, seed
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self.steps = self.steps_per_epoch * epochs
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def at(self, step: int) -> list[int]:
        """The examples of one optimizer step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1][within]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng, order, batches = random.Random(f"{self._seed} {epoch}"), list(range(len(self._lengths))), []
        rng.shuffle(order)
        for first in range(0, len(order), WINDOW * self._size):
            window = sorted(order[first : first + WINDOW * self._size], key=self._lengths.__getitem__)
            batches += [window[start : start + self._size] for start in range(0, len(window), self._size)]
        rng.shuffle(batches)
        return batches
