"""What the ledger counts."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from typing import NamedTuple


class Figures(NamedTuple):
    """What has been used. Every figure of a turn only grows."""

    #: Turns that were admitted.
    turns: int = 0
    prompt_tokens: int = 0
    #: Prompt tokens that were found cached, and tokens that had to be prefilled, those of turns taken up again included.
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    #: Bytes of KV on decode replicas, times the seconds that they were held (kv_time.py).
    kv_byte_seconds: int = 0

    def plus(self, other: Figures) -> Figures:
        return Figures(*(mine + more for mine, more in zip(self, other, strict=True)))

    def minus(self, other: Figures) -> Figures:
        return Figures(*(mine - less for mine, less in zip(self, other, strict=True)))


NOTHING = Figures()


class Place(NamedTuple):
    """Where in the ledger figures are added. `day`: in UTC."""

    day: date
    tenant: str
    decoder: str


class Row(NamedTuple):
    """One line of the ledger."""

    place: Place
    figures: Figures


def total(all_figures: Iterable[Figures]) -> Figures:
    summed = NOTHING
    for figures in all_figures:
        summed = summed.plus(figures)
    return summed
