"""The line before one decode pool: who is next, where it fits, and how long the last one will wait.

A turn starts when a decode replica has the blocks and the sequence it needs, and the prefill pool's queued tokens are below
their bound. The first in line that fits nowhere keeps the replica with most free blocks for itself: what gets free there
stays free until it fits. Only the one after it may start meanwhile, on another replica, and no more than MAX_PASSED turns
may do so. So a large turn is never starved by small ones, and small ones wait for it no longer than for one replica to drain.
"""

from __future__ import annotations

from collections.abc import Callable

from prefillshare.router.admission.decode_room import DecodeRoom
from prefillshare.router.admission.fair_queue import FairQueue, Ticket
from prefillshare.router.service_rate import Clock, DrainRate, UsualTime

MAX_PASSED = 32


class PrefillPool:
    """Prefill tokens admitted and not finished, for all decode pools that draw on one pool of prefill engines."""

    def __init__(self, replicas: Callable[[], int], tokens_per_replica: int, clock: Clock):
        self._replicas, self._tokens_per_replica = replicas, tokens_per_replica
        self.queued_tokens = 0
        self.lines: list[DecodeLine] = []
        self.rate = DrainRate(clock)

    @property
    def limit(self) -> int:
        return self._replicas() * self._tokens_per_replica

    @property
    def has_room(self) -> bool:
        """Not asked of a turn's own size: the bound is exceeded by one turn at most, and no turn is too large for it."""
        return self.queued_tokens < self.limit

    def done(self, tokens: int, finished: bool) -> None:
        self.queued_tokens -= tokens
        if finished:
            self.rate.done(tokens)


class DecodeLine:
    def __init__(self, pool: str, room: DecodeRoom, prefill: PrefillPool, clock: Clock):
        self.pool, self.room, self.prefill = pool, room, prefill
        self.queue = FairQueue()
        self.running = 0
        #: When it last started a turn, counted in starts of all lines: those of one prefill pool take turns.
        self.last_start = 0
        self.freed_blocks, self.ended_turns = DrainRate(clock), DrainRate(clock)
        #: Seconds from start to end per expected output token.
        self.pace = UsualTime(clock)
        prefill.lines.append(self)

    def join(self, ticket: Ticket) -> None:
        self.queue.add(ticket)
        self._tell_backlog()

    def leave(self, ticket: Ticket, *, started: bool) -> None:
        if started and (first := self.queue.first()) is not ticket:
            first.passed += 1
        self.queue.remove(ticket, started=started)
        self._tell_backlog()

    def take(self, replica: str, blocks: int) -> None:
        self.running += 1
        self.room.change(replica, blocks, 1)

    def give_back(self, replica: str, blocks: int) -> None:
        self.running -= 1
        self.room.change(replica, -blocks, -1)
        self.freed_blocks.done(blocks)
        self.ended_turns.done(1)

    def next_start(self) -> tuple[Ticket, str] | None:
        """The turn that decode has room for now, and a replica that has it. Prefill room is not asked for."""
        first = self.queue.first()
        if first is None:
            return None
        if replica := self.room.find(first.work.blocks):
            return first, replica
        second = self.queue.first(besides=first) if first.passed < MAX_PASSED else None
        if second and (replica := self.room.find(second.work.blocks, but_the_emptiest=True)):
            return second, replica
        return None

    def wait_s(self, ticket: Ticket) -> float:
        """Estimated time until a turn that has just joined starts; 0 before anything has been measured.

        The longest of: blocks, sequences and prefill tokens that it and the work ahead of it lack, at their measured rates.
        """
        ahead = self.queue.ahead_of(ticket)
        others = [line.queue.work.tokens for line in self.prefill.lines if line is not self and len(line.queue)]
        tokens = ahead.tokens + min(sum(others), len(others) * ahead.tokens)
        return max(
            self.freed_blocks.seconds_for(ahead.blocks + ticket.work.blocks - self.room.free_blocks),
            self.ended_turns.seconds_for(ahead.turns + 1 - self.room.free_sequences),
            self.prefill.rate.seconds_for(tokens + self.prefill.queued_tokens - self.prefill.limit),
        )

    def _tell_backlog(self) -> None:
        waits = len(self.queue) > 0
        self.freed_blocks.backlog(waits)
        self.ended_turns.backlog(waits)
        self.prefill.rate.backlog(any(len(line.queue) for line in self.prefill.lines))
