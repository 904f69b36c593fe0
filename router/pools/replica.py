"""One replica of a pool, as a router sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from prefillshare.kvshare.errors import ReplicaLost, ResumeReason
from prefillshare.kvshare.replica_info import ReplicaInfo, ReplicaStats
from prefillshare.router.pools.health import Health


@dataclass
class Replica:
    """One replica and this router's work on it."""

    info: ReplicaInfo
    health: Health
    stats: ReplicaStats = field(default_factory=ReplicaStats)
    #: This router's calls and uncomputed prompt tokens there.
    active: int = 0
    queued_tokens: int = 0
    #: Those of other routers, as the replica last told.
    others_active: int = 0
    others_queued_tokens: int = 0
    #: See Candidate.filled_tokens.
    filled_tokens: float = 0.0
    calls: set[asyncio.Timeout] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.id = self.info.replica

    @property
    def total_active(self) -> int:
        """Calls of all routers."""
        return self.active + self.others_active

    @property
    def total_queued_tokens(self) -> int:
        return self.queued_tokens + self.others_queued_tokens

    @property
    def load(self) -> tuple[int, float]:
        load = self.active + self.others_active + self.queued_tokens + self.others_queued_tokens
        return load, self.filled_tokens

    def told(self, stats: ReplicaStats, active: int, queued_tokens: int) -> None:
        """The replica has told `stats`. `active`, `queued_tokens`: what of it was this router's when it was asked."""
        self.stats = stats
        self.others_active = max(0, stats.active - active)
        self.others_queued_tokens = max(0, stats.queued_tokens - queued_tokens)

    def end_calls(self) -> None:
        now = asyncio.get_running_loop().time()
        for scope in self.calls:
            if scope.when() is None:  # else it is ending already
                scope.reschedule(now)

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Count a call as load. Raises ReplicaLost if the replica is found wedged meanwhile."""
        self.active += 1
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self.calls.add(scope)
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise ReplicaLost(f"replica {self.id} does not answer", reason=ResumeReason.WEDGED, fix="try again") from None
        finally:
            self.calls.discard(scope)
            self.active -= 1

    @contextmanager
    def computing(self, tokens: int) -> Iterator[None]:
        """Count prompt tokens as load, until they have been computed."""
        self.queued_tokens += tokens
        try:
            yield
        finally:
            self.queued_tokens -= tokens
