"""Answers as figures, the same in the study and in the experiments."""

from __future__ import annotations

from collections.abc import Sequence

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
