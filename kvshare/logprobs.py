"""Log-probabilities on their way from an engine's sampler to a surface, as three arrays. The surface turns them into what its
clients see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Logprobs:
    """Log-probabilities of generated tokens, in order. Column 0 is the token itself; the likeliest tokens follow, most likely
    first, including the token itself if it is one of them.

    Shapes: `token_ids` and `values` (natural logarithms) [tokens, 1 + likeliest], `ranks` [tokens]: the token's rank, from 1.
    """

    token_ids: np.ndarray
    values: np.ndarray
    ranks: np.ndarray

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> Logprobs:
        """`rows`: one (token ids, values, rank) per token; at least one."""
        token_ids, values, ranks = zip(*rows, strict=True)
        return cls(np.stack(token_ids), np.stack(values), np.asarray(ranks, np.int32))

    @classmethod
    def joined(cls, parts: Sequence[Logprobs]) -> Logprobs:
        """The parts one after the other; at least one, all with the same number of columns."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("token_ids", "values", "ranks")))

    def __len__(self) -> int:
        return len(self.ranks)

    def likeliest(self, number: int) -> Logprobs:
        """The same with at most `number` tokens besides the token itself."""
        return Logprobs(self.token_ids[:, : number + 1], self.values[:, : number + 1], self.ranks)

    def row(self, place: int) -> dict[int, float]:
        """Token -> log-probability at this place; the generated token first."""
        return dict(zip(self.token_ids[place].tolist(), self.values[place].tolist(), strict=True))
