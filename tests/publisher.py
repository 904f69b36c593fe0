"""A real publisher of KV events instead of an engine, and an index that follows it."""

import asyncio
import socket
import time

import zmq
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch

from prefillshare.kvshare.replica_info import KVEvents
from prefillshare.kvshare_vllm.engine.kv_events import KeptChanged, StatePublisher

BLOCK = 32


def tokens(n, salt=0):
    return [(7 + 13 * i + 101 * salt) % 40000 for i in range(n)]


def stored(ids, first, parent=None, salt=None, lora=None, lora_in_key=False):
    blocks = len(ids) // BLOCK
    keys = [((lora,) if lora_in_key else ()) + ((salt,) if salt and parent is None and i == 0 else ()) for i in range(blocks)]
    return BlockStored(
        block_hashes=list(range(first, first + blocks)),
        parent_block_hash=parent,
        token_ids=ids[: blocks * BLOCK],
        block_size=BLOCK,
        lora_id=1 if lora else None,
        medium="GPU",
        lora_name=lora,
        extra_keys=[k or None for k in keys],
        group_idx=0,
    )


def removed(*hashes):
    return BlockRemoved(block_hashes=list(hashes), medium="GPU", group_idx=0)


def kept(name, tokens, blocks, given_up=0, why=""):
    return KeptChanged(name, tokens, blocks, given_up, why)


class Engine:
    """A publisher in place of an engine."""

    def __init__(self):
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0))
            b.bind(("127.0.0.1", 0))
            ports = a.getsockname()[1], b.getsockname()[1]
        self.events = KVEvents(*(f"tcp://127.0.0.1:{port}" for port in ports))
        self.start()

    def start(self):
        deadline = time.monotonic() + 5
        while True:
            try:
                self._publisher = StatePublisher(0, self.events.endpoint, self.events.replay_endpoint)
                return
            except zmq.ZMQError:  # the previous one's socket is still closing
                assert time.monotonic() < deadline

    def tell(self, *events):
        self._publisher.publish(KVEventBatch(ts=time.time(), events=list(events)))

    def stop(self):
        self._publisher.shutdown()


async def becomes(index, keys, want, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while (found := index.overlaps("prefill", keys)) != want:
        assert time.monotonic() < deadline, f"the index says {found}, not {want}"
        await asyncio.sleep(0.02)


async def keeps(index, want, timeout_s=5.0):
    """`want`: name -> tokens that the replica keeps."""
    deadline = time.monotonic() + timeout_s
    while (found := index.kept("prefill")["one"].names) != want:
        assert time.monotonic() < deadline, f"the index says {found}, not {want}"
        await asyncio.sleep(0.02)
