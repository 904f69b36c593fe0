"""Prompts as token ids, the same in every run."""

from __future__ import annotations

#: Every base has more tokens than this.
VOCABULARY = 4000


def ids(n: int, salt: int) -> list[int]:
    """n token ids. Prompts of different salts share no block."""
    return [(7 + 13 * i + 101 * salt) % VOCABULARY for i in range(n)]
