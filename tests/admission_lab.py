"""Admission on virtual time, with a simple model of engines: a prefill replica that works in order, and decode replicas whose
blocks run out. A decode replica that has no block left gives back the turn that asks for one, as our engines do (R3)."""

import asyncio
from collections import Counter

from prometheus_client import CollectorRegistry
from virtual_time import clock

from prefillshare.kvshare.config import Router
from prefillshare.kvshare.errors import Overloaded
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.admission.admission import Admission, PoolSource
from prefillshare.router.admission.decode_room import ReplicaCapacity
from prefillshare.router.admission.grant import Demand

BLOCK = 16
STEP_TOKENS = 32


class Lab:
    """`pools`: name -> {replica: (blocks, sequences)}; all draw on one prefill pool, unless `prefill` names another."""

    def __init__(self, pools=None, prefill=None, prefill_replicas=1, **router):
        pools = pools or {"agents": {"d0": (100, 8)}}
        self.capacity = {}
        for pool, replicas in pools.items():
            self.set_replicas(pool, replicas)
        self.prefill_replicas = prefill_replicas
        self.registry = CollectorRegistry()
        sources = {
            pool: PoolSource(
                lambda pool=pool: self.capacity[pool], (prefill or {}).get(pool, "prefill"), lambda: self.prefill_replicas
            )
            for pool in pools
        }
        self.admission = Admission(Router(**router), BLOCK, sources, Metrics(self.registry), clock)
        self.used: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.resumes = 0
        self.started: list = []
        self.asked: list[asyncio.Task] = []
        self.finished: list[Demand] = []
        self._prefilling = asyncio.Lock()

    def set_replicas(self, pool, replicas):
        self.capacity[pool] = {name: ReplicaCapacity(*has) for name, has in replicas.items()}

    def ask(self, blocks, name=None, *, pool="agents", prefill_tokens=0, **demand) -> asyncio.Task:
        """A turn of `blocks` blocks (one of them for output) that appends `name` to `started` when it has its grant."""

        async def turn():
            prompt = (blocks - 1) * BLOCK
            asked = Demand(pool, prompt, prompt - prefill_tokens, max_tokens=BLOCK, **demand)
            grant = await self.admission.admit(asked)
            self.started.append(name)
            return grant

        self.asked.append(asyncio.create_task(turn()))
        return self.asked[-1]

    def metric(self, name, **labels):
        return self.registry.get_sample_value(f"prefillshare_{name}", labels)

    def refused(self, reason, pool="agents"):
        return self.metric("turns_refused_total", pool=pool, reason=reason) or 0

    def assert_no_reservation_exceeds_capacity(self, pool="agents"):
        for replica, (blocks, turns) in self.admission.held(pool).items():
            if has := self.capacity[pool].get(replica):  # else the replica is gone, with its turns
                assert blocks <= has.blocks, replica
                assert turns <= has.sequences, replica

    def assert_nothing_is_left(self):
        for pool in self.capacity:
            assert self.admission.waiting(pool) == 0
            assert dict(self.admission.held(pool)) == {}
            assert self.metric("turns_waiting", pool=pool) in (0, None)
            expected = {replica: has.blocks for replica, has in self.capacity[pool].items()}
            assert dict(self.admission.room(pool)) == expected
        assert self.admission.queued_prefill_tokens("prefill") == 0
        assert self.admission.in_progress == 0

    async def turn(self, demand: Demand, output_tokens: int, deadline_s: float, prefill_per_s=20_000, decode_per_s=50):
        """One whole turn; counted in `ended` as good, late or refused."""
        began = clock()
        try:
            with await self.admission.admit(demand) as grant:
                async with self._prefilling:
                    await asyncio.sleep((demand.prompt_tokens - demand.cached_tokens) / prefill_per_s)
                grant.prefill_done()
                done = 0
                while (done := await self._decode(grant, done, output_tokens, decode_per_s)) < output_tokens:
                    self.resumes += 1
                    await grant.readmit(done)
        except Overloaded:
            self.ended["refused"] += 1
            return
        self.ended["good" if clock() - began <= deadline_s else "late"] += 1
        self.finished.append(demand)

    async def _decode(self, grant, done, output_tokens, per_s) -> int:
        """Returns the number of tokens generated when the turn ended or was given back."""
        room, pool = self.admission.room(grant.demand.pool), self.capacity[grant.demand.pool]
        replica = max((name for name in pool if grant.fits(name)), key=lambda name: (room.get(name, 0), name))
        grant.on(replica)
        mine = 0
        try:
            while True:
                needed = self.admission.blocks_for(grant.demand.prompt_tokens + done)
                if self.used[replica] + needed - mine > pool[replica].blocks:
                    return done
                self.used[replica] += needed - mine
                mine = needed
                if done >= output_tokens:
                    return done
                await asyncio.sleep(STEP_TOKENS / per_s)
                done += STEP_TOKENS
                grant.grow_to(done)
        finally:
            self.used[replica] -= mine
