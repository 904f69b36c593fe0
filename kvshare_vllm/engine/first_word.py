"""Of two things that may be said of a request, in any order, the first holds."""

from __future__ import annotations

from collections import OrderedDict


class FirstWord:
    """`most`: requests that are remembered, the latest ones."""

    def __init__(self, most: int = 10_000):
        self._most = most
        self._words: OrderedDict[str, str] = OrderedDict()

    def holds(self, request_id: str, word: str) -> bool:
        """Whether that is what holds of the request, or does so from now on."""
        if request_id not in self._words and len(self._words) >= self._most:
            self._words.popitem(last=False)
        return self._words.setdefault(request_id, word) == word
