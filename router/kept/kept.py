"""One kept context, and the keys by which its blocks are counted.

A context is kept in whole blocks. What several contexts of a tenant have in common at their beginning is there once, and counts
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

#: Priorities that a tenant may give to what it keeps: the higher, the later it is given up if requests need the room.
PRIORITIES = range(101)
USUAL_PRIORITY = 50
#: Bytes of a block's key.
KEY_BYTES = 8
_SESSION, _PROMPT = "session:", "prompt:"


@dataclass(frozen=True)
class Kept:
    """`name`: what is kept, among all that the tenant keeps. `left_s`: seconds until it is kept no longer. `pool`, `replica`:
    where it is kept, as far as that is known."""

    tenant: str
    name: str
    blocks: int
    ttl_s: float
    left_s: float
    priority: int = USUAL_PRIORITY
    #: Of all tenants' contexts, the one with the lower rank is given up sooner.
    rank: int = 0
    salt: str | None = None
    pool: str = ""
    replica: str = ""

    @property
    def engine_name(self) -> str:
        """Its name in engines. No two contexts of any tenants share one."""
        return f"{len(self.tenant)}:{self.tenant}:{self.name}"

    @property
    def session_id(self) -> str | None:
        """The session whose context it is."""
        return self.name.removeprefix(_SESSION) if self.name.startswith(_SESSION) else None

    @property
    def is_prompt(self) -> bool:
        return self.name.startswith(_PROMPT)


def of_session(session_id: str) -> str:
    """Name of a kept session."""
    return _SESSION + session_id


def of_prompt(keys: bytes) -> str:
    """Name of a kept beginning of a prompt."""
    return _PROMPT + keys[-KEY_BYTES:].hex()


def rank_of(priority: int, tenant_priority: int) -> int:
    """The tenant's own priority (keys file; the lower number goes first) decides between tenants, then what it gave."""
    return (100 - tenant_priority) * len(PRIORITIES) + priority


def block_keys(token_ids: Sequence[int], block_size: int, salt: str | None) -> bytes:
    """The keys of the whole blocks of a context, one after the other. A block's key depends on all tokens up to its end."""
    digest = blake2b((salt or "").encode(), digest_size=KEY_BYTES)
    tokens = np.asarray(token_ids, dtype="<u4")
    keys = bytearray()
    for end in range(block_size, len(tokens) + 1, block_size):
        digest.update(tokens[end - block_size : end])
        keys += digest.digest()
    return bytes(keys)


def each(keys: bytes) -> Iterator[bytes]:
    return (keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))


def common_blocks(one: bytes, other: bytes) -> int:
    """How many blocks two contexts have in common at their beginning."""
    blocks = min(len(one), len(other)) // KEY_BYTES
    while blocks and one[(blocks - 1) * KEY_BYTES : blocks * KEY_BYTES] != other[(blocks - 1) * KEY_BYTES : blocks * KEY_BYTES]:
        blocks -= 1
    return blocks
