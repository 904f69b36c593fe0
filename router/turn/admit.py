"""A turn's first stage: what its tenant may use (router/accounts), then room for its prefill and its decode, or a place in the
queue (router/admission); or a refusal."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prefillshare.kvshare import tracing
from prefillshare.router.admission.grant import Demand

if TYPE_CHECKING:
    from prefillshare.router.turn.turn import Turn


@asynccontextmanager
async def admitted(turn: Turn) -> AsyncIterator[None]:
    """Within this context the turn holds its grant, and its account is open. Raises as Limits.take and Admission.admit do."""
    services, demand = turn.services, _demand(turn)
    output_tokens = demand.output_tokens(services.config.expected_output_tokens)
    async with services.accounts.taken(demand, output_tokens) as charge:
        with tracing.span("queue", tracing.inside(turn.span)):
            room = await services.admission.admit(demand)
        with room as turn.grant:
            turn.usage.queue_s = turn.grant.waited_s
            turn.account.open(charge, demand.uncached_tokens)
            try:
                yield
            finally:
                turn.account.close()


def _demand(turn: Turn) -> Demand:
    call, prefix = turn.call, turn.prefix
    cached = 0
    if prefix.token_ids:
        makers = {turn.route.makers, turn.route.decode} if turn.decoder.local_prefill else {turn.route.makers}
        cached = max((tokens for pool in makers for tokens in pool.overlaps(prefix.keys).values()), default=0)
    return Demand(
        pool=turn.decoder.pool,
        prompt_tokens=len(call.prompt),
        cached_tokens=cached,
        own_tokens=turn.usage.own_tokens,
        max_tokens=call.sampling.max_tokens,
        tenant=turn.services.share_of(call.caller.tenant),
        priority=call.caller.priority,
        deadline_s=turn.terms.deadline_s,
    )
