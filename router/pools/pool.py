"""A pool: the replicas of one deployment, what they have cached, and the choice among them.

Owns the replica set. `calling` is the one way to put work on a replica: it counts the load, and turns errors that mean
"the replica failed, not the request" into ReplicaLost.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass

from prefillshare.kvshare.errors import PrefixLost, ReplicaLost, ResumeReason, Unavailable
from prefillshare.kvshare.replica_info import ReplicaInfo
from prefillshare.router.admission.decode_room import ReplicaCapacity
from prefillshare.router.clock import now
from prefillshare.router.pools.cache_index import BlockKeys, CacheIndex, KeptThere
from prefillshare.router.pools.calls import CALL_ERRORS
from prefillshare.router.pools.placement import Call, Candidate, Weights, place, reason, shortlist
from prefillshare.router.pools.replica import Replica
from prefillshare.router.pools.replicas import ReplicaSet

logger = logging.getLogger(__name__)

FILL_HALF_LIFE_S = 3600.0
COMING_S = 2.0


@dataclass(frozen=True)
class Placed:
    replica: Replica
    #: Leading prompt tokens the index says are cached there, and the rest.
    cached_tokens: int
    missing_tokens: int
    #: As router.placement.reason.
    reason: str


class Pool:
    def __init__(
        self,
        replicas: ReplicaSet,
        index: CacheIndex,
        weights: Weights,
        *,
        wait_s: float,
        clock: Callable[[], float] = now,
    ):
        self.name, self.replicas = replicas.name, replicas
        replicas.joined.listener = self._tell_index
        self._index, self.weights, self._wait_s, self._clock = index, weights, wait_s, clock
        self._began, self._placed = clock(), 0
        #: Replica -> prompts given to it in the last COMING_S, of which the index may not know yet.
        self._coming: dict[str, list[BlockKeys]] = {}
        self._capacity: tuple[int, Mapping[str, ReplicaCapacity]] = (-1, {})

    def capacity(self) -> Mapping[str, ReplicaCapacity]:
        """The capacity of each replica that may get work. The same object while nothing has changed."""
        if self._capacity[0] != self.replicas.changes:
            has = {r.id: ReplicaCapacity(r.info.blocks_total, r.info.max_num_seqs) for r in self.replicas.usable()}
            self._capacity = (self.replicas.changes, has)
        return self._capacity[1]

    def overlaps(self, keys: BlockKeys) -> Mapping[str, int]:
        """Replica -> leading prompt tokens it has cached; those with none are left out."""
        return self._index.overlaps(self.name, keys)

    def kept(self) -> Mapping[str, KeptThere]:
        """Replica -> what it keeps."""
        return self._index.kept(self.name)

    async def choose(
        self,
        prompt_tokens: int,
        keys: BlockKeys,
        *,
        fits: Callable[[str], bool] = lambda replica: True,
        last_replica: str | None = None,
        without: Collection[str] = (),
    ) -> Placed:
        """Place one request of `prompt_tokens` tokens, on a replica that `fits` if there is one. If no replica may get work,
        waits for one and raises Unavailable after `wait_s`; the turn's deadline may end the wait earlier."""
        while not (replicas := self.replicas.usable(without)):
            await self._wait()
        self._placed += 1
        call = Call(prompt_tokens, last_replica, replicas[self._placed % len(replicas)].id)
        overlaps = self._with_what_is_coming(self.overlaps(keys), keys)
        candidates = [
            Candidate(r.id, overlaps.get(r.id, 0), r.total_queued_tokens, r.total_active, r.filled_tokens, fits(r.id))
            for r in shortlist(replicas, overlaps, call, fits)
        ]
        chosen = place(candidates, call, self.weights, self.name)
        cached = min(chosen.overlap_tokens, prompt_tokens)
        why = reason(chosen, candidates, self.weights)
        return Placed(self.replicas.members[chosen.replica], cached, prompt_tokens - cached, why)

    def most_cached(self, prompt_tokens: int, keys: BlockKeys, without: Collection[str] = ()) -> Placed | None:
        """The replica that holds most of a prompt, of those that may get work; None if none holds any of it."""
        usable, overlaps = self.replicas.usable(without), self.overlaps(keys)
        holding = [replica for replica in usable if overlaps.get(replica.id)]
        if not holding:
            return None
        chosen = max(holding, key=lambda replica: (overlaps[replica.id], -replica.total_active, replica.id))
        cached = min(overlaps[chosen.id], prompt_tokens)
        return Placed(chosen, cached, prompt_tokens - cached, "prefix")

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._wait_s):
                await self.replicas.wait_usable()
        except TimeoutError:
            raise Unavailable(f"no replica of {self.name} has been ready for {self._wait_s:g} s", fix="try again") from None

    def coming(self, placement: Placed, keys: BlockKeys) -> None:
        """Take note that the chosen replica is about to cache the prompt of these keys."""
        self._coming.setdefault(placement.replica.id, []).append(keys)
        asyncio.get_running_loop().call_later(COMING_S, self._has_come, placement.replica.id, keys)

    def computing(self, placement: Placed, tokens: int, keys: BlockKeys) -> AbstractContextManager[None]:
        """Count `tokens` of the prompt of `keys` as being computed on the chosen replica, which will cache the prompt."""
        self.coming(placement, keys)
        # Newer tokens weigh more, instead of older ones less, so that earlier sums need no update.
        weight = math.exp2(min((self._clock() - self._began) / FILL_HALF_LIFE_S, 1000.0))
        placement.replica.filled_tokens += tokens * weight
        return placement.replica.computing(tokens)

    @asynccontextmanager
    async def calling(self, placement: Placed) -> AsyncIterator[None]:
        """One call on the chosen replica. ReplicaLost is raised after it has been counted against the replica."""
        replica = placement.replica
        try:
            async with replica.call():
                yield
        except PrefixLost:
            raise
        except ReplicaLost as lost:
            self.replicas.failed(replica.id, lost.reason)
            raise
        except asyncio.CancelledError as error:
            if asyncio.current_task().cancelling():
                raise
            # The caller was not cancelled, and nobody else ends its calls (own_calls.py): the replica has ended this one.
            self.replicas.failed(replica.id, ResumeReason.GONE)
            raise ReplicaLost(f"replica {replica.id} of {self.name} dropped the call", reason=ResumeReason.GONE) from error
        except (*CALL_ERRORS, Unavailable) as error:
            reason = ResumeReason.UNAVAILABLE if isinstance(error, Unavailable) else ResumeReason.GONE
            self.replicas.failed(replica.id, reason)
            logger.warning("replica %s of %s: %s: %s", replica.id, self.name, type(error).__name__, error)
            # Ray's own text, which names processes and paths, is for the log only: this error may reach a client.
            why = error.message if isinstance(error, Unavailable) else "the call did not come through"
            raise ReplicaLost(f"replica {replica.id} of {self.name}: {why}", reason=reason) from error

    def _with_what_is_coming(self, overlaps: Mapping[str, int], keys: BlockKeys) -> Mapping[str, int]:
        """Count prompts that replicas have just been given as cached there, so that others with the same beginning follow."""
        if not self._coming:
            return overlaps
        known = dict(overlaps)
        for replica, prompts in self._coming.items():
            coming = max(prompt.shared_tokens(keys, self._index.block_size) for prompt in prompts)
            if coming > known.get(replica, 0):
                known[replica] = coming
        return known

    def _has_come(self, replica: str, keys: BlockKeys) -> None:
        prompts = self._coming[replica]
        prompts.remove(keys)
        if not prompts:
            del self._coming[replica]

    async def close(self) -> None:
        await self.replicas.stop()
        for replica in self.replicas.members:
            await self._index.remove(self.name, replica)

    async def _tell_index(self, replica: str, info: ReplicaInfo | None) -> None:
        if info is not None:
            await self._index.add(self.name, replica, info.kv_events)
        else:
            await self._index.remove(self.name, replica)
