"""What sharing has saved: prompt tokens found cached that only other decoders had asked for before.

With a cache per model, a decoder would find only what it has asked for itself, and would compute the rest of what it finds
here. Only what this router has seen and still remembers is counted: with several routers, each counts for itself.
"""

from __future__ import annotations

from collections import OrderedDict

from prefillshare.router.pools.cache_index import BlockKeys

#: Number of blocks remembered; the least recently asked for is forgotten first.
BLOCKS = 1 << 18


class SharingCredit:
    def __init__(self, block_size: int, blocks: int = BLOCKS):
        self._block_size, self._blocks = block_size, blocks
        #: Key of a block and all before it -> bits of the decoders that asked for it.
        self._askers: OrderedDict[int, int] = OrderedDict()
        self._bits: dict[str, int] = {}

    def ask(self, keys: BlockKeys, decoder: str, cached_tokens: int) -> int:
        """`decoder` asks for a prompt of which `cached_tokens` leading tokens were cached. Returns how many of these tokens
        sharing has saved it."""
        bit = self._bits.setdefault(decoder, 1 << len(self._bits))
        prefix, saved = 0, 0
        for number, block in enumerate(keys.hashes, 1):
            prefix = hash((prefix, block))
            askers = self._askers.pop(prefix, 0)
            saved += number * self._block_size <= cached_tokens and bool(askers) and not askers & bit
            self._askers[prefix] = askers | bit
        while len(self._askers) > self._blocks:
            self._askers.popitem(last=False)
        return saved * self._block_size
