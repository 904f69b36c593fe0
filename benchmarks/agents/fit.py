"""Costs of benchmarks.agents.simulation from measured times, and how far the fitted costs are from them.

Both are linear in the fitted costs, so non-negative least squares finds these; rows are weighted by their times, because the
relative error is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
from scipy.optimize import nnls

from benchmarks.agents.simulation import attended


@dataclass(frozen=True)
class PrefillTime:
    """How many seconds the last `computed` tokens of a prompt of `prompt` tokens took."""

    computed: int
    prompt: int
    seconds: float


@dataclass(frozen=True)
class StepTime:
    """One decode step of several requests, with the sum of their context tokens."""

    requests: int
    context_tokens: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """`error`: median over the rows of |fitted - measured| / measured; `worst`: the largest."""

    costs: dict[str, float]
    error: float
    worst: float


def prefill(rows: Sequence[PrefillTime]) -> Fit:
    """`prefill_s`, `prefill_token_s` and `prefill_token_context_s`. Raises ValueError for fewer than three rows."""
    names = ("prefill_s", "prefill_token_s", "prefill_token_context_s")
    return _fitted(rows, names, lambda row: (1.0, row.computed, attended(row.computed, row.prompt)))


def step(rows: Sequence[StepTime]) -> Fit:
    """`step_s`, `step_request_s` and `step_context_token_s`. Raises ValueError for fewer than three rows."""
    names = ("step_s", "step_request_s", "step_context_token_s")
    return _fitted(rows, names, lambda row: (1.0, row.requests, row.context_tokens))


def _fitted(rows: Sequence, names: Sequence[str], terms: Callable) -> Fit:
    if len(rows) < len(names):
        raise ValueError(f"{len(names)} costs cannot be fitted to {len(rows)} measurements")
    seconds = numpy.array([row.seconds for row in rows])
    relative = numpy.array([terms(row) for row in rows]) / seconds[:, None]
    scale = relative.max(axis=0)
    found, _ = nnls(relative / scale, numpy.ones(len(rows)))
    apart = abs(relative @ (found / scale) - 1)
    costs = dict(zip(names, (found / scale).tolist(), strict=True))
    return Fit(costs, float(numpy.median(apart)), float(apart.max()))
