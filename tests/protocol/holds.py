"""Two turns on one session, from two routers that share a store: each begins, renews its hold, commits, and ends, or its router
dies. The rules are those of the session stores (prefillshare/router/sessions).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

TURNS = ("one", "two")
FAULTS = ("dies", "again")

Stage = Literal["idle", "begun", "committed", "lost", "ended", "dead"]


@dataclass(frozen=True)
class Turn:
    """`base`: version of the session that it began from."""

    stage: Stage = "idle"
    base: int = 0


@dataclass(frozen=True)
class World:
    """`log`: the turns that the session has taken, each with the version that it began from; its length is the version of the
    session. `holder`: the turn that holds the session; `is_held`: its lease has not ended. `robbed`: a turn from which the
    session was taken while it held it, or which held it and could not commit."""

    turns: tuple[Turn, ...] = (Turn(),) * len(TURNS)
    log: tuple[tuple[int, int], ...] = ()
    holder: int | None = None
    is_held: bool = False
    robbed: int | None = None

    def with_turn(self, number: int, **changes) -> World:
        turns = list(self.turns)
        turns[number] = replace(turns[number], **changes)
        return replace(self, turns=tuple(turns))


@dataclass(frozen=True)
class Rules:
    """As in handoffs.py."""

    a_held_session_is_refused: bool = True
    only_the_holder_commits: bool = True
    commits_are_marked: bool = True
    holds_end_by_themselves: bool = True


ALL = Rules()


def steps(world: World, rules: Rules = ALL) -> Iterator[tuple[str, World]]:
    if world.is_held and rules.holds_end_by_themselves:
        yield "hold-ends", replace(world, is_held=False)
    for number, name in enumerate(TURNS):
        for what, after in _turn(world, number, rules):
            yield f"{what} {name}", after


def _turn(world: World, number: int, rules: Rules) -> Iterator[tuple[str, World]]:
    turn, holds = world.turns[number], world.holder == number
    match turn.stage:
        case "idle":
            if world.is_held and rules.a_held_session_is_refused:
                yield "refused", world
            else:
                robbed = world.holder if world.is_held else world.robbed
                begun = replace(world, holder=number, is_held=True, robbed=robbed)
                yield "begins", begun.with_turn(number, stage="begun", base=len(world.log))
        case "begun":
            if holds:
                yield "renews", replace(world, is_held=True)
            yield from _commit(world, number, rules)
            freed = replace(world, holder=None, is_held=False) if holds else world
            yield "is-left", freed.with_turn(number, stage="ended")
            yield "dies", world.with_turn(number, stage="dead")
        case "committed" | "lost":
            if turn.stage == "committed":  # the answer was lost, and the commit is sent again
                log = world.log if rules.commits_are_marked else (*world.log, (number, turn.base))
                yield "again", replace(world, log=log) if len(log) < 4 else world
            freed = replace(world, holder=None, is_held=False) if holds else world
            yield "ends", freed.with_turn(number, stage="ended")
            yield "dies", world.with_turn(number, stage="dead")


def _commit(world: World, number: int, rules: Rules) -> Iterator[tuple[str, World]]:
    turn, holds = world.turns[number], world.holder == number
    may = (holds or not rules.only_the_holder_commits) and turn.base == len(world.log)
    if may:
        yield "commits", replace(world, log=(*world.log, (number, turn.base))).with_turn(number, stage="committed")
    else:
        robbed = number if holds else world.robbed
        yield "is-too-late", replace(world, robbed=robbed).with_turn(number, stage="lost")


def problem(world: World) -> str:
    taken = [number for number, _ in world.log]
    if len(set(taken)) < len(taken):
        return "a turn was committed twice"
    if any(base != place for place, (_, base) in enumerate(world.log)):
        return "a turn was committed on a context that it had not seen"
    if world.robbed is not None:
        return f"turn {TURNS[world.robbed]} held the session, and it was taken away"
    return ""


def is_at_rest(world: World) -> bool:
    """Nobody holds the session."""
    return not world.is_held and all(turn.stage in ("ended", "dead") for turn in world.turns)


def is_fault(what: str) -> bool:
    return what.split()[0] in FAULTS
