"""All pools of a deployment, and how they change while turns run.

`adopt` brings the pools in line with a deployment: new pools are waited for before anything is sent to them. Pools that the
deployment no longer has are closed by `forget`, after the last turn that was sent there has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import asdict

from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.engine_settings import SHARED_PREFILL, own_prefill
from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.modes import get_mode
from prefillshare.kvshare.replica_info import ReplicaStats
from prefillshare.router.background import Background
from prefillshare.router.pools.cache_index import BlockKeys, CacheIndex
from prefillshare.router.pools.placement import Weights, both, weights
from prefillshare.router.pools.pool import Pool
from prefillshare.router.pools.replicas import ReplicaSet
from prefillshare.router.pools.route import Route

BLOCKS: Mapping[str, Callable[[ReplicaStats], int]] = {
    "used": lambda stats: stats.blocks_used,
    "total": lambda stats: stats.blocks_total,
}


def _sources(deployment: Deployment) -> dict[str, str | None]:
    """Decode pool -> the pool that makes the KV of its prompts, or None if its own engines do."""
    shared = SHARED_PREFILL if deployment.shared_prefill else None
    return {
        pool.pool: shared if get_mode(pool.sharing).shares_prefill else own_prefill(pool.pool) for pool in deployment.decode
    }


class Fleet:
    """`handle_of`: name of a Serve deployment -> its handle."""

    def __init__(self, block_size: int, handle_of: Callable[[str], object], metrics: Metrics):
        self._index = CacheIndex(block_size, self._given_up)
        self._handle_of, self._metrics, self._background = handle_of, metrics, Background(metrics)
        self.pools: dict[str, Pool] = {}
        self._routes: dict[str, Route] = {}
        #: The pools whose engines keep contexts that are to be kept: those that make the KV which all sharing decoders use.
        self.keepers: tuple[Pool, ...] = ()

    async def adopt(self, deployment: Deployment) -> dict[str, Route]:
        """Decode pool -> where its turns go. Raises Unavailable if a new pool has no replica in time."""
        for_prefill, for_decode = weights(deployment.router.placement)
        sources, wanted = _sources(deployment), dict[str, Weights]()
        for decode, prefill in sources.items():
            if prefill:
                wanted |= {decode: for_decode, prefill: for_prefill}
            else:
                wanted[decode] = both(for_prefill, for_decode)
        new = {name: self._open(name, deployment) for name in wanted.keys() - self.pools.keys()}
        try:
            await asyncio.gather(*(pool.replicas.start(deployment.cluster.start_timeout_s) for pool in new.values()))
        except BaseException:
            await asyncio.gather(*(pool.replicas.stop() for pool in new.values()))
            raise
        self.pools |= new
        for name, pool in new.items():
            self._count(name, pool.replicas)
        for name, weight in wanted.items():
            self.pools[name].weights = weight
        holders = tuple(self.pools[pool.pool] for pool in deployment.decode if pool.makes_base_kv)
        in_place = {pool.pool for pool in deployment.decode if pool.prefill_policy in ("auto", "always")}
        self._routes = {
            decode: Route(self.pools[decode], self.pools.get(prefill), holders, decode in in_place)
            for decode, prefill in sources.items()
        }
        shared = tuple(filter(None, (self.pools.get(SHARED_PREFILL),))) if SHARED_PREFILL in sources.values() else ()
        self.keepers = shared + (tuple(pool for pool in holders if pool.name in in_place) if shared else holders)
        return self._routes

    def keeper(self, keys: BlockKeys) -> Pool:
        """The pool that is to keep a context: that which holds most of it; the prefill pool before others. Raises Unavailable
        if no pool shares KV."""
        if self.keepers:
            return max(self.keepers, key=lambda pool: max(pool.overlaps(keys).values(), default=0))
        raise Unavailable("no pool of this deployment shares KV", fix="keep nothing, or serve a pool in a mode that shares")

    def maker_ahead(self, decode: str, keys: BlockKeys) -> Pool:
        """As Route.maker_ahead, for this decode pool. Raises Unavailable if the decode pool is no longer served."""
        if route := self._routes.get(decode):
            return route.maker_ahead(keys)
        raise Unavailable(f"pool {decode!r} is not served any more", fix="use another decoder")

    def shared_prefill(self) -> Pool:
        """The pool that all sharing decoders draw on. Raises Unavailable if there is none, or no longer one."""
        if pool := self.pools.get(SHARED_PREFILL):
            return pool
        raise Unavailable("there is no shared prefill pool", fix="add one to the deployment (prefill.replicas)")

    async def adapter_problems(self, deployment: Deployment, of_all: bool = False) -> dict[str, str]:
        """Adapters of the deployment that some replica of the pools known here cannot serve -> the reason. To be called before
        turns that need them are sent: Ray Serve tells engines and routers of a change in any order, and may be replacing
        engines. `of_all`: all replicas of the deployment run already, and all of them must answer."""
        timeout_s = deployment.cluster.start_timeout_s
        asked = [
            self.pools[name].replicas.adapter_problems(pool.adapters, timeout_s, engines.fewest_replicas if of_all else 1)
            for pool in deployment.decode
            for name, engines in ((pool.pool, pool), (own_prefill(pool.pool), pool.own_prefill()))
            if pool.adapters and name in self.pools
        ]
        problems: dict[str, str] = {}
        for found in await asyncio.gather(*asked):
            problems |= found
        return problems

    async def stats_now(self) -> dict[str, dict[str, dict[str, float]]]:
        """Pool -> replica -> current figures, for the replicas that answer."""
        pools = dict(self.pools)  # they may change meanwhile
        told = await asyncio.gather(*(pool.replicas.stats_now() for pool in pools.values()))
        return {
            name: {replica: asdict(stats) for replica, stats in one.items()} for name, one in zip(pools, told, strict=True)
        }

    def info(self) -> dict[str, dict[str, dict[str, object]]]:
        """Pool -> replica -> what it is, and whether it may get work."""
        return {
            name: {
                r.id: asdict(r.info) | {"usable": r.health.usable, "reason": r.health.reason}
                for r in pool.replicas.members.values()
            }
            for name, pool in self.pools.items()
        }

    def replica_ids(self) -> set[str]:
        """Of all pools."""
        return {replica for pool in tuple(self.pools.values()) for replica in tuple(pool.replicas.members)}

    async def forget(self, deployment: Deployment) -> None:
        """Close pools the deployment no longer has. Turns that were sent there end as they would have anyway."""
        sources = _sources(deployment)
        gone = self.pools.keys() - sources.keys() - set(sources.values())
        for name in gone:
            await self.pools.pop(name).close()
        self._metrics.forget(pools=gone)

    def _given_up(self, pool: str, why: str, blocks: int) -> None:
        self._metrics["kept_given_up_blocks_total"].labels(pool, why).inc(blocks)

    def _open(self, name: str, deployment: Deployment) -> Pool:
        router = deployment.router
        replicas = ReplicaSet(name, self._handle_of(name), router.wedged_after_s, self._background)
        return Pool(replicas, self._index, {}, wait_s=router.replica_wait_s)

    def _count(self, name: str, replicas: ReplicaSet) -> None:
        for state, usable in (("usable", True), ("ejected", False)):
            self._metrics["replicas"].labels(name, state).set_function(
                lambda usable=usable: sum(r.health.usable is usable for r in tuple(replicas.members.values()))
            )
        for state, blocks in BLOCKS.items():
            self._metrics["kv_blocks"].labels(name, state).set_function(
                lambda blocks=blocks: sum(blocks(r.stats) for r in tuple(replicas.members.values()))
            )
        self._metrics["kept_blocks"].labels(name).set_function(
            lambda: sum(there.blocks for there in tuple(self._index.kept(name).values()))
        )

    async def stop(self) -> None:
        for pool in self.pools.values():
            await pool.close()
        await self._index.close()
