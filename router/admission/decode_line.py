"""The waiting line of one decode pool: which turn is next, which replica it fits on, how long the last one will wait.

A turn starts when a decode replica has the blocks and the sequence it needs, and the prefill pool's queued tokens are below
their bound. If the first turn in line fits nowhere, the replica with most free blocks is kept for it: what becomes free there
stays free until the turn fits. Meanwhile only the turn after it may start, on another replica, and at most MAX_PASSED turns
may pass it. So small turns never starve a large one, and wait for it no longer than one replica takes to drain.
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
        replicas = self._replicas() + sum(line.local_replicas() for line in self.lines)
        return replicas * self._tokens_per_replica

    @property
    def has_room(self) -> bool:
        """Independent of a turn's own size: at most one turn exceeds the bound, and no turn is too large for it."""
        return self.queued_tokens < self.limit

    def done(self, tokens: int, finished: bool) -> None:
        self.queued_tokens -= tokens
        if finished:
            self.rate.done(tokens)


class DecodeLine:
    def __init__(self, pool: str, room: DecodeRoom, prefill: PrefillPool, clock: Clock):
        self.pool, self.room, self.prefill = pool, room, prefill
        #: Number of decode replicas that may prefill besides the prefill pool's.
        self.local_replicas: Callable[[], int] = lambda: 0
        self.queue = FairQueue()
        self.running = 0
        #: When this line last started a turn, counted in starts of all lines; lines of one prefill pool alternate by it.
        self.last_start = 0
        self.freed_blocks, self.ended_turns = DrainRate(clock), DrainRate(clock)
        #: Seconds from start to end per expected output token.
        self.pace = UsualTime(clock)
        prefill.lines.append(self)

    def draws_on(self, prefill: PrefillPool, local_replicas: Callable[[], int]) -> None:
        """Use this prefill pool from now on. Turns that have started give back to the one they started with."""
        if prefill is not self.prefill:
            self.prefill.lines.remove(self)
            prefill.lines.append(self)
        self.prefill, self.local_replicas = prefill, local_replicas

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
        """The next turn that fits on a decode replica, and that replica. Room for its prefill is not checked."""
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
        """Estimated seconds until a turn that has just joined starts; 0 before anything has been measured.

        It is the longest of three times: until the blocks, the sequences and the prefill tokens that the turn and the work
        ahead of it lack are free, each at its measured rate.
        """
        ahead = self.queue.ahead_of(ticket)
        others = [line.queue.work.tokens for line in self.prefill.lines if line is not self and len(line.queue)]
        tokens = ahead.tokens + min(sum(others), len(others) * ahead.tokens)
        return max(
            self.freed_blocks.seconds_for(ahead.blocks + ticket.work.blocks - self.room.free_blocks),
            self.ended_turns.seconds_for(ahead.turns + 1 - self.room.free_sequences),
            self.prefill.rate.seconds_for(tokens + self.prefill.queued_tokens - self.prefill.limit),
        )

    def refresh(self) -> None:
        """Take note of replicas that came or went."""
        self.room.refresh()
        self._tell_backlog()

    def _tell_backlog(self) -> None:
        # While there is no replica, turns wait for one to start: that says nothing about how fast replicas work.
        waits = len(self.queue) > 0 and bool(self.room.replicas)
        self.freed_blocks.backlog(waits)
        self.ended_turns.backlog(waits)
        self.prefill.rate.backlog(self.prefill.limit > 0 and any(len(line.queue) for line in self.prefill.lines))
