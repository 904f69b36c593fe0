"""Measured rates: exponentially weighted means over time."""

from __future__ import annotations

import math
from collections.abc import Callable

Clock = Callable[[], float]

#: An observation of this age, in seconds, counts 1/e.
MEMORY_S = 20.0
#: Seconds of recent backlog that a rate must be based on to be trusted.
LEAST_BACKLOG_S = 2.0


class MeanRatio:
    """Recent mean of `amount` per unit."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._amount = self.units = 0.0
        self._at = clock()

    def add(self, amount: float, units: float) -> None:
        self._fade()
        self._amount += amount
        self.units += units

    @property
    def value(self) -> float | None:
        """None before anything has been added."""
        return self._amount / self.units if self._amount > 0 and self.units > 0 else None

    def _fade(self) -> None:
        now = self._clock()
        keep = math.exp((self._at - now) / MEMORY_S)
        self._amount, self.units, self._at = self._amount * keep, self.units * keep, now


class UsualTime:
    """Upper end of recent values: their mean plus DEVIATIONS standard deviations.

    Nine of ten values do not exceed it if they are normally distributed.
    """

    DEVIATIONS = 1.3

    def __init__(self, clock: Clock):
        self._mean, self._square = MeanRatio(clock), MeanRatio(clock)

    def add(self, value: float) -> None:
        self._mean.add(value, 1)
        self._square.add(value * value, 1)

    @property
    def value(self) -> float:
        """0 before anything has been added."""
        mean = self._mean.value or 0.0
        return mean + self.DEVIATIONS * math.sqrt(max(0.0, (self._square.value or 0.0) - mean * mean))


class DrainRate:
    """Amount finished per second of backlog.

    A pool works at its limit only while turns wait: what it finishes in quiet times says nothing about how long a queue would
    take. Without backlog the rate does not change, and is forgotten after about a minute, so that a bad one does not stay.
    """

    def __init__(self, clock: Clock):
        self._clock, self._mean = clock, MeanRatio(clock)
        self._backlog, self._since = False, 0.0

    def backlog(self, waits: bool) -> None:
        """Say whether turns wait from now on."""
        now = self._clock()
        if self._backlog:
            self._mean.add(0, now - self._since)
        self._backlog, self._since = waits, now

    def done(self, amount: float) -> None:
        if self._backlog:
            self.backlog(True)
            self._mean.add(amount, 0)

    @property
    def per_s(self) -> float | None:
        """None before anything has been measured, and again some time after the last backlog."""
        self.backlog(self._backlog)
        self._mean.add(0, 0)
        return self._mean.value if self._mean.units > LEAST_BACKLOG_S else None

    def seconds_for(self, amount: float) -> float:
        """How long `amount` will take; 0 while nothing has been measured."""
        return amount / rate if amount > 0 and (rate := self.per_s) else 0.0
