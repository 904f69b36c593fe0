"""The last turns of each tenant, for the page at /ui: what each cost and where it ran, never what it said.

Turns stand on lanes. The turns of a session are one lane. A call without a session is on the lane of an earlier one if its
prompt begins with all of that one's (router/known_prefixes.py). Nothing of one tenant's turns, not even their number, can be
seen in what another is told (R7).
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prefillshare.kvshare.usage import TurnUsage
from prefillshare.router.known_prefixes import KnownPrefixes

#: Turns kept of one tenant: at most MOST, of all tenants together about IN_ALL, and LEAST of each in any case.
MOST, LEAST, IN_ALL = 256, 32, 16384
#: Names that clients choose are cut to this length.
NAME_CHARS = 128
#: A shorter prompt, such as a lone token that opens every text, is continued by nobody.
LEAST_TOKENS = 4


def kept_per_tenant(tenants: int) -> int:
    return min(MOST, max(LEAST, IN_ALL // max(1, tenants)))


@dataclass
class RecentTurn:
    """`usage` is the turn's own, and is filled while the turn runs."""

    decoder: str
    pool: str
    request_id: str
    session: str
    usage: TurnUsage
    #: Seconds since 1970.
    began_at: float = field(default_factory=time.time)
    #: "" while the turn runs; then as in prefillshare_turns_total.
    outcome: str = ""
    #: Seconds from its beginning to its end.
    took_s: float = 0.0
    #: Set by RecentTurns: counted from 1 for each tenant; the lane's name; the revision in which the turn ended, or began.
    number: int = 0
    lane: str = ""
    revision: int = 0


@dataclass(frozen=True)
class Since:
    """What a reader who knows everything up to a revision does not know yet. `turns`: begun or ended since, or running; oldest
    first. `oldest`: number of the oldest turn that is kept."""

    turns: list[RecentTurn]
    revision: int
    oldest: int


class RecentTurns:
    """`kept`: turns of each tenant; with 0, none is."""

    def __init__(self, kept: int = MOST):
        #: Tells this router, and this run of it, from others.
        self.router = uuid.uuid4().hex[:8]
        self._kept = kept
        self._tenants: dict[str, _OfTenant] = {}

    def began(self, tenant: str, turn: RecentTurn, prompt: Sequence[int]) -> Callable[[str, float], None]:
        """Returns what is to be called at the turn's end, with its outcome and the seconds that it took."""
        if not self._kept:
            return _nothing
        if tenant not in self._tenants:
            self._tenants[tenant] = _OfTenant(self._kept)
        of = self._tenants[tenant]
        of.add(turn, prompt)

        def ended(outcome: str, took_s: float) -> None:
            turn.outcome, turn.took_s = outcome, took_s
            turn.revision = of.next_revision()

        return ended

    def since(self, tenant: str, revision: int) -> Since:
        """`revision`: as last told; 0: all that is kept is wanted."""
        of = self._tenants.get(tenant)
        if of is None:
            return Since([], 0, 1)
        known = revision if revision <= of.revision else 0
        turns = [turn for turn in of.turns if turn.revision > known or not turn.outcome]
        return Since(turns, of.revision, of.turns[0].number)


class _OfTenant:
    def __init__(self, kept: int):
        self.turns: deque[RecentTurn] = deque(maxlen=kept)
        #: Prompts of calls without a session -> number of their lane.
        self._lanes: KnownPrefixes[int] = KnownPrefixes(kept)
        self.revision = self._count = self._lane_count = 0

    def add(self, turn: RecentTurn, prompt: Sequence[int]) -> None:
        self._count += 1
        turn.number, turn.revision = self._count, self.next_revision()
        turn.session, turn.request_id = turn.session[:NAME_CHARS], turn.request_id[:NAME_CHARS]
        turn.lane = f"session {turn.session}" if turn.session else f"calls {self._lane_of(prompt)}"
        self.turns.append(turn)

    def _lane_of(self, prompt: Sequence[int]) -> int:
        lane = self._lanes.longest(prompt)
        if lane is None:
            self._lane_count += 1
            lane = self._lane_count
        if len(prompt) >= LEAST_TOKENS:
            self._lanes.note(prompt, lane)
        return lane

    def next_revision(self) -> int:
        self.revision += 1
        return self.revision


def _nothing(outcome: str, took_s: float) -> None: ...
