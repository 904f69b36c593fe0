"""What a session keeps of a response that a stop text has ended: what the client saw, no more and no less.

Tokens do not end where the shown text ends. Kept are those up to the last one whose text was shown whole. Where the shown text
ends inside the next one, the rest of it is tokenised anew and appended, as the text of an input is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence


def kept_response(
    token_ids: Sequence[int], text_lengths: Sequence[int], shown: str, encode: Callable[[str], list[int]]
) -> list[int]:
    """`text_lengths`: characters of text there are after each token. A token that ends inside a character adds none, so that
    trailing ones whose character was not shown are not kept."""
    within = bisect_right(text_lengths, len(shown))
    whole = text_lengths[within - 1] if within else 0
    tokens = bisect_left(text_lengths, whole) + 1 if whole else 0
    rest = shown[whole:]
    return [*token_ids[:tokens], *(encode(rest) if rest else ())]
