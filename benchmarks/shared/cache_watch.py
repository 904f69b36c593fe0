"""What the prefix caches of a running deployment hold, and what they have evicted: from its engines' KV events."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

from prefillshare.kvshare import channel_keys
from prefillshare.kvshare.replica_info import KVEvents
from prefillshare.kvshare_vllm.engine.ray_node import channel_secret
from prefillshare.router.pools.kv_follower import BlockRemoved, BlockStored, Event, Follower

#: Seconds until a cache's whole state has arrived.
STATE_S = 2.0


class CacheWatch:
    """Follows KV events from `start` to `stop`. `held`: pool -> blocks in its engines' caches. `evicted`: pool -> blocks
    evicted meanwhile. `wanted`: pool -> blocks that would be in the caches if none had been evicted."""

    def __init__(self, handle):
        if secret := channel_secret():
            channel_keys.use(secret)
        self._replicas = [
            (pool, KVEvents(**info["kv_events"]))
            for pool, found in handle.replica_info.remote().result(timeout_s=30).items()
            for info in found.values()
        ]
        self._held: dict[str, set] = {pool: set() for pool, _ in self._replicas}
        self._stored: dict[str, set] = {pool: set() for pool in self._held}
        self.evicted: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._followers: list[Follower] = []

    @property
    def held(self) -> dict[str, int]:
        return {pool: len(keys) for pool, keys in self._held.items()}

    @property
    def wanted(self) -> dict[str, int]:
        return {pool: len(keys) for pool, keys in self._stored.items()}

    def __enter__(self) -> CacheWatch:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(timeout=30)
        return self

    def __exit__(self, *_) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    async def _start(self) -> None:
        self._followers = [Follower(pool, events, self._following(pool)) for pool, events in self._replicas]
        for follower in self._followers:
            follower.start()
        await asyncio.sleep(STATE_S)

    async def _stop(self) -> None:
        for follower in self._followers:
            await follower.stop()

    def _following(self, pool: str):
        held = self._held[pool]

        def apply(events: list[Event]) -> None:
            for event in events:
                keys = {(hash_, event.medium) for hash_ in getattr(event, "block_hashes", ())}
                if isinstance(event, BlockStored):
                    held.update(keys)
                    self._stored[pool].update(keys)
                elif isinstance(event, BlockRemoved):
                    self.evicted[pool] += len(keys)
                    held.difference_update(keys)
                else:
                    held.clear()

        return apply
