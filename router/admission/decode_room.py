"""KV blocks and sequences of one decode pool: what its replicas have, what is reserved, where there is room."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from prefillshare.router.admission.lazy_heap import LazyHeap


@dataclass(frozen=True)
class ReplicaCapacity:
    """What one decode replica has: KV blocks that requests can use (without vLLM's null block), and sequences."""

    blocks: int
    sequences: int


#: Returns the current replicas. It must return the same, unmodified mapping while nothing has changed: it is called on every
#: event, and its results are compared by identity.
Capacity = Callable[[], Mapping[str, ReplicaCapacity]]


class DecodeRoom:
    """Reservations outlive a replica that is gone: they count again if it comes back while their turns still run."""

    def __init__(self, capacity: Capacity):
        self._capacity = capacity
        self._known: Mapping[str, ReplicaCapacity] = {}
        self._held: dict[str, tuple[int, int]] = {}  # blocks, turns
        self._free: dict[str, int] = {}
        self._by_room: LazyHeap[str] = LazyHeap()
        #: Free blocks per replica with a free sequence. Negative where running turns have outgrown the replica.
        self.free: Mapping[str, int] = MappingProxyType(self._free)
        #: Over all replicas.
        self.free_blocks = self.free_sequences = 0
        #: Blocks of the largest replica.
        self.largest = 0

    @property
    def replicas(self) -> int:
        return len(self._known)

    @property
    def held(self) -> Mapping[str, tuple[int, int]]:
        """Replica -> (blocks, turns) reserved on it, where there are any; includes replicas that are gone."""
        return MappingProxyType(self._held)

    def refresh(self) -> bool:
        """Look at the replicas again. True if there was a change."""
        known = self._capacity()
        if known is self._known:
            return False
        gone, self._known = self._known.keys() - known.keys(), known
        self.largest = max((has.blocks for has in known.values()), default=0)
        held = [self._held.get(replica, (0, 0)) for replica in known]
        self.free_blocks = sum(has.blocks for has in known.values()) - sum(blocks for blocks, _ in held)
        self.free_sequences = sum(has.sequences for has in known.values()) - sum(turns for _, turns in held)
        for replica in [*gone, *known]:
            self._show(replica)
        return True

    def change(self, replica: str, blocks: int, turns: int) -> None:
        """Reserve (positive) or give back (negative) on one replica."""
        held_blocks, held_turns = self._held.get(replica, (0, 0))
        now = (held_blocks + blocks, held_turns + turns)
        if any(now):
            self._held[replica] = now
        else:
            self._held.pop(replica, None)
        if replica in self._known:
            self.free_blocks -= blocks
            self.free_sequences -= turns
        self._show(replica)

    def __contains__(self, replica: str) -> bool:
        return replica in self._known

    def fits(self, replica: str, blocks: int) -> bool:
        return self._free.get(replica, -1) >= blocks

    def find(self, blocks: int, *, but_the_emptiest: bool = False) -> str | None:
        """The replica with most free blocks, or second most with `but_the_emptiest`; None if it has fewer than `blocks`."""
        replica = self._by_room.first()
        if but_the_emptiest and replica is not None:
            replica = self._by_room.first(besides=replica)
        return replica if replica is not None and self._free[replica] >= blocks else None

    def _show(self, replica: str) -> None:
        has, (blocks, turns) = self._known.get(replica), self._held.get(replica, (0, 0))
        if has is None or turns >= has.sequences:
            self._free.pop(replica, None)
            self._by_room.discard(replica)
        elif self._free.get(replica) != has.blocks - blocks:
            self._free[replica] = has.blocks - blocks
            self._by_room.put(replica, blocks - has.blocks)
