"""What a turn asks for, and what it holds once it is admitted."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from prefillshare.kvshare.errors import PrefillShareError, Unavailable
from prefillshare.router.admission.decode_line import DecodeLine, PrefillPool
from prefillshare.router.admission.fair_queue import Ticket


@dataclass(frozen=True)
class TenantShare:
    """A turn's tenant. `weight`: its share relative to others. `max_in_progress`: most turns at once, waiting ones included.
    Limits that are None do not apply."""

    name: str = ""
    weight: float = 1.0
    max_in_progress: int | None = None
    tokens_per_minute: int | None = None
    turns_per_minute: int | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"tenant {self.name!r} has weight {self.weight:g}; it must be above 0")

    @property
    def is_limited(self) -> bool:
        return any(limit is not None for limit in (self.max_in_progress, self.tokens_per_minute, self.turns_per_minute))


NOBODY = TenantShare()


@dataclass(frozen=True)
class Demand:
    """What a turn needs. `cached_tokens`: prompt tokens expected to be cached at prefill. `own_tokens`: those that the decoder
    computes itself."""

    pool: str
    prompt_tokens: int
    cached_tokens: int = 0
    #: Most tokens it may generate; None: not known.
    max_tokens: int | None = None
    tenant: TenantShare = NOBODY
    #: Lower starts first.
    priority: int = 0
    #: Seconds from now until the turn must have ended; None: router.default_deadline_s.
    deadline_s: float | None = None
    own_tokens: int = 0

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that have to be computed."""
        return max(0, self.prompt_tokens - self.cached_tokens)

    @property
    def prefill_tokens(self) -> int:
        """Those of them that are computed at prefill."""
        return max(0, self.uncached_tokens - self.own_tokens)

    def output_tokens(self, expected: int) -> int:
        """How many tokens it is expected to generate. `expected`: of a turn that may generate more."""
        return expected if self.max_tokens is None else max(1, min(expected, self.max_tokens))


class Keeper(Protocol):
    """The part of Admission that a grant calls."""

    block_size: int

    def blocks_for(self, tokens: int) -> int: ...

    def start_what_fits(self, line: DecodeLine) -> None: ...

    def readmit(self, grant: Grant, output_tokens: int) -> None: ...

    def end(self, grant: Grant) -> None: ...


class Grant:
    """Room for one turn: blocks and a sequence on `replica` until `release`, prefill tokens until `prefill_done`.

    Admission reserves on a replica that has room; `on` moves the reservation to the one that placement picks.
    """

    def __init__(self, keeper: Keeper, line: DecodeLine, demand: Demand, blocks: int):
        self.demand, self.blocks = demand, blocks
        self.replica: str | None = None
        self.waited_s = 0.0
        self._keeper = keeper
        # Used by Admission only. A grant waits (`ticket`), runs (`replica`) or has ended (`ended`); never two of these at once.
        self.line, self.ticket, self.ended = line, None, False
        #: The pool of which it holds prefill tokens, once it has started.
        self.prefill: PrefillPool | None = None
        self.prefill_tokens = 0
        self.may_wait_s = self.waits_since = self.started_at = 0.0
        self.error: PrefillShareError | None = None
        self.decided = asyncio.Event()

    def __enter__(self) -> Grant:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def fits(self, replica: str) -> bool:
        """Whether `on(replica)` works now."""
        room = self.line.room
        return replica in room if replica == self.replica else room.fits(replica, self.blocks)

    def on(self, replica: str) -> None:
        """Move the reservation to this decode replica. Raises Unavailable if it has no room or is gone."""
        self.line.room.refresh()
        if self.replica is None or not self.fits(replica):
            raise Unavailable(f"decode replica {replica} has no room for {self.blocks} KV blocks", fix="try again")
        if replica != self.replica:
            self.line.room.change(self.replica, -self.blocks, -1)
            self.line.room.change(replica, self.blocks, 1)
            self.replica = replica
            self._keeper.start_what_fits(self.line)

    def prefill_done(self) -> None:
        """The prompt's KV has been computed: give back its prefill tokens. Idempotent."""
        tokens, self.prefill_tokens = self.prefill_tokens, 0
        if tokens:
            self.prefill.done(tokens, finished=True)
            self._keeper.start_what_fits(self.line)

    def grow_to(self, output_tokens: int) -> None:
        """Take note that the turn has generated `output_tokens` tokens.

        Blocks beyond the expected number are reserved even without room, as the engine has already taken them: nothing new
        starts on that replica then until turns have ended. The tenant is charged for them in the queue.
        """
        more = self._keeper.blocks_for(self.demand.prompt_tokens + output_tokens) - self.blocks
        if self.replica is not None and more > 0:
            self.line.room.change(self.replica, more, 0)
            tenant, cost = self.demand.tenant, more * self._keeper.block_size
            self.line.queue.charge(tenant.name, tenant.weight, self.demand.priority, cost)
            self.blocks += more

    async def readmit(self, output_tokens: int) -> None:
        """Wait for room again after the decode engine gave the turn back, or was lost, at `output_tokens` tokens.

        The turn needs room for these and for as many more as were first expected, and goes ahead of every turn that has not
        started. Only the caller's own deadline limits the wait.
        """
        self._keeper.readmit(self, output_tokens)
        await self.decided.wait()
        if self.error:
            raise self.error

    def release(self) -> None:
        """Give back everything. Idempotent, and allowed in any state."""
        if not self.ended:
            self._keeper.end(self)

    def wait(self, ticket: Ticket, now: float) -> None:
        self.ticket, self.replica, self.waits_since = ticket, None, now
        self.decided.clear()

    def start(self, replica: str, prefill: PrefillPool, prefill_tokens: int, now: float) -> None:
        self.ticket, self.replica, self.started_at = None, replica, now
        if not self.prefill_tokens:
            self.prefill = prefill
        self.prefill_tokens += prefill_tokens
        self.prefill.queued_tokens += prefill_tokens
        self.waited_s += now - self.waits_since
        self.decided.set()

    def stop(self) -> None:
        self.ticket, self.replica, self.ended, self.prefill_tokens = None, None, True, 0
        self.decided.set()
