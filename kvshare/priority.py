"""Which of several turns goes first, in the router's queue and in engines: the one of the lower number, as in vLLM."""

from __future__ import annotations

#: Of turns.
PRIORITIES = range(-100, 101)
#: Of a turn that has been taken up again: before all others, whose work it would otherwise only hold up once more.
RESUMED = PRIORITIES.start - 1
#: Of work that no turn waits for: behind all of them.
BEHIND = 1_000_000
