"""The order in which waiting turns start: priority, then fair between tenants, then first come, first served.

Per priority this is start-time fair queueing (Goyal, Vin and Cheng, 1996). Each tenant's first waiting turn has a tag in
virtual time and the lowest tag is next; when a turn starts, its tenant's tag moves on by cost / weight. So backlogged
tenants are served in proportion to their weights, and a tenant that was away neither owes nor has saved anything. Tags move
when turns start, not when they arrive: a turn that leaves the queue has cost its tenant nothing.

Changes are O(log n) in the number of waiting turns, and linear in the number of priorities in use.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from prefillshare.router.admission.lazy_heap import LazyHeap


class Work(NamedTuple):
    """What one turn or several need: KV blocks to decode in, tokens to prefill, and the cost that fairness counts."""

    turns: float = 0
    blocks: float = 0
    tokens: float = 0
    cost: float = 0

    def plus(self, other: Work, times: float = 1) -> Work:
        return Work(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(eq=False, slots=True)
class Ticket:
    """A turn's place in the queue. `item` is opaque here."""

    tenant: str
    weight: float
    priority: int
    work: Work
    item: Any
    #: Virtual time at which it would start if nobody left before it.
    tag: float = 0.0
    #: How many turns have started before it since it became first in line.
    passed: int = 0


class _Flow:
    """A tenant's waiting turns of one priority."""

    def __init__(self, start: float, weight: float):
        self.start, self.weight = start, weight
        #: Cost of turns that passed the first one, and of turns that grew; charged when the first one starts.
        self.debt = 0.0
        self.work = Work()
        self.waiting: OrderedDict[Ticket, None] = OrderedDict()

    def nth(self, n: int) -> Ticket | None:
        return next(islice(self.waiting, n, None), None)

    @property
    def finish(self) -> float:
        return self.start + (self.work.cost + self.debt) / self.weight


class _Level:
    """All waiting turns of one priority. The level, and with it its virtual time, ends when no turn is left."""

    def __init__(self) -> None:
        self.now = 0.0
        self.flows: dict[str, _Flow] = {}
        self.next_flow: LazyHeap[_Flow] = LazyHeap()
        self.from_the_end: LazyHeap[Ticket] = LazyHeap()
        self.work, self.weight = Work(), 0.0
        #: Tags of tenants that have no turn waiting but are ahead of virtual time.
        self.away: dict[str, float] = {}
        self._away_limit = 64

    def add(self, ticket: Ticket) -> None:
        flow = self.flows.get(ticket.tenant)
        if flow is None:
            flow = self.flows[ticket.tenant] = _Flow(max(self.now, self.away.pop(ticket.tenant, 0.0)), 0.0)
            self.next_flow.put(flow, flow.start)
        self.weight += ticket.weight - flow.weight
        flow.weight = ticket.weight
        ticket.tag = flow.finish
        flow.waiting[ticket] = None
        flow.work, self.work = flow.work.plus(ticket.work), self.work.plus(ticket.work)
        self.from_the_end.put(ticket, -ticket.tag)

    def remove(self, ticket: Ticket, started: bool) -> None:
        flow = self.flows[ticket.tenant]
        if started:
            self.now = max(self.now, flow.start)
            flow.debt += ticket.work.cost
            if ticket is flow.nth(0):
                flow.start, flow.debt = flow.start + flow.debt / flow.weight, 0.0
                self.next_flow.put(flow, flow.start)
        del flow.waiting[ticket]
        self.from_the_end.discard(ticket)
        flow.work, self.work = flow.work.plus(ticket.work, -1), self.work.plus(ticket.work, -1)
        if not flow.waiting:
            del self.flows[ticket.tenant]
            self.next_flow.discard(flow)
            self.weight -= flow.weight
            self.leave(ticket.tenant, flow.finish)

    def leave(self, tenant: str, tag: float) -> None:
        if tag > self.now:
            self.away[tenant] = tag
        if len(self.away) > self._away_limit:
            self.away = {name: tag for name, tag in self.away.items() if tag > self.now}
            self._away_limit = 2 * len(self.away) + 64

    def first(self, besides: Ticket | None) -> Ticket | None:
        flow = self.next_flow.first()
        head = flow.nth(0)
        if head is not besides:
            return head
        own, other = flow.nth(1), self.next_flow.first(besides=flow)
        if other is None or (own and flow.start + (head.work.cost + flow.debt) / flow.weight < other.start):
            return own
        return other.nth(0)

    def ahead_of(self, ticket: Ticket) -> Work:
        """All other turns of its tenant, and of other tenants what their weights entitle them to until its tag comes up."""
        flow = self.flows[ticket.tenant]
        own = flow.work.plus(ticket.work, -1)
        others = self.work.plus(flow.work, -1)
        if not others.cost:
            return own.plus(others)
        due = max(0.0, ticket.tag - self.now) * (self.weight - flow.weight)
        return own.plus(others, min(1.0, due / others.cost))


class FairQueue:
    """Waiting turns of one decode pool, in the order in which they are to start."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._priorities: list[int] = []
        self.work = Work()

    def __len__(self) -> int:
        return int(self.work.turns)

    def add(self, ticket: Ticket) -> None:
        if ticket.priority not in self._levels:
            self._levels[ticket.priority] = _Level()
            insort(self._priorities, ticket.priority)
        self._levels[ticket.priority].add(ticket)
        self.work = self.work.plus(ticket.work)

    def remove(self, ticket: Ticket, *, started: bool) -> None:
        """Take a turn out. `started`: its tenant is charged for it."""
        level = self._levels[ticket.priority]
        level.remove(ticket, started)
        self.work = self.work.plus(ticket.work, -1)
        if not level.flows:
            del self._levels[ticket.priority]
            self._priorities.remove(ticket.priority)

    def charge(self, tenant: str, weight: float, priority: int, cost: float) -> None:
        """Charge for a started turn that costs more than was known. Does nothing if no turn of this priority waits."""
        if (level := self._levels.get(priority)) is None:
            return
        if flow := level.flows.get(tenant):
            flow.debt += cost
        else:
            level.leave(tenant, max(level.now, level.away.get(tenant, 0.0)) + cost / weight)

    def first(self, besides: Ticket | None = None) -> Ticket | None:
        """The turn to start next, or the turn after it if the next one is given as `besides`."""
        for priority in self._priorities[:2]:  # a level that exists is not empty
            if ticket := self._levels[priority].first(besides):
                return ticket
        return None

    def last(self) -> Ticket | None:
        """The turn that would start last."""
        return self._levels[self._priorities[-1]].from_the_end.first() if self._priorities else None

    def ahead_of(self, ticket: Ticket) -> Work:
        """Work that is to start before a turn that has just been added, estimated from tenants' shares."""
        ahead = self._levels[ticket.priority].ahead_of(ticket)
        for priority in self._priorities:
            if priority >= ticket.priority:
                break
            ahead = ahead.plus(self._levels[priority].work)
        return ahead
