"""What an engine replica tells routers of itself: once what it is, and again and again how it fares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVEvents:
    """Where an engine tells what enters and leaves its prefix cache: tcp://HOST:PORT of the stream and of replays."""

    endpoint: str
    replay_endpoint: str


@dataclass(frozen=True)
class ReplicaInfo:
    """What does not change while a replica lives."""

    replica: str
    kv_events: KVEvents
    blocks_total: int
    block_size: int
    max_num_seqs: int
    #: Where its process is, for logs and operators.
    node: str = ""
    pid: int = 0


@dataclass(frozen=True)
class ReplicaStats:
    """How a replica fares now, over all routers that use it."""

    #: Calls accepted and not ended, and of prefill calls the prompt tokens still to be computed.
    active: int = 0
    queued_tokens: int = 0
    #: The engine's own view: sequences in its batch and in its queue.
    running: int = 0
    waiting: int = 0
    #: Blocks held by requests or leases, of `blocks_total`; cached blocks that nobody holds count as free.
    blocks_used: int = 0
    blocks_total: int = 0
    preemptions: int = 0
    #: Seconds since the engine's last step while calls were waiting for it; 0 where none is.
    stalled_s: float = 0.0
