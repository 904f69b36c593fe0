"""Answers as figures, the same in the study and in the experiments."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, variance

from prefillshare.finetuning.evaluate import difference, score


def shares(right: Sequence[bool]) -> dict:
    """The share of right answers with its 95 % interval."""
    own = score(right)
    low, high = own.interval
    return {"accuracy": own.share, "low": low, "high": high, "asked": own.asked}


def apart(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """The difference of two shares of right answers to the same questions, with its 95 % interval."""
    against = difference(first, second)
    low, high = against.interval
    return {"mean": against.mean, "low": low, "high": high}


def shares_of_seeds(right: Sequence[Sequence[bool]]) -> dict:
    """As `shares`, for trainings that differ by seed only: their mean. `seeds`: the share of each."""
    if len(right) == 1:
        return shares(right[0])
    return _interval("accuracy", right) | {"asked": len(right[0]), "seeds": [fmean(answers) for answers in right]}


def apart_of_seeds(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> dict:
    """As `apart`, for trainings that differ by seed only, which are compared seed by seed."""
    if len(first) == 1:
        return apart(first[0], second[0])
    pairs = [[a - b for a, b in zip(*of_seed, strict=True)] for of_seed in zip(first, second, strict=True)]
    return _interval("mean", pairs) | {"seeds": [fmean(of_seed) for of_seed in pairs]}


def _interval(name: str, by_seed: Sequence[Sequence[float]]) -> dict[str, float]:
    """A mean and its 95 % interval from two variances, each over its number: of the questions' means over the seeds, and of the
    seeds' means. The former has a part of the latter in it, so that the interval is a little too wide, never too narrow."""
    by_question, seeds = list(map(fmean, zip(*by_seed, strict=True))), list(map(fmean, by_seed))
    width = 1.96 * sqrt(variance(by_question) / len(by_question) + variance(seeds) / len(seeds))
    mean = fmean(seeds)
    return {name: mean, "low": mean - width, "high": mean + width}
