"""Where the turns of one decode pool run."""

from __future__ import annotations

from dataclasses import dataclass

from prefillshare.router.pools.pool import Pool


@dataclass(frozen=True)
class Route:
    """A decode pool and the prefill pool it draws on. Without one, its own engines make the KV of prompts."""

    decode: Pool
    prefill: Pool | None
    #: Decode pools whose engines hold the base: any of them may hand over what it has cached of a prefix.
    holders: tuple[Pool, ...] = ()

    @property
    def makers(self) -> Pool:
        """The pool whose engines make the KV of prompts."""
        return self.prefill or self.decode
