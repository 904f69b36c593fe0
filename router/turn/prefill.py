"""A turn's second stage: get the KV of the shared prefix computed, and a lease on it. A decode engine that makes it itself does
so in the third stage (decode.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefillshare.kvshare import tracing
from prefillshare.kvshare.handoff import Handoff
from prefillshare.router import clock
from prefillshare.router.pools.pool import Pool
from prefillshare.router.turn.place import calling

if TYPE_CHECKING:
    from prefillshare.router.turn.turn import Turn


async def prefill(turn: Turn) -> Handoff | None:
    """Returns None if nothing is shared, or if the decode engine makes the KV itself. Raises ReplicaLost, or Unavailable if no
    replica may get work."""
    shared, keys, services = turn.prefix.token_ids, turn.prefix.keys, turn.services
    turn.choice = None
    if not shared:
        return None
    choice = turn.choice = await services.decider.choose(turn)
    services.counted.decided(turn.route.decode.name, choice.where, choice.why)
    if not choice.source:
        return None
    pool, placed, replica = choice.pool, choice.placed, choice.source
    # An engine computes at least the last token, and so its block, again.
    predicted = min(placed.cached_tokens, (len(shared) - 1) // services.block_size * services.block_size)
    queued, started = len(shared) - predicted, clock.now()
    turn.avoid.add(replica)
    async with calling(turn, "prefill", pool, placed) as span:
        with pool.computing(placed, queued, keys):
            call = pool.replicas.on(replica).prefill.remote(
                shared,
                turn.name,
                adapter=None if turn.mode.shares_prefill else turn.decoder.adapter,
                cache_salt=turn.salt,
                queued_tokens=queued,
                priority=turn.priority,
                trace=tracing.headers(span),
            )
            result = await services.releases.answered(call, turn.route.decode, turn.name, replica)
        span.set_attributes({"prefillshare.prompt_tokens": len(shared), "prefillshare.cached_tokens": result.cached_tokens})
    turn.avoid.discard(replica)
    if result.handoff is not None:
        turn.lease_ends = clock.now() + result.handoff.lease_s
    if pool is not turn.route.prefill:
        services.decider.costs[pool.name].made_here(result.prefill_s, result.computed_tokens, services.block_size)
    elif turn.mode.shares_prefill and result.computed_tokens >= services.block_size:  # less shows a call's cost
        services.compute_s.add(result.prefill_s, result.computed_tokens)
    elapsed = clock.now() - started
    turn.handoff_s = elapsed - result.prefill_s
    note_made(turn, pool, replica, result.cached_tokens, predicted, elapsed)
    turn.terms.replicas[pool.name] = replica
    return result.handoff


def note_made(turn: Turn, pool: Pool, replica: str, cached_tokens: int, predicted: int, elapsed: float) -> None:
    """The KV of the shared prefix has been made: note what it took, and give back the room for it."""
    usage, services, decoder, shared = turn.usage, turn.services, turn.decoder.name, len(turn.prefix.token_ids)
    turn.grant.prefill_done()
    services.counted.prefilled(decoder, elapsed)
    if not usage.prefill_replica:  # a resumed turn finds in the cache what it has put there itself
        usage.cached_tokens, usage.predicted_tokens = cached_tokens, predicted
        usage.prefill_s, usage.prefill_replica = elapsed, replica
        usage.prefill_choice = f"{turn.choice.where}: {turn.choice.why}"
        services.counted.found_cached(pool.name, predicted, cached_tokens)
        if turn.mode.shares_prefill:
            services.counted.asked_of_shared(decoder, turn.prefix.keys, cached_tokens)
    usage.computed_tokens += shared - cached_tokens
