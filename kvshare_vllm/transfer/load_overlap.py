"""Whether a request begins with its own layers while the other layers' KV is still loading (DroidSpeak, section 4.3).

To begin early costs a step: the prompt's last token passes through all layers, so it has to wait for their KV, and a step reads
all weights once more. It pays where the link is slower than that. Both are measured as they happen.
"""

from __future__ import annotations

from collections.abc import Mapping

#: A load must last so many decode steps. More than one: some of what a link moves costs the engine time, too.
WORTH_STEPS = 2.0
#: The best rate seen counts, for a load is timed from step to step and may seem slow; each load makes it count less.
FORGET = 0.98
#: Share of the newest decode step in their mean.
NEWEST = 0.2


class LoadOverlap:
    """Of one engine. `begin`: "pays", "always" or "never". Raises ValueError."""

    def __init__(self, begin: str = "pays"):
        if begin not in ("pays", "always", "never"):
            raise ValueError(f"overlap_loads is {begin!r}; use pays, always or never")
        self._begin, self._bytes_per_s, self._step_s = begin, 0.0, 0.0
        self._last: tuple[Mapping[str, int], float] = ({}, 0.0)

    def loaded(self, size: int, seconds: float) -> None:
        """So many bytes have come."""
        if size and seconds > 0:
            self._bytes_per_s = max(size / seconds, FORGET * self._bytes_per_s)

    def stepped(self, tokens: Mapping[str, int], now: float) -> None:
        """A step has ended: request -> its tokens in it. Timed: what only decodes, right after a step of the same requests."""
        (last, ended), self._last = self._last, (tokens, now)
        if tokens and set(tokens.values()) == {1} and tokens.keys() <= last.keys():
            self._step_s += (now - ended - self._step_s) * (NEWEST if self._step_s else 1.0)

    def begins(self, size: int) -> bool:
        """A request that so many bytes are still to come for. While nothing is known: no."""
        if self._begin != "pays" or not (self._bytes_per_s and self._step_s):
            return self._begin == "always"
        return size / self._bytes_per_s > WORTH_STEPS * self._step_s
