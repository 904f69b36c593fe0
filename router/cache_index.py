"""Which replica holds which prefix: Dynamo's prefix index, fed by the engines' KV events.

One index per router replica. An engine publishes what enters and leaves its prefix cache (kvshare_vllm/kv_events.py);
the index subscribes in a thread of its own and asks for the whole state when it has missed something.

Seam: dynamo.llm.SelectionService
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence

from kvshare.replica_info import KVEvents

os.environ.setdefault("DYN_LOG", "error")  # read when the library starts

from dynamo.llm import SelectionService, compute_block_hash_for_seq

_MODEL = "prefillshare"


class BlockKeys:
    """The keys of a prompt's full blocks, as the index has them: made once per turn, used for every pool."""

    __slots__ = ("hashes", "tokens")

    def __init__(self, token_ids: Sequence[int], block_size: int, *, salt: str | None = None, adapter: str | None = None):
        self.tokens = len(token_ids)
        keys = compute_block_hash_for_seq(list(token_ids), block_size, lora_name=adapter, cache_namespace=salt)
        self.hashes = array("q", array("Q", keys).tobytes()).tolist()  # the service takes them as signed numbers

    def shared_tokens(self, other: BlockKeys, block_size: int) -> int:
        """Leading tokens both prompts have in the same full blocks."""
        blocks = 0
        for mine, others in zip(self.hashes, other.hashes, strict=False):
            if mine != others:
                break
            blocks += 1
        return blocks * block_size


class CacheIndex:
    """Predicts how much of a prompt each replica of a pool has cached. Not thread-safe: one event loop."""

    def __init__(self, block_size: int, threads: int = 1):
        self.block_size = block_size
        self._service = SelectionService(indexer_threads=threads)
        self._replicas: dict[str, dict[int, str]] = {}

    async def add(self, pool: str, replica: str, events: KVEvents) -> None:
        worker = _worker_id(replica)
        await self._service.upsert_worker({
            "worker_id": worker,
            "model_name": _MODEL,
            "routing_group": pool,
            "endpoint": f"ray://{replica}",
            "block_size": self.block_size,
            "data_parallel_start_rank": 0,
            "data_parallel_size": 1,
            "kv_events_endpoints": {0: events.endpoint},
            "replay_endpoint": events.replay_endpoint,
        })  # fmt: skip
        self._replicas.setdefault(pool, {})[worker] = replica

    async def remove(self, pool: str, replica: str) -> None:
        worker = _worker_id(replica)
        if self._replicas.get(pool, {}).pop(worker, None) is not None:
            await self._service.delete_worker(worker)

    async def overlaps(self, pool: str, keys: BlockKeys) -> dict[str, int]:
        """Replica -> leading prompt tokens it has cached, full blocks only; replicas with none are left out."""
        replicas = self._replicas.get(pool)
        if not replicas or not keys.hashes:
            return {}
        # Sequence hashes serve the service's own load model, which this system does not use.
        answer = await self._service.overlap_scores({
            "model_name": _MODEL,
            "routing_group": pool,
            "block_hashes": keys.hashes,
            "sequence_hashes": keys.hashes,
            "isl_tokens": keys.tokens,
        })  # fmt: skip
        return {
            replicas[w["worker_id"]]: w["device_blocks"] * self.block_size
            for w in answer["workers"]
            if w["device_blocks"] and w["worker_id"] in replicas
        }

    def close(self) -> None:
        self._service.shutdown()


def _worker_id(replica: str) -> int:
    return int.from_bytes(hashlib.blake2b(replica.encode(), digest_size=8).digest(), "big") >> 1
