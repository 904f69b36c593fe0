"""What an engine replica tells routers about itself: once what it is, and regularly how it is doing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVEvents:
    """Where an engine publishes what enters and leaves its prefix cache: tcp://HOST:PORT of the stream and of replays.

    Without replays, a subscriber never learns what it has missed.
    """

    endpoint: str
    replay_endpoint: str | None


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
    """Current figures of a replica, over all routers that use it."""

    #: Calls accepted and not ended, and the prompt tokens that prefill calls have still to compute.
    active: int = 0
    queued_tokens: int = 0
    #: The engine's own view: sequences in its batch and in its queue.
    running: int = 0
    waiting: int = 0
    #: Blocks held by requests or leases, of `blocks_total`; cached blocks that nobody holds count as free.
    blocks_used: int = 0
    blocks_total: int = 0
    preemptions: int = 0
    #: Seconds since the engine's last step while calls were waiting for it; 0 if no call waits.
    stalled_s: float = 0.0
