"""KV events that an index can trust: they report what the prefix cache holds, and a router that missed some can catch up.

vLLM's publisher replays only its last N batches: a router that joins later, or follows an idle engine, never has the complete
state. Here:
 1. Every change of the cache is published with a sequence number (ZMQ PUB), as vLLM does.
 2. While nothing changes, an empty batch is sent every HEARTBEAT_S, so that a subscriber that missed the last change, or has
    just joined, sees the gap.
 3. A replay request (ZMQ ROUTER) is answered with the state instead of history: cleared, then every block now held, in parts
    of STATE_BLOCKS that all have the last sequence number. Its size is bounded by the cache, not by time.

What the engine keeps for somebody (kept_blocks.py) is published in the same way: an event of ours for each change, and in the
state.

A block's event has what the index needs: the tenant's salt (R7) on every block, though vLLM puts it only into the first
block's extra keys, and an adapter's name only if the block's key contains it (in sharing pools it does not, R5). Events carry
prompts' token ids: both sockets are for holders of the deployment's key only (kvshare/channel_keys.py).

Seam: vllm/distributed/kv_events.py, `EventPublisherFactory`; read by router/pools/kv_follower.py
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import zmq
from vllm.distributed.kv_events import (
    MEDIUM_GPU,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    EventPublisher,
    EventPublisherFactory,
    KVCacheEvent,
    KVEventBatch,
)

from prefillshare.kvshare import channel_keys

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
STATE_BLOCKS = 2048
END_SEQ = (-1).to_bytes(8, "big", signed=True)


class KeyedBlockStored(BlockStored, tag="BlockStored", kw_only=True):
    """vLLM's event with the salt the block's key was made with."""

    cache_salt: str | None = None


class KeptChanged(KVCacheEvent):
    """What is kept under a name is now the KV of `tokens` tokens; 0: nothing. `blocks`: kept under all names together.
    `given_up`: blocks that this change has given up, and `why` (kept_blocks.py)."""

    name: str
    tokens: int
    blocks: int
    given_up: int = 0
    why: str = ""


@dataclass(slots=True)
class _Held:
    """A key in the cache. vLLM may hold it in several blocks, and reports each block's arrival and removal."""

    parent: Any
    token_ids: array
    block_size: int
    medium: str | None
    adapter: str | None
    salt: str | None
    blocks: int = 1


class StatePublisher(EventPublisher):
    """`endpoint`, `replay_endpoint`: tcp://HOST:PORT to bind. Owns its thread; `shutdown` joins it."""

    def __init__(
        self,
        data_parallel_rank: int,
        endpoint: str,
        replay_endpoint: str,
        hwm: int = 100_000,
        max_queue_size: int = 100_000,
        topic: str = "",
        **_,
    ):
        super().__init__(data_parallel_rank)
        self._queue: queue.Queue[EventBatch | None] = queue.Queue(max_queue_size)
        # Counts what is in the queue, so that the thread can wait for it and for replay requests at once.
        self._queued = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._topic = topic.encode()
        self._held: dict[Any, _Held] = {}
        #: Name -> tokens that are kept under it; and the blocks kept under all names.
        self._kept: dict[str, int] = {}
        self._kept_blocks = 0
        self._sent_at = 0.0
        # Starts at the clock: an engine that restarts on this address continues with higher numbers, which shows as a gap.
        self._sequence = time.time_ns() // 1000
        self._encoder = msgspec.msgpack.Encoder()
        context = zmq.Context.instance()
        self._events, self._replays = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        self._events.set_hwm(hwm)
        for channel in (self._events, self._replays):
            channel_keys.protect(channel, server=True)
        try:
            self._events.bind(endpoint)
            self._replays.bind(replay_endpoint)
        except zmq.ZMQError:
            self._close()
            raise
        self._work_to_do = zmq.Poller()
        self._work_to_do.register(self._queued, zmq.POLLIN)
        self._work_to_do.register(self._replays, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, daemon=True, name="kv-events")
        self._thread.start()

    def publish(self, events: EventBatch) -> None:
        self._put(events)

    def shutdown(self) -> None:
        self._put(None)
        self._thread.join(timeout=5)
        self._close()

    def _put(self, batch: EventBatch | None) -> None:
        self._queue.put(batch)
        os.eventfd_write(self._queued, 1)

    def _close(self) -> None:
        closed, self._queued = self._queued, -1  # its number may soon be another file's
        os.close(closed)
        self._events.close(linger=0)
        self._replays.close(linger=0)

    def _run(self) -> None:
        while True:
            try:
                if not self._work():
                    return
            except Exception:
                # After any error the state may be wrong: it is cleared, and built anew from here on.
                logger.exception("KV events could not be told")
                self._forget()
                self._send([AllBlocksCleared()], time.time())

    def _work(self) -> bool:
        """Wait for one change, heartbeat or replay request and handle it; False at the end."""
        due_s = max(0.0, self._sent_at + HEARTBEAT_S - time.monotonic())
        ready = dict(self._work_to_do.poll(math.ceil(1000 * due_s)))
        if self._queued in ready:
            os.eventfd_read(self._queued)
            batch = self._queue.get_nowait()
            if batch is None:
                return False
            self._send([event for e in batch.events for event in self._apply(e)], batch.ts)
        elif time.monotonic() - self._sent_at >= HEARTBEAT_S:
            self._send([], time.time())
        while self._replays.poll(0):
            self._answer(self._replays.recv_multipart())
        return True

    def _send(self, events: list, timestamp: float) -> None:
        self._sequence += 1
        self._sent_at = time.monotonic()
        self._events.send_multipart((self._topic, self._sequence.to_bytes(8, "big"), self._encode(events, timestamp)))

    def _encode(self, events: list, timestamp: float) -> bytes:
        return self._encoder.encode(KVEventBatch(ts=timestamp, events=events, data_parallel_rank=self._data_parallel_rank))

    def _answer(self, frames: list[bytes]) -> None:
        if len(frames) != 3:
            logger.warning("Not a replay request: %d frames", len(frames))
            return
        client = frames[0]
        sequence = self._sequence.to_bytes(8, "big")
        kept = [KeptChanged(name, tokens, self._kept_blocks) for name, tokens in self._kept.items()]
        blocks, part = iter(self._held.items()), [AllBlocksCleared(), *kept]
        while part:
            self._replays.send_multipart((client, b"", self._topic, sequence, self._encode(part, time.time())))
            part = list(_told(islice(blocks, STATE_BLOCKS)))
        self._replays.send_multipart((client, b"", b"", END_SEQ, b""))

    def _forget(self) -> None:
        self._held.clear()
        self._kept.clear()
        self._kept_blocks = 0

    def _apply(self, event) -> list:
        """Fold one of vLLM's events into the state; returns what to publish for it."""
        if isinstance(event, AllBlocksCleared):
            self._forget()
            return [event]
        if isinstance(event, KeptChanged):
            self._kept[event.name], self._kept_blocks = event.tokens, event.blocks
            if not event.tokens:
                del self._kept[event.name]
            return [event]
        if event.medium not in (None, MEDIUM_GPU):
            return [event]
        if isinstance(event, BlockRemoved):
            gone = [key for key in event.block_hashes if self._let_go(key)]
            return [BlockRemoved(block_hashes=gone, medium=event.medium, group_idx=event.group_idx)] if gone else []
        stored, parent, size = [], event.parent_block_hash, event.block_size
        for number, key in enumerate(event.block_hashes):
            if held := self._held.get(key):
                held.blocks += 1
                parent = key
                continue
            keys = event.extra_keys[number] if event.extra_keys else None
            adapter, salt = _key_parts(keys, event.lora_name)
            if salt is None and parent in self._held:
                salt = self._held[parent].salt
            tokens = array("I", event.token_ids[number * size : (number + 1) * size])
            self._held[key] = held = _Held(parent, tokens, size, event.medium, adapter, salt)
            stored.append((key, held))
            parent = key
        return list(_told(stored))

    def _let_go(self, key) -> bool:
        """Count one block less that holds the key; True if none is left."""
        held = self._held.get(key)
        if held is None:
            return False
        held.blocks -= 1
        if not held.blocks:
            del self._held[key]
        return not held.blocks


def _told(blocks: Iterable[tuple[Any, _Held]]) -> Iterator[KeyedBlockStored]:
    """Events that report these blocks, one event per run of blocks in which each is the parent of the next."""
    told: KeyedBlockStored | None = None
    for key, held in blocks:
        made_with = (held.block_size, held.medium, held.adapter, held.salt)
        if told and (held.parent, *made_with) == (
            told.block_hashes[-1], told.block_size, told.medium, told.lora_name, told.cache_salt
        ):  # fmt: skip
            told.block_hashes.append(key)
            told.token_ids.extend(held.token_ids)
            continue
        if told:
            yield told
        told = KeyedBlockStored(
            block_hashes=[key],
            parent_block_hash=held.parent,
            token_ids=held.token_ids.tolist(),
            block_size=held.block_size,
            lora_id=None,
            medium=held.medium,
            lora_name=held.adapter,
            cache_salt=held.salt,
        )
    if told:
        yield told


def _key_parts(extra_keys, lora_name: str | None) -> tuple[str | None, str | None]:
    """(adapter, salt) of a block's extra keys: the adapter is first if the key contains it; the salt is among the others."""
    keys = list(extra_keys or ())
    adapter = keys.pop(0) if lora_name and keys and keys[0] == lora_name else None
    return adapter, next((key for key in keys if isinstance(key, str)), None)


def register() -> None:
    """Have engines of this process publish through us. Repeating it is harmless."""
    EventPublisherFactory._registry["zmq"] = StatePublisher
