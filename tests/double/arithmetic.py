"""Tokens and KV as small numbers.

The KV of a position is one number, computed from the KV of the position before it, its token, and whose weights made it. The
next token is a function of the last position's KV and the decoder. So a token depends on everything before it and on whose KV
that was: the handoff of another prompt, a position made by the wrong weights, or a missing replayed token changes it.
"""

from __future__ import annotations

from collections.abc import Sequence

KV = tuple[int, ...]

BASE = "base"
_PRIME, _TOKENS = 100_003, 90


def _number(name: str) -> int:
    return sum((place + 1) * ord(letter) for place, letter in enumerate(name))


def extended(kv: KV, token_ids: Sequence[int], maker: str) -> KV:
    """`kv` followed by the positions of these tokens, as `maker`'s weights make them."""
    made = list(kv)
    for token in token_ids:
        before = made[-1] if made else 1
        made.append((31 * before + 7 * token + _number(maker)) % _PRIME)
    return tuple(made)


def next_token(kv: KV, decoder: str) -> int:
    return (3 * kv[-1] + _number(decoder)) % _TOKENS + 10


def response(prompt: Sequence[int], decoder: str, tokens: int, *, shared: int, generated_by: str | None = None) -> list[int]:
    """The decoder's response to a prompt whose first `shared` positions the base has made. `generated_by`: who makes the KV of
    the generated tokens and of the rest of the prompt; None: the decoder itself."""
    maker = generated_by or decoder
    kv = extended(extended((), prompt[:shared], BASE), prompt[shared:], maker)
    said: list[int] = []
    for _ in range(tokens):
        said.append(next_token(kv, decoder))
        kv = extended(kv, said[-1:], maker)
    return said
