"""Contexts that no session holds: conversations whose client sends the whole history with every call.

A call that begins with an earlier call's prompt and answer goes on with that one's context (router/known_prefixes.py). Only
whole blocks count: no others are cached, and what ends an answer may be laid out otherwise in the next prompt.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from prefillshare.kvshare.caller import Caller
from prefillshare.router.known_prefixes import KnownPrefixes


@dataclass
class OpenContext:
    """`replicas`: as of a Session."""

    name: str = field(default_factory=lambda: f"open-{uuid.uuid4().hex}")
    replicas: dict[str, str] = field(default_factory=dict)


class OpenContexts:
    """The `limit` contexts that went on last, of all tenants; a tenant finds only its own, within one cache domain."""

    def __init__(self, block_size: int, limit: int = 4096):
        self._block_size, self._known = block_size, KnownPrefixes[OpenContext](limit)

    def of(self, token_ids: Sequence[int], caller: Caller, salt: str | None) -> OpenContext:
        """The context that these tokens continue, or a new one."""
        return self._known.longest(token_ids, _whose(caller, salt)) or OpenContext()

    def went_on(self, context: OpenContext, token_ids: Sequence[int], caller: Caller, salt: str | None) -> None:
        """The context consists of these tokens now."""
        if whole_blocks := len(token_ids) // self._block_size * self._block_size:
            self._known.note(token_ids[:whole_blocks], context, _whose(caller, salt))


def _whose(caller: Caller, salt: str | None) -> tuple:
    return caller.tenant, caller.cache_domain, salt
