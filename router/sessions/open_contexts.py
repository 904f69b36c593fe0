"""Contexts that no session holds: conversations whose client sends the whole history with every call.

A call that begins with an earlier call's prompt and answer goes on with that one's context. It is found by its tokens.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from prefillshare.kvshare.caller import Caller


@dataclass
class OpenContext:
    """`replicas`: as of a Session."""

    name: str = field(default_factory=lambda: f"open-{uuid.uuid4().hex}")
    replicas: dict[str, str] = field(default_factory=dict)


class OpenContexts:
    """The `limit` contexts that went on last, of all tenants; a tenant finds only its own, within one cache domain."""

    def __init__(self, block_size: int, limit: int = 4096):
        self._block_size, self._limit = block_size, limit
        self._found: OrderedDict[bytes, OpenContext] = OrderedDict()

    def of(self, token_ids: Sequence[int], caller: Caller, salt: str | None) -> OpenContext:
        """The context that these tokens continue, or a new one."""
        for key in reversed(list(self._keys(token_ids, caller, salt))):
            if context := self._found.get(key):
                return context
        return OpenContext()

    def went_on(self, context: OpenContext, token_ids: Sequence[int], caller: Caller, salt: str | None) -> None:
        """The context consists of these tokens now."""
        *_, key = (b"", *self._keys(token_ids, caller, salt))
        if not key:
            return
        self._found[key] = context
        self._found.move_to_end(key)
        if len(self._found) > self._limit:
            self._found.popitem(last=False)

    def _keys(self, token_ids: Sequence[int], caller: Caller, salt: str | None) -> Iterator[bytes]:
        """A key for each prefix of whole blocks."""
        whose = repr((caller.tenant, caller.cache_domain, salt)).encode("utf-8", "surrogatepass")
        digest, tokens = blake2b(whose, digest_size=16), np.asarray(token_ids, dtype="<u4")
        for end in range(self._block_size, len(tokens) + 1, self._block_size):
            digest.update(tokens[end - self._block_size : end])
            yield digest.digest()
