"""Explores a state machine whole: every state that can be reached, breadth first, so that a problem comes by a shortest way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

State = TypeVar("State", bound=Hashable)
#: Of a state, what may happen next: its name, and the state that it leads to.
Steps = Callable[[State], Iterable[tuple[str, State]]]


class Violation(AssertionError):
    """`way`: what happened, from the beginning on, until something was so that may never be."""

    def __init__(self, problem: str, way: list[str], state: object):
        super().__init__(f"{problem}\n" + "\n".join(f"{n}. {what}" for n, what in enumerate(way, 1)) + f"\n{state}")
        self.problem, self.way = problem, way


@dataclass(frozen=True)
class Explored(Generic[State]):
    states: int
    steps: int
    #: What has happened on some way, by name.
    happened: frozenset[str]


def ways(start: State, steps: Steps) -> Iterator[tuple[list[str], State]]:
    """For every step that can be taken anywhere, a shortest way that ends with it, and the state it leads to."""
    shortest: dict[State, list[str]] = {start: []}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        for what, after in steps(state):
            way = [*shortest[state], what]
            yield way, after
            if after not in shortest:
                shortest[after] = way
                queue.append(after)


def explore(
    start: State,
    steps: Steps,
    problem: Callable[[State], str],
    is_at_rest: Callable[[State], bool],
    is_fault: Callable[[str], bool],
) -> Explored[State]:
    """Raises Violation where `problem` names one, and where a state from which nothing but faults can happen is not at rest, or
    no state at rest can be reached any more without further faults."""
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    before: dict[State, list[State]] = {}
    resting, count, happened = [], 0, set()
    queue = deque([start])
    while queue:
        state = queue.popleft()
        if wrong := problem(state):
            raise Violation(wrong, _way(came_from, state), state)
        goes_on = False
        for what, after in steps(state):
            count += 1
            happened.add(what.split()[0])
            if not is_fault(what):
                goes_on = True
                before.setdefault(after, []).append(state)
            if after not in came_from:
                came_from[after] = (state, what)
                queue.append(after)
        if is_at_rest(state):
            resting.append(state)
        elif not goes_on:
            raise Violation("nothing can happen any more, and something is held or waits", _way(came_from, state), state)
    reach, queue = set(resting), deque(resting)
    while queue:
        for state in before.get(queue.popleft(), ()):
            if state not in reach:
                reach.add(state)
                queue.append(state)
    for state in came_from:
        if state not in reach:
            raise Violation("from here on it never ends", _way(came_from, state), state)
    return Explored(len(came_from), count, frozenset(happened))


def _way(came_from: dict, state: object) -> list[str]:
    way = []
    while came_from[state]:
        state, what = came_from[state]
        way.append(what)
    return way[::-1]
