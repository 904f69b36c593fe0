"""Of two statements about a request that may come in either order, the first one holds."""

from __future__ import annotations

from collections import OrderedDict


class FirstWord:
    """`most`: how many requests are remembered; the oldest are forgotten first."""

    def __init__(self, most: int = 10_000):
        self._most = most
        self._words: OrderedDict[str, str] = OrderedDict()

    def holds(self, request_id: str, word: str) -> bool:
        """Whether `word` holds for the request; if nothing held before, it does from now on."""
        if request_id not in self._words and len(self._words) >= self._most:
            self._words.popitem(last=False)
        return self._words.setdefault(request_id, word) == word
