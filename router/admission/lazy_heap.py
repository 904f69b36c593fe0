"""A heap whose entries can be moved and removed. Stale ones stay in it until they reach the top or outnumber the rest."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from itertools import count
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class LazyHeap(Generic[K]):
    """Keys by rank, lowest first; equal ranks in the order of `put`. Every operation is O(log n), amortised."""

    def __init__(self) -> None:
        self._heap: list[tuple] = []
        self._entries: dict[K, tuple] = {}
        self._order = count()

    def put(self, key: K, rank: tuple | float) -> None:
        """Add `key`, or move it to another rank."""
        entry = self._entries[key] = (rank, next(self._order), key)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def discard(self, key: K) -> None:
        self._entries.pop(key, None)

    def first(self, besides: K | None = None) -> K | None:
        """The key of lowest rank, or of the second lowest if the first is `besides`; None if there is no such key."""
        top = self._top()
        if top is None or top[2] != besides:
            return top and top[2]
        heapq.heappop(self._heap)
        second = self._top()
        heapq.heappush(self._heap, top)
        return second and second[2]

    def _top(self) -> tuple | None:
        while self._heap and self._entries.get(self._heap[0][2]) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None
