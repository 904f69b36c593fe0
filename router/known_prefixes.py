"""What is known of the prompts that a router has seen, found again by any later prompt that begins with one of them.

A client that keeps no session sends its conversation's whole history with every call. Only the tokens then show that two calls
belong together: the later one's prompt begins with the earlier one's. Two parts ask for that: what finds a call's context, to
run it where that was last (sessions/open_contexts.py), and what chooses its lane on the page (telemetry/recent_turns.py).
Stored responses are found by messages, before there are any tokens (responses/threads.py).

Only keyed digests of token ids are kept, so nothing can be read from them.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

#: (whose, length, digest).
_Key = tuple[tuple, int, bytes]


class KnownPrefixes(Generic[T]):
    """The `limit` prefixes that were noted or found last, each with a value.

    `whose`: a prefix is found only by those who give what it was noted with. What others have noted does not even change how
    long a search takes (R7).
    """

    def __init__(self, limit: int):
        self._limit, self._secret = limit, os.urandom(16)
        #: The longest unused first.
        self._values: OrderedDict[_Key, T] = OrderedDict()
        #: Whose -> length -> how many prefixes have it.
        self._lengths: dict[tuple, Counter[int]] = {}

    def longest(self, token_ids: Sequence[int], whose: tuple = ()) -> T | None:
        """The value of the longest known prefix that these tokens begin with. Takes 10 us per thousand tokens and 1 us per
        length of known prefixes."""
        tokens, found, hashed, done = array("Q", token_ids), None, self._hash(), 0
        for length in sorted(length for length in self._lengths.get(whose, ()) if length <= len(tokens)):
            hashed.update(tokens[done:length])
            done = length
            key = (whose, length, hashed.digest())
            if key in self._values:
                found = key
        if found is None:
            return None
        self._values.move_to_end(found)
        return self._values[found]

    def note(self, token_ids: Sequence[int], value: T, whose: tuple = ()) -> None:
        """Know these tokens, of which there is at least one, by this value from now on."""
        hashed = self._hash()
        hashed.update(array("Q", token_ids))
        key = (whose, len(token_ids), hashed.digest())
        if key not in self._values:
            self._lengths.setdefault(whose, Counter())[key[1]] += 1
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._limit:
            self._forget(self._values.popitem(last=False)[0])

    def _forget(self, key: _Key) -> None:
        whose, length, _ = key
        lengths = self._lengths[whose]
        lengths[length] -= 1
        if not lengths[length]:
            del lengths[length]
        if not lengths:
            del self._lengths[whose]

    def _hash(self):
        return hashlib.blake2b(digest_size=16, key=self._secret)
