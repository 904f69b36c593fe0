"""A turn's second stage: get the KV of the shared prefix computed, and a lease on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefillshare.kvshare import tracing
from prefillshare.kvshare.handoff import Handoff, PrefillResult
from prefillshare.router import clock
from prefillshare.router.turn.place import calling, prefill_place

if TYPE_CHECKING:
    from prefillshare.router.turn.turn import Turn


async def prefill(turn: Turn) -> Handoff | None:
    """Returns None if nothing is shared. Raises ReplicaLost, or Unavailable if no replica may get work."""
    shared, keys, pool, services = turn.prefix.token_ids, turn.prefix.keys, turn.route.prefill, turn.services
    if not shared:
        return None
    placed = await prefill_place(turn)
    replica = turn.source = placed.replica.id
    # An engine computes at least the last token, and so its block, again.
    predicted = min(placed.cached_tokens, (len(shared) - 1) // services.block_size * services.block_size)
    queued, started = len(shared) - predicted, clock.now()
    turn.avoid.add(replica)
    async with calling(turn, "prefill", pool, placed, queued, keys) as span:
        call = pool.replicas.on(replica).prefill.remote(
            shared,
            turn.name,
            adapter=None if turn.mode.shares_prefill else turn.decoder.adapter,
            cache_salt=turn.salt,
            queued_tokens=queued,
            priority=turn.priority,
            trace=tracing.headers(span),
        )
        result = await services.releases.answered(call, turn.route.decode, turn.name)
        span.set_attributes({"prefillshare.prompt_tokens": len(shared), "prefillshare.cached_tokens": result.cached_tokens})
    turn.avoid.discard(replica)
    turn.grant.prefill_done()
    if result.handoff is not None:
        turn.lease_ends = clock.now() + result.handoff.lease_s
    _note(turn, result, predicted, clock.now() - started)
    turn.terms.replicas[pool.name] = replica
    return result.handoff


def _note(turn: Turn, result: PrefillResult, predicted: int, elapsed: float) -> None:
    usage, services, decoder = turn.usage, turn.services, turn.decoder.name
    if turn.mode.shares_prefill and result.computed_tokens >= services.block_size:  # less shows a call's cost
        services.compute_s.add(result.prefill_s, result.computed_tokens)
    services.counted.prefilled(decoder, elapsed)
    if not usage.prefill_replica:  # a resumed turn finds in the cache what it has put there itself
        usage.cached_tokens, usage.predicted_tokens = result.cached_tokens, predicted
        usage.prefill_s, usage.prefill_replica = elapsed, turn.source
        services.counted.found_cached(turn.route.prefill.name, predicted, result.cached_tokens)
        if turn.mode.shares_prefill:
            services.counted.asked_of_shared(decoder, turn.prefix.keys, result.cached_tokens)
    usage.computed_tokens += result.computed_tokens
