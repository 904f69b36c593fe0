"""Whether a replica gets work: it is ejected when it keeps failing, and let back in when a probe succeeds.

Pure, with an injected clock.
"""

from __future__ import annotations

from collections.abc import Callable

from prefillshare.kvshare.errors import ResumeReason
from prefillshare.router.clock import now


class Health:
    """Consecutive failures eject the replica; after a growing pause a probe decides. A successful turn resets all counts."""

    FAILURES_TO_EJECT = 3
    FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0

    def __init__(self, clock: Callable[[], float] = now):
        self._clock = clock
        self._failures = 0
        self._ejections = 0
        self._probe_at: float | None = None
        self.reason: ResumeReason | None = None

    @property
    def usable(self) -> bool:
        return self._probe_at is None

    @property
    def probe_due(self) -> bool:
        return self._probe_at is not None and self._clock() >= self._probe_at

    def succeeded(self) -> None:
        if self.usable:
            self._failures = self._ejections = 0
            self.reason = None

    def failed(self, reason: ResumeReason, *, for_good: bool = False) -> bool:
        """True if this failure ejects the replica. One whose engine is dead (`for_good`) and a wedged one are ejected at once:
        the turns that a wedged replica holds up can go on elsewhere."""
        self._failures += 1
        if self.usable or reason is ResumeReason.WEDGED:  # a wedged replica stays marked so until a probe succeeds
            self.reason = reason
        at_once = for_good or reason is ResumeReason.WEDGED
        if not self.usable or not (at_once or self._failures >= self.FAILURES_TO_EJECT):
            return False
        self._pause()
        return True

    def probed(self, well: bool) -> None:
        """The outcome of a probe of an ejected replica."""
        if well:
            self._probe_at, self._failures = None, 0
        else:
            self._pause()

    def _pause(self) -> None:
        pause = min(self.FIRST_PAUSE_S * 2**self._ejections, self.LONGEST_PAUSE_S)
        self._ejections += 1
        self._probe_at = self._clock() + pause
