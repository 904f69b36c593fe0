"""Chooses the replicas of a turn's calls, and the layers that the decoder computes itself; counts and traces the calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from opentelemetry.trace import Span, SpanKind

from prefillshare.kvshare import tracing
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.router.pools.cache_index import BlockKeys
from prefillshare.router.pools.pool import Placed, Pool

if TYPE_CHECKING:
    from prefillshare.router.turn.turn import Turn


async def prefill_place(turn: Turn) -> Placed:
    """The replica to prefill the shared prefix. Raises as Pool.choose does."""
    pool, prefix = turn.route.prefill, turn.prefix
    last = turn.terms.replicas.get(pool.name)
    return await pool.choose(len(prefix.token_ids), prefix.keys, last_replica=last, without=turn.avoid)


async def decode_place(turn: Turn) -> Placed:
    """The replica to decode on; the turn's room moves there if it fits. The first call for a turn also decides which layers the
    decoder computes itself, because each group's blocks have their own keys."""
    pool, grant = turn.route.decode, turn.grant
    last = turn.terms.replicas.get(pool.name)
    keys, shared = _decode_keys(turn), len(turn.prefix.token_ids)
    placed = await pool.choose(shared, keys, fits=grant.fits, last_replica=last, without=turn.avoid)
    if grant.fits(placed.replica.id):
        grant.on(placed.replica.id)
    return placed


def _decode_keys(turn: Turn) -> BlockKeys:
    """Keys of the prefix's blocks on the decode side."""
    prefix, usage, services = turn.prefix, turn.usage, turn.services

    def cached_tokens(group: LayerGroup | None) -> int:
        return max(turn.route.decode.overlaps(prefix.decode_keys(group)).values(), default=0)

    if not turn.is_chosen:
        spent_s = usage.queue_s + usage.prefill_s
        turn.own_layers = services.layer_choice.choose(turn.decoder, len(prefix.token_ids), spent_s, cached_tokens)
        turn.is_chosen, usage.own_layers = True, str(turn.own_layers or "")
        if turn.mode.recomputes:
            services.counted.own_layers(turn.decoder.name, turn.own_layers)
    return prefix.decode_keys(turn.own_layers)


@asynccontextmanager
async def calling(turn: Turn, stage: str, pool: Pool, placed: Placed) -> AsyncIterator[Span]:
    """As Pool.calling, but counted, and in a span of the turn."""
    turn.services.counted.placed(pool.name, placed.reason)
    where = {"pool": pool.name, "replica": placed.replica.id, "placed_by": placed.reason}
    attributes = {f"prefillshare.{name}": value for name, value in where.items()}
    with tracing.span(stage, tracing.inside(turn.span), SpanKind.CLIENT, **attributes) as span:
        async with pool.calling(placed):
            yield span
