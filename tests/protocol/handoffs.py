"""One turn and the KV that it needs: handed over under a lease, read, lost, and handed over anew; and the loan of its
response's KV when it has ended. The rules are those of DecodeRequest and Handoff (prefillshare/kvshare), R1 to R6.

Small: one producer with two places for KV, two decode replicas, a response of two tokens, so many attempts. What belongs to
other turns is only that they take places which nobody holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

TOKENS, ATTEMPTS, PLACES = 2, 2, 2
#: What is not the system's doing.
FAULTS = ("lease-ends", "taken-by-others", "preempted", "decode-dies", "prefill-dies", "wedged", "client-leaves")

Stage = Literal["asked", "leased", "loading", "decoding", "over"]
Lease = Literal["none", "live", "ended"]


@dataclass(frozen=True)
class Attempt:
    """One try of the turn, or the loan of its response (`is_loan`, with the roles of the engines exchanged). `place`: where its
    KV is at the producer. `is_spoilt`: the place was overwritten while it was read. `has`: what the reader holds. `said`:
    tokens that it has replayed or generated. `is_orphan`: the router has given it up, and nobody wants its tokens."""

    stage: Stage = "asked"
    place: int = 0
    lease: Lease = "none"
    is_spoilt: bool = False
    has: Literal["nothing", "right", "wrong"] = "nothing"
    said: int = 0
    is_orphan: bool = False
    is_loan: bool = False


@dataclass(frozen=True)
class World:
    """`places`: whose KV each holds: the number of an attempt, or -1 for somebody else's. `received`: tokens that the client
    has. `outcome`: of the turn; "" while it runs."""

    attempts: tuple[Attempt, ...] = ()
    places: tuple[int, ...] = (-1,) * PLACES
    received: int = 0
    outcome: Literal["", "done", "failed", "left"] = ""

    def with_attempt(self, number: int, **changes) -> World:
        changed = replace(self.attempts[number], **changes)
        return replace(self, attempts=(*self.attempts[:number], changed, *self.attempts[number + 1 :]))

    def held(self) -> set[int]:
        """Places that their producer keeps for a lease, or is just filling."""
        return {one.place for one in self.attempts if one.lease == "live" or (one.stage == "asked" and one.lease == "none")}


@dataclass(frozen=True)
class Rules:
    """What the protocol demands. Each one can be dropped, to see that the model needs it."""

    late_reads_are_discarded: bool = True
    leased_places_are_kept: bool = True
    leases_end_by_themselves: bool = True
    orphans_are_not_heard: bool = True
    resumes_replay: bool = True


ALL = Rules()

def steps(world: World, rules: Rules = ALL) -> Iterator[tuple[str, World]]:
    yield from _router(world)
    for number in range(len(world.attempts)):
        yield from _attempt(world, number, rules)
    for place in range(PLACES):
        yield from _others(world, place, rules)


def _router(world: World) -> Iterator[tuple[str, World]]:
    current = [one for one in world.attempts if not (one.is_orphan or one.is_loan or one.stage == "over")]
    if not world.outcome and not current:
        if len(world.attempts) == ATTEMPTS:
            yield "gives-up", replace(world, outcome="failed")
        else:
            for place in set(range(PLACES)) - world.held():
                yield "asks", replace(world, attempts=(*world.attempts, Attempt(place=place)))
    if not world.outcome:
        orphans = tuple(one if one.stage == "over" else replace(one, is_orphan=True) for one in world.attempts)
        yield "client-leaves", replace(world, attempts=orphans, outcome="left")


def _attempt(world: World, number: int, rules: Rules) -> Iterator[tuple[str, World]]:
    one = world.attempts[number]
    name = f"{'loan' if one.is_loan else 'attempt'} {number}"

    def step(what: str, state: World | None = None, **changes) -> tuple[str, World]:
        return f"{what} {name}", (state or world).with_attempt(number, **changes)

    if one.lease == "live" and rules.leases_end_by_themselves:
        yield step("lease-ends", lease="ended", stage="over" if one.stage == "leased" and one.is_orphan else one.stage)
    match one.stage:
        case "asked":
            filled = tuple(number if place == one.place else whose for place, whose in enumerate(world.places))
            yield step("made", replace(world, places=filled), lease="live", stage="leased")
            yield step("prefill-dies", stage="over", lease="ended")
        case "leased":
            if not one.is_orphan:
                yield step("loads", stage="loading", is_spoilt=world.places[one.place] != number)
            else:
                yield step("released", stage="over", lease="ended")
        case "loading":
            right = world.places[one.place] == number and not one.is_spoilt
            if one.lease == "ended" and rules.late_reads_are_discarded:
                yield step("late", stage="over")
            else:
                replayed = world.received if rules.resumes_replay else 0
                yield step("read", stage="decoding", lease="ended", has="right" if right else "wrong", said=replayed)
            yield step("decode-dies", stage="over")
            if one.is_orphan:
                yield step("given-up", stage="over", lease="ended")
        case "decoding":
            if one.is_loan:
                yield step("cached", stage="over")
            else:
                yield from _token(world, number, rules, step)
                yield step("preempted", stage="over")
            yield step("decode-dies", stage="over")
            if one.is_orphan:
                yield step("given-up", stage="over")
    if one.stage in ("loading", "decoding") and not (one.is_orphan or one.is_loan):
        yield step("wedged", is_orphan=True)
    if one.stage in ("leased", "loading") and one.lease == "live":
        lost = tuple(-1 if place == one.place else whose for place, whose in enumerate(world.places))
        yield step("prefill-dies", replace(world, places=lost), stage="over", lease="ended")


def _token(world: World, number: int, rules: Rules, step) -> Iterator[tuple[str, World]]:
    one = world.attempts[number]
    if one.is_orphan and rules.orphans_are_not_heard:
        yield step("token-unheard", said=min(one.said + 1, TOKENS))
        return
    heard = replace(world, received=world.received + 1)
    if one.said + 1 < TOKENS:
        yield step("token", heard, said=one.said + 1)
        return
    ended = replace(heard, outcome=world.outcome or "done")
    free = set(range(PLACES)) - world.held()
    if free and not any(a.is_loan for a in world.attempts):
        place = min(free)
        filled = tuple(len(world.attempts) if at == place else whose for at, whose in enumerate(world.places))
        loan = Attempt("leased", place, "live", is_loan=True)
        lent = replace(ended, attempts=(*ended.attempts, loan), places=filled)
        yield step("last-token-lends", lent, stage="over")
    yield step("last-token", ended, stage="over")


def _others(world: World, place: int, rules: Rules) -> Iterator[tuple[str, World]]:
    """Another turn takes a place that nobody holds."""
    if world.places[place] == -1 or (place in world.held() and rules.leased_places_are_kept):
        return
    whose = tuple(-1 if at == place else one for at, one in enumerate(world.places))
    spoilt = tuple(
        replace(one, is_spoilt=True) if one.stage == "loading" and one.place == place else one for one in world.attempts
    )
    yield f"taken-by-others {place}", replace(world, places=whose, attempts=spoilt)


def problem(world: World) -> str:
    for number, one in enumerate(world.attempts):
        if one.has == "wrong":
            return f"attempt {number} uses KV that is not the base's of its prompt (R1, R6)"
        if one.lease == "live" and world.places[one.place] != number:
            return f"the KV of attempt {number} was overwritten under its lease"
    if len({one.place for one in world.attempts if one.lease == "live"}) < sum(o.lease == "live" for o in world.attempts):
        return "two leases are on one place"
    if world.received > TOKENS:
        return "the client has more tokens than the response has"
    if world.outcome == "done" and world.received != TOKENS:
        return "the turn is done, and its tokens are not all there (R3)"
    return ""


def is_at_rest(world: World) -> bool:
    """The turn has ended, and nothing of it is held."""
    return bool(world.outcome) and all(one.stage == "over" and one.lease != "live" for one in world.attempts)


def is_fault(what: str) -> bool:
    """Leases that end are no faults here: they are what ends what nobody else ends."""
    return what.split()[0] in set(FAULTS) - {"lease-ends"}
