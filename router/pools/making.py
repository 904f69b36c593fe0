"""Base KV of a context, made on a chosen replica before a turn asks for it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

from prefillshare.kvshare.keep import Keep
from prefillshare.kvshare.priority import BEHIND
from prefillshare.router.pools.calls import answer
from prefillshare.router.pools.pool import Placed, Pool

#: Priority in the engine of what needs less than a block of computing: under load, work behind all turns would not come to it.
HARDLY_ANY_WORK = 0


async def make_ahead(
    pool: Pool,
    placement: Placed,
    token_ids: list[int],
    salt: str | None,
    *,
    stride_tokens: int,
    block_size: int,
    made: Callable[[int], object],
    keep: Sequence[Keep] = (),
) -> None:
    """Compute what the replica lacks, behind all turns. `made` is told how many tokens have been computed. `keep`: what the
    replica's cache keeps of it.

    It is done in steps, because an engine continues a prefill that it has begun before it begins a turn's. Raises ReplicaLost.
    """
    async with pool.calling(placement):
        warm = pool.replicas.on(placement.replica.id).warm
        begin = placement.cached_tokens
        for end in range(begin, len(token_ids), stride_tokens):
            part = token_ids[: end + stride_tokens]
            asked = {"cache_salt": salt, "priority": BEHIND}
            if keep:
                asked["keep"] = [replace(one, tokens=min(one.tokens, len(part))) for one in keep]
                if len(part) - end < block_size:
                    asked["priority"] = HARDLY_ANY_WORK
            made((await answer(warm.remote(part, f"ahead-{uuid.uuid4().hex}", **asked))).computed_tokens)
