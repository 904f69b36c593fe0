"""Where the turns of one decode pool run."""

from __future__ import annotations

from dataclasses import dataclass

from prefillshare.router.pools.cache_index import BlockKeys
from prefillshare.router.pools.pool import Pool


@dataclass(frozen=True)
class Route:
    """A decode pool and the prefill pool it draws on. Without one, its own engines make the KV of prompts."""

    decode: Pool
    prefill: Pool | None
    #: Decode pools whose engines hold the base: any of them may hand over what it has cached of a prefix.
    holders: tuple[Pool, ...] = ()
    #: The decode pool's own engines may make the KV of prompts although there is a prefill pool.
    in_place: bool = False

    @property
    def makers(self) -> Pool:
        """The pool whose engines make the KV of prompts."""
        return self.prefill or self.decode

    def maker_ahead(self, keys: BlockKeys) -> Pool:
        """The pool that is to make KV of a context before a turn asks for it: the prefill pool, unless a decode replica that
        may make it itself holds more of the context."""
        if self.prefill is None or not self.in_place:
            return self.makers
        return max((self.prefill, self.decode), key=lambda pool: max(pool.overlaps(keys).values(), default=0))
