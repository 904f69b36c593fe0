"""Blocks that the prefix cache keeps for somebody: the free queue of vLLM's block pool, in which they come last.

A kept block that no request holds is free like any other cached block. It counts as free, a request that finds its content
takes it out of the queue, and no request ever waits for it. Only the order in which free blocks are used again differs:
 1. Blocks that nobody keeps go first, as vLLM orders them: the least recently used one first.
 2. When these do not suffice, kept ones are given up: those of the lowest priority first, of these the ones whose time ends
    soonest, and of what is kept under one name the last block first.

What is kept under several names (prompts with the same beginning) is given up with the last of them.

Kept blocks are not held by a further reference (`BlockPool.touch`), because vLLM's admission counts blocks with references as
in use: it would then admit requests for which there is no room, or refuse others for which there is.

Seam: vllm/v1/core/block_pool.py (`free_block_queue`), vllm/v1/core/kv_cache_utils.py (FreeKVCacheBlockQueue)
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

#: Why blocks are kept no longer: requests needed the room, their time was over, their owner let them go, or their content is no
#: longer in the prefix cache.
PRESSURE, EXPIRED, LET_GO, GONE = "pressure", "expired", "let_go", "gone"


@dataclass(eq=False)
class _Kept:
    """What is kept under one name. `blocks`: in the order of the prompt, each with the number of tokens up to its end.
    `until`: by the clock. `number`: tells apart what has the same priority and time."""

    name: str
    number: int
    priority: int = 0
    until: float = math.inf
    blocks: list[tuple[int, KVCacheBlock]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.blocks[-1][0] if self.blocks else 0

    @property
    def rank(self) -> tuple[int, float, int]:
        """The lower, the sooner given up."""
        return self.priority, self.until, self.number


#: Called with a name, the tokens that are kept under it now, the number of all kept blocks, how many blocks this change has
#: given up, and why; "" if nothing was given up.
Tell = Callable[[str, int, int, int, str], None]


class KeptBlocks:
    """Takes the place of `free`, the queue of a block pool. Not thread-safe, as that is not."""

    def __init__(self, free: FreeKVCacheBlockQueue, tell: Tell, clock: Callable[[], float] = time.monotonic):
        self._free, self._tell, self._clock = free, tell, clock
        self._kept: dict[str, _Kept] = {}
        #: Number of a block -> who keeps it.
        self._keepers: dict[int, set[_Kept]] = {}
        #: Kept blocks that no request holds; they are not in `_free`.
        self._idle: dict[int, KVCacheBlock] = {}
        #: What is kept, the lowest rank last, with some of which nothing is left; None: not sorted since something was kept.
        self._order: list[_Kept] | None = None
        self._numbers = itertools.count()
        self._next_end = math.inf

    # What is kept ---------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> int:
        return len(self._keepers)

    def keep(self, name: str, blocks: Sequence[tuple[int, KVCacheBlock]], ttl_s: float, priority: int) -> None:
        """Keep these cached blocks, each with the number of tokens up to its end, in the order of the prompt. They take the
        place of what was kept under the name before."""
        kept = self._kept.get(name) or _Kept(name, next(self._numbers))
        wanted = {block.block_id for _, block in blocks}
        for _, block in reversed(kept.blocks):
            if block.block_id not in wanted:
                self._leave(kept, block)
        kept.blocks = list(blocks)
        if not blocks:
            self._kept.pop(name, None)
        else:
            kept.priority, kept.until = priority, self._clock() + ttl_s
            self._next_end = min(self._next_end, kept.until)
            self._kept[name], self._order = kept, None
            for _, block in blocks:
                self._take(kept, block)
        self._tell(name, kept.tokens, self.blocks, 0, "")

    def let_go(self, name: str, why: str = LET_GO) -> None:
        """From now on, these blocks are cached like any others. Nothing happens if there are none under this name."""
        if kept := self._kept.pop(name, None):
            before = self.blocks
            for _, block in reversed(kept.blocks):
                self._leave(kept, block)
            kept.blocks = []
            self._tell(name, 0, self.blocks, before - self.blocks, why)

    def expire(self) -> None:
        """Let go what has been kept for long enough."""
        if (now := self._clock()) < self._next_end:
            return
        for kept in [kept for kept in self._kept.values() if kept.until <= now]:
            self.let_go(kept.name, EXPIRED)
        self._next_end = min((kept.until for kept in self._kept.values()), default=math.inf)

    def clear(self) -> None:
        """Nothing is in the prefix cache any more."""
        for name in list(self._kept):
            self.let_go(name, GONE)

    def _take(self, kept: _Kept, block: KVCacheBlock) -> None:
        self._keepers.setdefault(block.block_id, set()).add(kept)
        if block.ref_cnt == 0 and block.block_id not in self._idle:
            self._free.remove(block)
            self._idle[block.block_id] = block

    def _leave(self, kept: _Kept, block: KVCacheBlock) -> None:
        keepers = self._keepers[block.block_id]
        keepers.discard(kept)
        if not keepers:
            del self._keepers[block.block_id]
            if self._idle.pop(block.block_id, None):
                self._free.append(block)

    # Giving up ------------------------------------------------------------------------------------------------------

    def _make_room(self, blocks: int) -> None:
        """Give up kept blocks until `blocks` free ones are kept by nobody."""
        before, shortened = self.blocks, dict[_Kept, None]()
        if self._order is None:
            self._order = sorted(self._kept.values(), key=lambda kept: kept.rank, reverse=True)
        for kept in reversed(self._order):
            if self._free.num_free_blocks >= blocks:
                break
            while kept.blocks and self._free.num_free_blocks < blocks:
                block = kept.blocks[-1][1]
                if block.block_id not in self._idle or any(other.rank > kept.rank for other in self._keepers[block.block_id]):
                    break  # what precedes it in the prompt is in use, too, or is kept by the same others
                shortened |= dict.fromkeys(self._give_up(block))
        # Only where the same content is in several blocks, requests may use the end of a prompt without its beginning.
        while self._free.num_free_blocks < blocks:
            shortened |= dict.fromkeys(self._give_up(next(reversed(self._idle.values()))))
        while self._order and not self._order[-1].blocks:
            self._order.pop()
        self._tell_shortened(shortened, before - self.blocks, PRESSURE)

    def _give_up(self, block: KVCacheBlock) -> list[_Kept]:
        """Nobody keeps this block any more, nor what follows it in their prompts. Returns who did."""
        keepers = list(self._keepers[block.block_id])
        for kept in keepers:
            while kept.blocks:
                _, last = kept.blocks.pop()
                self._leave(kept, last)
                if last is block:
                    break
            if not kept.blocks:
                self._kept.pop(kept.name, None)
        return keepers

    def _tell_shortened(self, shortened: dict[_Kept, None], given_up: int, why: str) -> None:
        for kept in shortened:
            self._tell(kept.name, kept.tokens, self.blocks, given_up, why)
            given_up = 0

    # The queue, as vLLM's block pool uses it ------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        return self._free.num_free_blocks + len(self._idle)

    def popleft(self) -> KVCacheBlock:
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        if n > self._free.num_free_blocks:
            self._make_room(n)
        return self._free.popleft_n(n)

    def remove(self, block: KVCacheBlock) -> None:
        if self._idle.pop(block.block_id, None) is None:
            self._free.remove(block)

    def append(self, block: KVCacheBlock) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        if self._keepers:
            self._idle |= {block.block_id: block for block in blocks if block.block_id in self._keepers}
            blocks = [block for block in blocks if block.block_id not in self._keepers]
        self._free.append_n(blocks)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """vLLM puts blocks here whose content is not in the prefix cache."""
        for block in blocks:
            if block.block_id in self._keepers:
                before = self.blocks
                shortened = dict.fromkeys(self._give_up(block))
                self._tell_shortened(shortened, before - self.blocks, GONE)
        self._free.prepend_n(blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        return [*self._free.get_all_free_blocks(), *self._idle.values()]
