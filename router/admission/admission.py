"""Admission: a turn starts when there is room for its prefill and its decode; otherwise it waits in line or is refused.

1. A turn that no replica could ever hold, or whose tenant is at its limit, is refused.
2. It joins its decode pool's line (decode_line.py), ordered by priority, tenant and arrival (fair_queue.py).
3. A turn that fits starts. It holds prefill tokens until `prefill_done`, KV blocks and a sequence until `release`.
4. A turn that has to wait is refused if it is estimated to start too late: after router.max_wait_s, or with less time to its
   deadline than such turns take. The estimate is the work ahead divided by measured rates; before any is known, the turn waits.
5. If more than router.max_queued turns are then in progress or waiting, the last turn of the longest line is refused. This is
   not always the newcomer: no pool, priority or tenant can keep others out by filling the queue.
6. Whenever room is given back, step 3 runs again. A turn that has waited as long as step 4 allows is refused.

Only waiting is asynchronous: each event makes all its changes before any other task runs.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prefillshare.kvshare.config import Router
from prefillshare.kvshare.errors import Internal, InvalidInput, Unavailable
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.priority import PRIORITIES, RESUMED
from prefillshare.router.admission.decode_line import DecodeLine, PrefillPool
from prefillshare.router.admission.decode_room import Capacity, DecodeRoom
from prefillshare.router.admission.fair_queue import Ticket, Work
from prefillshare.router.admission.grant import Demand, Grant, TenantShare
from prefillshare.router.admission.refusals import Refusal, Refusals
from prefillshare.router.clock import now
from prefillshare.router.service_rate import Clock

#: A longer estimate only means that the measured rate is close to zero, not that the turn would start at that time.
LONGEST_ESTIMATE_S = 600.0


@dataclass(frozen=True)
class PoolSource:
    """Where a decode pool's room comes from: its replicas, its prefill pool's name and current number of replicas, and how many
    of its own replicas may prefill besides."""

    capacity: Capacity
    prefill: str
    prefill_replicas: Callable[[], int]
    local_replicas: Callable[[], int] = lambda: 0


class Admission:
    def __init__(
        self,
        config: Router,
        block_size: int,
        pools: Mapping[str, PoolSource],
        metrics: Metrics,
        clock: Clock = now,
    ):
        self._config, self.block_size, self._clock, self._metrics = config, block_size, clock, metrics
        self._refusals = Refusals(metrics)
        self._prefill: dict[str, PrefillPool] = {}
        self._lines: dict[str, DecodeLine] = {}
        #: Turns admitted or waiting.
        self.in_progress = 0
        self._by_tenant: Counter[str] = Counter()
        self._starts = 0
        self.serve(config, pools)

    def serve(self, config: Router, pools: Mapping[str, PoolSource]) -> None:
        """Admit to these pools under these limits from now on. Turns in a line that is removed keep what they hold."""
        self._config = config
        self._full = f"{config.max_queued} turns are in progress or waiting (router.max_queued)"
        for name in self._lines.keys() - pools.keys():
            line = self._lines.pop(name)
            line.prefill.lines.remove(line)
        for name in self._prefill.keys() - {source.prefill for source in pools.values()}:
            del self._prefill[name]
        for name, source in pools.items():
            if source.prefill not in self._prefill:
                tokens = config.max_queued_prefill_tokens
                self._prefill[source.prefill] = PrefillPool(source.prefill_replicas, tokens, self._clock)
            if name not in self._lines:
                self._lines[name] = DecodeLine(name, DecodeRoom(source.capacity), self._prefill[source.prefill], self._clock)
            self._lines[name].draws_on(self._prefill[source.prefill], source.local_replicas)

    async def admit(self, demand: Demand) -> Grant:
        """Wait until the turn may start. The grant must be released: `with await admission.admit(...) as grant`.

        Raises Overloaded (refused, with a hint when to try again), InvalidInput (can never fit), Unavailable (no replica).
        """
        grant = self._join(demand)
        if grant.ticket is None:
            return grant
        timer = asyncio.get_running_loop().call_later(grant.may_wait_s, self._expire, grant)
        try:
            await grant.decided.wait()
            if grant.error:
                raise grant.error
        except BaseException:
            grant.release()
            raise
        finally:
            timer.cancel()
        return grant

    def check_turns(self, turns: int, tenant: TenantShare) -> None:
        """Raises InvalidInput if this many turns of one request could never be begun at once."""
        limits = [(self._config.max_queued, "router.max_queued")]
        for field in ("max_in_progress", "turns_per_minute"):
            if (limit := getattr(tenant, field)) is not None:
                limits.append((limit, f"{field} of tenant {tenant.name!r}"))
        most, whose = min(limits)
        if turns > most:
            raise InvalidInput(
                f"the request asks for {turns} responses at once, at most {most} can be begun ({whose})",
                field="n",
                fix=f"ask for at most {most} in one request, counting each prompt n times",
            )

    def refresh(self) -> None:
        """Take note that replicas came or went. Without this call, the pool's next event would notice it."""
        for line in self._lines.values():
            line.refresh()
        for line in self._lines.values():
            self.start_what_fits(line)

    def room(self, pool: str) -> Mapping[str, int]:
        """Free blocks of the replicas that have a free sequence: a live view, for placement to score.

        Use `Grant.fits` to find out whether a turn with a grant may go to a replica: it counts what the turn itself holds.
        """
        return self._lines[pool].room.free

    def held(self, pool: str) -> Mapping[str, tuple[int, int]]:
        """Blocks and turns reserved, per replica that has any: a live view."""
        return self._lines[pool].room.held

    def waiting(self, pool: str) -> int:
        return len(self._lines[pool].queue)

    def queued_prefill_tokens(self, prefill: str) -> int:
        return self._prefill[prefill].queued_tokens

    # Called by Grant.

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def start_what_fits(self, line: DecodeLine) -> None:
        """After any change: start all turns that can, in this line and in those that draw on the same prefill pool."""
        line.refresh()
        while ready := self._next_start(line.prefill):
            self._start(*ready)

    def readmit(self, grant: Grant, output_tokens: int) -> None:
        if grant.replica is None:
            raise Internal("a turn that waits or has ended cannot be admitted again")
        demand, room = grant.demand, grant.line.room
        grant.line.give_back(grant.replica, grant.blocks)
        output = output_tokens + self._expected_output(demand)
        if demand.max_tokens is not None:
            output = min(output, max(output_tokens, demand.max_tokens))
        needed = self.blocks_for(demand.prompt_tokens + output)
        grant.blocks = min(needed, room.largest) if room.replicas else needed
        self._queue(grant, RESUMED, Work(turns=1, blocks=grant.blocks))

    def end(self, grant: Grant) -> None:
        self._drop(grant)
        self.start_what_fits(grant.line)

    # Everything below updates the counters.

    def _join(self, demand: Demand) -> Grant:
        if demand.pool not in self._lines:
            raise Unavailable(f"pool {demand.pool!r} is not served any more", fix="use another decoder")
        line, output = self._lines[demand.pool], self._expected_output(demand)
        line.refresh()
        grant = Grant(self, line, demand, self.blocks_for(demand.prompt_tokens + output))
        self._refuse_what_waiting_would_not_help(grant)
        self.in_progress += 1
        self._by_tenant[demand.tenant.name] += 1
        deadline_s = self._config.default_deadline_s if demand.deadline_s is None else demand.deadline_s
        grant.may_wait_s = max(0.0, min(self._config.max_wait_s, deadline_s - output * line.pace.value))
        tokens = demand.prefill_tokens
        self._queue(grant, demand.priority, Work(1, grant.blocks, tokens, tokens + output))
        if grant.ticket and (wait_s := line.wait_s(grant.ticket)) > grant.may_wait_s:
            late = f"it would start in {_about(wait_s)} and may wait {grant.may_wait_s:.0f} s (router.max_wait_s, deadline)"
            self._refuse(grant, Refusal.TOO_LATE, late)
        if self.in_progress > self._config.max_queued:
            last = max(self._lines.values(), key=lambda line: len(line.queue)).queue.last()
            self._refuse(last.item if last and last.priority != RESUMED else grant, Refusal.QUEUE_FULL, self._full)
        if grant.error:
            raise grant.error
        return grant

    def _refuse_what_waiting_would_not_help(self, grant: Grant) -> None:
        demand, tenant, line = grant.demand, grant.demand.tenant, grant.line
        if demand.priority not in PRIORITIES:
            allowed = f"use {PRIORITIES[0]} to {PRIORITIES[-1]}"
            raise InvalidInput(f"{demand.priority} is out of range", field="priority", fix=allowed)
        if line.room.replicas and grant.blocks > line.room.largest:
            raise self._refusals.never_fits(grant)
        if self.in_progress >= self._config.max_queued and not any(len(line.queue) for line in self._lines.values()):
            raise self._refusals.overloaded(Refusal.QUEUE_FULL, grant, self._full, line.ended_turns.seconds_for(1))
        mine = self._by_tenant.get(tenant.name, 0)
        if tenant.max_in_progress is not None and mine >= tenant.max_in_progress:
            text = f"tenant {tenant.name!r} has {mine} turns in progress or waiting, as many as it may"
            retry_s = line.ended_turns.seconds_for(line.running / max(mine, 1))
            raise self._refusals.overloaded(Refusal.TENANT_LIMIT, grant, text, retry_s)

    def _refuse(self, grant: Grant, reason: Refusal, text: str) -> None:
        """Refuse a turn that has joined already. The hint says when a turn like it could join the end of the line."""
        line = grant.line
        too_long_s = line.wait_s(grant.ticket) - grant.may_wait_s if grant.ticket else 0.0
        grant.error = self._refusals.overloaded(reason, grant, text, max(too_long_s, line.ended_turns.seconds_for(1)))
        self._drop(grant)

    def _expire(self, grant: Grant) -> None:
        if grant.ticket is not None and not grant.line.room.replicas:
            grant.error = self._refusals.no_replica(grant)
            self._drop(grant)
        elif grant.ticket is not None:
            text = f"no room in pool {grant.line.pool!r} within {grant.may_wait_s:.1f} s (router.max_wait_s, deadline)"
            self._refuse(grant, Refusal.WAITED_TOO_LONG, text)
            self.start_what_fits(grant.line)

    def _next_start(self, prefill: PrefillPool) -> tuple[Ticket, str] | None:
        """The next turn over all lines: highest priority first, then the line whose last start is longest ago."""
        ready, has_room = [], prefill.has_room
        for line in prefill.lines:
            while (first := line.queue.first()) and line.room.replicas and first.work.blocks > line.room.largest:
                first.item.error = self._refusals.never_fits(first.item)  # the replicas it was meant for are gone
                self._drop(first.item)
            if (found := line.next_start()) and (has_room or not found[0].work.tokens):
                ready.append((found[0].priority, line.last_start, found))
        return min(ready, key=lambda it: it[:2])[2] if ready else None

    def _start(self, ticket: Ticket, replica: str) -> None:
        grant: Grant = ticket.item
        line = grant.line
        self._unqueue(grant, started=True)
        line.take(replica, grant.blocks)
        self._starts += 1
        line.last_start = self._starts
        grant.start(replica, line.prefill, ticket.work.tokens, self._clock())
        if ticket.priority != RESUMED:
            self._metrics["queue_seconds"].labels(line.pool).observe(grant.waited_s)

    def _drop(self, grant: Grant) -> None:
        """Give back everything a grant holds, whatever its state."""
        line, tenant = grant.line, grant.demand.tenant.name
        self.in_progress -= 1
        self._by_tenant[tenant] -= 1
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
        if grant.ticket is not None:
            self._unqueue(grant, started=False)
        if grant.replica is not None:
            line.give_back(grant.replica, grant.blocks)
            if not grant.prefill_tokens:
                line.pace.add((self._clock() - grant.started_at) / self._expected_output(grant.demand))
        if grant.prefill:
            grant.prefill.done(grant.prefill_tokens, finished=False)
        grant.stop()

    def _queue(self, grant: Grant, priority: int, work: Work) -> None:
        tenant = grant.demand.tenant
        grant.wait(Ticket(tenant.name, tenant.weight, priority, work, grant), self._clock())
        grant.line.join(grant.ticket)
        self._show_waiting(grant.line)
        self.start_what_fits(grant.line)

    def _unqueue(self, grant: Grant, *, started: bool) -> None:
        grant.line.leave(grant.ticket, started=started)
        grant.ticket = None
        self._show_waiting(grant.line)

    def _show_waiting(self, line: DecodeLine) -> None:
        self._metrics["turns_waiting"].labels(line.pool).set(len(line.queue))

    def _expected_output(self, demand: Demand) -> int:
        return demand.output_tokens(self._config.expected_output_tokens)


def _about(wait_s: float) -> str:
    return f"about {wait_s:.0f} s" if wait_s <= LONGEST_ESTIMATE_S else f"more than {LONGEST_ESTIMATE_S:.0f} s"
