"""A limit per minute as a bucket of tokens that fills at the limit's rate and holds one minute of it.

What costs more than a whole minute's allowance starts when the bucket is full, and takes what is missing from the minutes to
come: the level falls below 0. So no request is impossible, and over time nobody gets more than the limit. scripts.py has the
same arithmetic.
"""

from __future__ import annotations

from prefillshare.kvshare.rate_limits import Allowance

#: Less than this is not missing: levels are floating-point numbers.
ROUNDING = 1e-6


class Bucket:
    """Full at first. Moments are of any one clock, in seconds."""

    def __init__(self, limit: int, now: float):
        self._limit, self._level, self._at = limit, float(limit), now

    def missing_s(self, cost: float, now: float) -> float:
        """Seconds until `cost` may be taken; 0: now."""
        self._fill(now)
        missing = min(cost, self._limit) - self._level
        return missing * 60 / self._limit if missing > ROUNDING else 0.0

    def take(self, cost: float, now: float) -> None:
        """Below 0: what was taken before is given back."""
        self._fill(now)
        self._level = min(self._limit, self._level - cost)

    def allowance(self, what: str, now: float) -> Allowance:
        self._fill(now)
        return Allowance(what, self._limit, max(0, int(self._level)), (self._limit - self._level) * 60 / self._limit)

    def _fill(self, now: float) -> None:
        self._level = min(self._limit, self._level + (now - self._at) * self._limit / 60)
        self._at = now
