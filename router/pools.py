"""A pool: the replicas of one deployment, what they have cached, and the choice among them.

Owns the replica set. `calling` is the one way to put work on a replica: it counts the load, and turns whatever means
"this replica failed, the request did not" into ReplicaLost.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ray.exceptions import RayError

from kvshare.errors import PrefixLost, ReplicaLost, ResumeReason, Unavailable
from kvshare.replica_info import ReplicaInfo
from router.cache_index import BlockKeys, CacheIndex
from router.placement import Candidate, Demand, Weights, place
from router.replicas import Replica, ReplicaSet

FILL_HALF_LIFE_S = 600.0


class _Fill:
    """Tokens computed on a replica, forgotten by half every FILL_HALF_LIFE_S."""

    def __init__(self, clock: Callable[[], float]):
        self._clock, self._tokens, self._at = clock, 0.0, clock()

    def add(self, tokens: int) -> None:
        self._tokens, self._at = self.tokens + tokens, self._clock()

    @property
    def tokens(self) -> float:
        return self._tokens * math.exp2((self._at - self._clock()) / FILL_HALF_LIFE_S)


@dataclass(frozen=True)
class Placement:
    replica: Replica
    #: Leading prompt tokens the index says are cached there, and the rest.
    cached_tokens: int
    missing_tokens: int


class Pool:
    def __init__(
        self,
        replicas: ReplicaSet,
        index: CacheIndex,
        weights: Weights,
        *,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.replicas = replicas.name, replicas
        replicas.listener = self._tell_index
        self._index, self.weights, self._wait_s, self._clock = index, weights, wait_s, clock
        self._fills: dict[str, _Fill] = {}
        self._placed = 0

    async def choose(
        self,
        prompt_tokens: int,
        keys: BlockKeys,
        *,
        blocks: int = 0,
        last_replica: str | None = None,
        without: Collection[str] = (),
    ) -> Placement:
        """Place one request of `prompt_tokens` tokens. Waits for a replica where none may get work; Unavailable after
        `wait_s`, sooner if the turn's deadline is."""
        if not self.replicas.usable():
            await self._wait()
        overlaps = await self._index.overlaps(self.name, keys)
        replicas = {r.id: r for r in self.replicas.usable(without)}
        self._placed += 1
        chosen = place(
            [self._candidate(r, overlaps.get(r.id, 0)) for r in replicas.values()],
            Demand(prompt_tokens, blocks, last_replica, self._placed),
            self.weights,
            self.name,
        )
        cached = min(chosen.overlap_tokens, prompt_tokens)
        return Placement(replicas[chosen.replica], cached, prompt_tokens - cached)

    def _candidate(self, replica: Replica, overlap: int) -> Candidate:
        fill = self._fills.get(replica.id)
        return Candidate(
            replica.id,
            overlap,
            replica.total_queued_tokens,
            replica.total_active,
            fill.tokens if fill else 0.0,
        )

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._wait_s):
                await self.replicas.wait_usable()
        except TimeoutError:
            raise Unavailable(f"no replica of {self.name} has been ready for {self._wait_s:g} s", fix="try again") from None

    @asynccontextmanager
    async def calling(self, placement: Placement, queued_tokens: int = 0) -> AsyncIterator[None]:
        """One call on the chosen replica. What it raises has been counted against the replica."""
        replica = placement.replica
        if queued_tokens:
            self._fills.setdefault(replica.id, _Fill(self._clock)).add(queued_tokens)
        try:
            async with self.replicas.using(replica, queued_tokens):
                yield
        except PrefixLost:
            raise
        except ReplicaLost as lost:
            self.replicas.failed(replica.id, lost.reason)
            raise
        except (RayError, Unavailable) as error:
            reason = ResumeReason.GONE if isinstance(error, RayError) else ResumeReason.UNAVAILABLE
            self.replicas.failed(replica.id, reason)
            raise ReplicaLost(f"replica {replica.id} of {self.name}: {type(error).__name__}: {error}", reason=reason) from error

    async def _tell_index(self, replica: str, info: ReplicaInfo | None) -> None:
        if info is not None:
            await self._index.add(self.name, replica, info.kv_events)
        else:
            await self._index.remove(self.name, replica)
            self._fills.pop(replica, None)
