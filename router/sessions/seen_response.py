"""What a context has of a response that a stop text has ended: exactly what the client saw.

The shown text need not end where a token ends. The context has the tokens up to the last one whose text was shown whole. If
the shown text ends inside the next token, the rest of it is tokenised again and appended, as the text of an input is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence


def seen_response(
    token_ids: Sequence[int], text_lengths: Sequence[int], shown: str, encode: Callable[[str], list[int]]
) -> list[int]:
    """`text_lengths`: length of the text after each token, in characters. A token that ends inside a character adds none, so
    that trailing tokens whose character was not shown are left out."""
    within = bisect_right(text_lengths, len(shown))
    whole = text_lengths[within - 1] if within else 0
    tokens = bisect_left(text_lengths, whole) + 1 if whole else 0
    rest = shown[whole:]
    return [*token_ids[:tokens], *(encode(rest) if rest else ())]
