"""Which replica holds which prefix: Dynamo's radix tree, one per pool, fed by the engines' KV events.

Every router replica has its own index. A lookup does not wait and takes tens of microseconds; changes of the engines' caches
are applied between lookups (router/pools/kv_follower.py).

Seam: dynamo.llm.RadixTree
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from prefillshare.kvshare.replica_info import KVEvents
from prefillshare.router.pools.kv_follower import AllBlocksCleared, BlockRemoved, BlockStored, Event, Follower, KeptChanged

os.environ.setdefault("DYN_LOG", "error")  # read when the library starts

from dynamo.llm import RadixTree, compute_block_hash_for_seq

logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode
#: Where blocks are that an engine reads in place: vLLM says "GPU", on CPUs too. Blocks elsewhere have been offloaded.
DEVICE = (None, "GPU")


class BlockKeys:
    """The keys of a prompt's full blocks, as used by the index. Made once per turn, used for every pool."""

    __slots__ = ("hashes", "tokens")

    def __init__(self, token_ids: Sequence[int], block_size: int, *, salt: str | None = None, adapter: str | None = None):
        self.tokens = len(token_ids)
        tokens = token_ids if isinstance(token_ids, list) else list(token_ids)
        self.hashes: list[int] = compute_block_hash_for_seq(tokens, block_size, lora_name=adapter, cache_namespace=salt)

    def shared_tokens(self, other: BlockKeys, block_size: int) -> int:
        """Number of leading tokens that both prompts have in equal full blocks."""
        blocks = 0
        for mine, others in zip(self.hashes, other.hashes, strict=False):
            if mine != others:
                break
            blocks += 1
        return blocks * block_size


@dataclass
class KeptThere:
    """What a replica keeps. `names`: name -> tokens. `blocks`: under all names."""

    names: dict[str, int] = field(default_factory=dict)
    blocks: int = 0


class CacheIndex:
    """Predicts how much of a prompt each replica of a pool has cached, and what replicas keep. Not thread-safe: one event loop.

    `on_given_up` is called with a pool, why one of its replicas gave up kept blocks, and how many.
    """

    def __init__(self, block_size: int, on_given_up: Callable[[str, str, int], None] = lambda pool, why, blocks: None):
        self.block_size, self._on_given_up = block_size, on_given_up
        self._pools: dict[str, _PoolIndex] = {}
        self._followers: dict[tuple[str, str], Follower] = {}

    async def add(self, pool: str, replica: str, events: KVEvents) -> None:
        """Follow a replica; what it held before is forgotten."""
        await self.remove(pool, replica)
        index = self._pools.setdefault(pool, _PoolIndex(self.block_size, partial(self._on_given_up, pool)))
        follower = self._followers[pool, replica] = Follower(replica, events, partial(index.apply, index.open(replica)))
        follower.start()

    async def remove(self, pool: str, replica: str) -> None:
        if follower := self._followers.pop((pool, replica), None):
            await follower.stop()
            self._pools[pool].close(replica)

    def overlaps(self, pool: str, keys: BlockKeys) -> dict[str, int]:
        """Replica -> leading prompt tokens it has cached, full blocks only; replicas with none are left out."""
        index = self._pools.get(pool)
        return index.overlaps(keys) if index and keys.hashes else {}

    def kept(self, pool: str) -> Mapping[str, KeptThere]:
        """Replica -> what it keeps."""
        index = self._pools.get(pool)
        return index.kept if index else {}

    async def close(self) -> None:
        for pool, replica in list(self._followers):
            await self.remove(pool, replica)


class _PoolIndex:
    def __init__(self, block_size: int, on_given_up: Callable[[str, int], None]):
        self._block_size, self._on_given_up = block_size, on_given_up
        self._tree = RadixTree()
        self._replicas: dict[int, str] = {}
        self.kept: dict[str, KeptThere] = {}
        self._number = 0

    def open(self, replica: str) -> int:
        worker = _worker_id(replica)
        self._replicas[worker] = replica
        self.kept[replica] = KeptThere()
        return worker

    def close(self, replica: str) -> None:
        worker = _worker_id(replica)
        del self._replicas[worker], self.kept[replica]
        self._tree.remove_worker(worker)

    def apply(self, worker: int, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self._tree.clear_all_blocks(worker)
                self.kept[self._replicas[worker]] = KeptThere()
            elif isinstance(event, KeptChanged):
                self._keep(self.kept[self._replicas[worker]], event)
            elif event.medium in DEVICE:
                self._change(worker, event)

    def _keep(self, there: KeptThere, event: KeptChanged) -> None:
        there.blocks = event.blocks
        if event.tokens:
            there.names[event.name] = event.tokens
        else:
            there.names.pop(event.name, None)
        if event.given_up:
            self._on_given_up(event.why, event.given_up)

    def _change(self, worker: int, event: BlockStored | BlockRemoved) -> None:
        stored = isinstance(event, BlockStored)
        data = {"stored": self._stored(event)} if stored else {"removed": {"block_hashes": [*map(_u64, event.block_hashes)]}}
        self._number += 1
        try:
            self._tree.apply_event(worker, _encode({"event_id": self._number, "data": data, "dp_rank": 0}))
        except RuntimeError as error:
            # The tree does not know the block, or its parent, under this worker: no prompt leads to it.
            logger.debug("replica %s: %s", self._replicas.get(worker), error)

    def _stored(self, event: BlockStored) -> dict:
        if event.block_size != self._block_size:
            raise ValueError(f"a block of {event.block_size} tokens in a deployment with blocks of {self._block_size}")
        keys = BlockKeys(event.token_ids, self._block_size, salt=event.cache_salt, adapter=event.lora_name)
        blocks = zip(event.block_hashes, keys.hashes, strict=True)
        return {
            "parent_hash": None if event.parent_block_hash is None else _u64(event.parent_block_hash),
            "blocks": [{"block_hash": _u64(key), "tokens_hash": hashed} for key, hashed in blocks],
        }

    def overlaps(self, keys: BlockKeys) -> dict[str, int]:
        scores = self._tree.find_matches(keys.hashes).scores
        return {self._replicas[worker]: blocks * self._block_size for (worker, _), blocks in scores.items()}


def _worker_id(replica: str) -> int:
    return int.from_bytes(hashlib.blake2b(replica.encode(), digest_size=8).digest(), "big") >> 1


def _u64(key: int | bytes) -> int:
    return key & 0xFFFF_FFFF_FFFF_FFFF if isinstance(key, int) else int.from_bytes(key[-8:], "big")
