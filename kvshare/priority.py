"""Priorities of turns, in the router's queue and in engines. The lower number goes first, as in vLLM."""

from __future__ import annotations

#: Priorities that turns may have.
PRIORITIES = range(-100, 101)
#: Priority of a turn that has been taken up again: before all others, which it would otherwise only hold up once more.
RESUMED = PRIORITIES.start - 1
#: Priority of work that no turn waits for: behind all turns.
BEHIND = 1_000_000
