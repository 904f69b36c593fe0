"""Follows one replica's KV events, so that the index matches what the replica has cached.

Wire format: vllm/distributed/kv_events.py, with the block's salt (kvshare_vllm/engine/kv_events.py). Batches are numbered.
At first, and after a gap, the whole state is asked for; batches that it already covers are then skipped by their number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from prefillshare.kvshare import channel_keys
from prefillshare.kvshare.replica_info import KVEvents

logger = logging.getLogger(__name__)

STATE_TIMEOUT_S = 30.0
RETRY_S = 1.0


class BlockStored(msgspec.Struct, tag=True, gc=False):
    """Consecutive full blocks, each the parent of the next."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_name: str | None = None
    cache_salt: str | None = None
    medium: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, gc=False):
    block_hashes: list[int | bytes]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    pass


class KeptChanged(msgspec.Struct, tag=True, gc=False):
    """What the replica keeps under a name (kvshare_vllm/engine/kv_events.py)."""

    name: str
    tokens: int
    blocks: int
    given_up: int = 0
    why: str = ""


Event = BlockStored | BlockRemoved | AllBlocksCleared | KeptChanged


class EventBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[Event]
    data_parallel_rank: Any = None


class Follower:
    """`apply` is called with events in order. Owns its task and sockets from `start` to `stop`."""

    def __init__(self, replica: str, events: KVEvents, apply: Callable[[list[Event]], None]):
        self._replica, self._events, self._apply = replica, events, apply
        self._decode = msgspec.msgpack.Decoder(EventBatch).decode
        #: Number of the last batch that has been applied; None: the state has to be asked for.
        self._known: int | None = None
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            try:
                await self._read()
            except Exception:  # whatever it was: start again with the whole state
                logger.exception("replica %s: its KV events could not be followed", self._replica)
                self._known = None
                await asyncio.sleep(RETRY_S)

    async def _read(self) -> None:
        with zmq.asyncio.Context.instance().socket(zmq.SUB) as stream:
            stream.set_hwm(0)
            stream.linger = 0
            stream.subscribe(b"")
            channel_keys.protect(stream, server=False).connect(self._events.endpoint)
            if self._events.replay_endpoint:
                await self._learn_state()
            while True:
                _, number, payload = await stream.recv_multipart()
                await self._take(int.from_bytes(number, "big"), payload)

    async def _take(self, number: int, payload: bytes) -> None:
        if self._known is not None and number <= self._known:
            return
        gap = self._known is None or number != self._known + 1
        if gap and self._events.replay_endpoint:
            await self._learn_state()
            return
        await self._learn(number, payload)

    async def _learn(self, number: int, payload: bytes) -> None:
        self._apply(self._decode(payload).events)
        self._known = number
        await asyncio.sleep(0)  # reading from ZMQ does not yield while there is more

    async def _learn_state(self) -> None:
        """Ask for the whole state until the replica answers."""
        while True:
            try:
                async with asyncio.timeout(STATE_TIMEOUT_S):
                    return await self._ask_state()
            except TimeoutError:
                logger.warning("replica %s does not tell what it has cached; asked again", self._replica)

    async def _ask_state(self) -> None:
        with zmq.asyncio.Context.instance().socket(zmq.DEALER) as questions:
            questions.linger = 0
            channel_keys.protect(questions, server=False).connect(self._events.replay_endpoint)
            await questions.send_multipart((b"", (0).to_bytes(8, "big")))
            while True:
                *_, number, payload = await questions.recv_multipart()
                if not payload:
                    return
                await self._learn(int.from_bytes(number, "big"), payload)
