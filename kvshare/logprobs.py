"""Log-probabilities on their way from an engine to a surface: three arrays, from a step's sampler on. A surface makes of them
what its clients see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Logprobs:
    """Of generated tokens, in order. Column 0 is the token itself; then come the likeliest ones, the token among them if it is
    one, most likely first.

    Shapes: `token_ids` and `values` (natural logarithms) [tokens, 1 + likeliest], `ranks` [tokens]: the token's own, from 1.
    """

    token_ids: np.ndarray
    values: np.ndarray
    ranks: np.ndarray

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> Logprobs:
        """One (token ids, values, rank) per token, at least one."""
        token_ids, values, ranks = zip(*rows, strict=True)
        return cls(np.stack(token_ids), np.stack(values), np.asarray(ranks, np.int32))

    @classmethod
    def joined(cls, parts: Sequence[Logprobs]) -> Logprobs:
        """One after the other, at least one; all with as many columns."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("token_ids", "values", "ranks")))

    def __len__(self) -> int:
        return len(self.ranks)

    def likeliest(self, number: int) -> Logprobs:
        """With no more than so many beside the token itself."""
        return Logprobs(self.token_ids[:, : number + 1], self.values[:, : number + 1], self.ranks)

    def row(self, place: int) -> dict[int, float]:
        """Token -> log-probability, at this place; the token itself first."""
        return dict(zip(self.token_ids[place].tolist(), self.values[place].tolist(), strict=True))
