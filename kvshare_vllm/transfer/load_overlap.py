"""Whether a request begins with its own layers while the other layers' KV is still loading (DroidSpeak, section 4.3).

To begin early costs a step: the prompt's last token passes through all layers, so it has to wait for their KV, and the extra
step reads all weights once more. It pays if the load takes longer than that. Loads and steps are measured as they happen.
"""

from __future__ import annotations

from collections.abc import Mapping

#: A load must last this many decode steps. More than one, because some of what a link moves costs the engine time, too.
WORTH_STEPS = 2.0
#: The best rate seen counts, since a load is timed from step to step and may seem slow; every load reduces it by this factor.
FORGET = 0.98
#: Weight of the newest decode step in the mean of their times.
NEWEST = 0.2


class LoadOverlap:
    """Decides for one engine. `begin`: "pays", "always" or "never". Raises ValueError."""

    def __init__(self, begin: str = "pays"):
        if begin not in ("pays", "always", "never"):
            raise ValueError(f"overlap_loads is {begin!r}; use pays, always or never")
        self._begin, self._bytes_per_s, self._step_s = begin, 0.0, 0.0
        self._last: tuple[Mapping[str, int], float] = ({}, 0.0)

    def loaded(self, size: int, seconds: float) -> None:
        """`size` bytes have been loaded in `seconds`."""
        if size and seconds > 0:
            self._bytes_per_s = max(size / seconds, FORGET * self._bytes_per_s)

    def stepped(self, tokens: Mapping[str, int], now: float) -> None:
        """A step has ended. `tokens`: request -> its tokens in the step. `now`: seconds. Steps are timed that only decode and
        come right after a step of the same requests."""
        (last, ended), self._last = self._last, (tokens, now)
        if tokens and set(tokens.values()) == {1} and tokens.keys() <= last.keys():
            self._step_s += (now - ended - self._step_s) * (NEWEST if self._step_s else 1.0)

    def begins(self, size: int) -> bool:
        """Whether a request begins while `size` bytes are still to be loaded. Before anything is measured, it does not pay."""
        if self._begin != "pays" or not (self._bytes_per_s and self._step_s):
            return self._begin == "always"
        return size / self._bytes_per_s > WORTH_STEPS * self._step_s
