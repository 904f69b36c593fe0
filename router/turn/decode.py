"""A turn's third stage: the decode engine reads the shared prefix, or makes it itself, and generates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from opentelemetry.trace import Span

from prefillshare.kvshare import tracing
from prefillshare.kvshare.decode_request import DecodeRequest
from prefillshare.kvshare.errors import PrefixLost, ResumeReason, Unavailable
from prefillshare.kvshare.handoff import Handoff, TokenChunk
from prefillshare.router import clock
from prefillshare.router.turn.place import calling, decode_place
from prefillshare.router.turn.prefill import note_made
from prefillshare.router.turn.wedging import NoToken

if TYPE_CHECKING:
    from prefillshare.router.turn.turn import Turn


async def decode(turn: Turn, handoff: Handoff | None) -> AsyncIterator[TokenChunk]:
    """Yields tokens up to the end of the response. Raises PrefixLost or ReplicaLost where the turn may be taken up again."""
    pool, stream, has_ended, bytes_before = turn.route.decode, None, False, turn.usage.kv_bytes
    replica = ""
    try:
        placed = turn.choice.decode if turn.choice and turn.choice.decode else await decode_place(turn)
        replica = turn.usage.decode_replica = placed.replica.id
        turn.avoid.add(replica)
        async with calling(turn, "decode", pool, placed) as span, _silence(turn, handoff) as broken:
            stream = pool.replicas.streaming_on(replica).decode.remote(_request(turn, handoff, span))
            turn.is_silent = True
            called, called_ns = clock.now(), time.time_ns()
            with turn.account.holding_kv(len(turn.call.prompt) + len(turn.generated)):
                async for chunk in stream:
                    if broken():
                        _note_first(turn, chunk, handoff, span, called, called_ns)
                    turn.usage.kv_bytes = bytes_before + chunk.kv_bytes
                    turn.lent = chunk.lent
                    yield chunk
                    if chunk.finish_reason:
                        return
            raise Unavailable(f"request {turn.name}: the stream ended early")
    except PrefixLost as lost:
        if lost.reason is ResumeReason.KV_LOAD_FAILED:  # both are counted; a turn that goes well clears its replicas
            if source := turn.choice and turn.choice.source:
                turn.choice.pool.replicas.failed(source, lost.reason)
            pool.replicas.failed(replica, lost.reason)
        else:
            turn.avoid.discard(replica)
        raise
    except (asyncio.CancelledError, GeneratorExit):
        has_ended = True
        raise
    finally:
        if stream is not None:
            stream.cancel()
        if handoff is not None and stream is None:
            turn.services.releases.have_released(pool, handoff, turn.name, turn.choice.source)
        elif handoff is not None and has_ended and turn.is_silent:
            turn.services.releases.give_up(pool, replica, handoff, turn.name)


def _request(turn: Turn, handoff: Handoff | None, span: Span) -> DecodeRequest:
    return DecodeRequest(
        request_id=turn.name,
        token_ids=turn.call.prompt + turn.generated,
        handoff=handoff,
        sampling=turn.call.sampling,
        adapter=turn.decoder.adapter,
        replay=len(turn.generated),
        cache_salt=turn.salt,
        priority=turn.priority,
        queued_tokens=_to_make(turn),
        lend=turn.terms.lend and turn.mode.lends_responses and turn.route.prefill is not None,
        own_layers=turn.own_layers,
        own_tokens=turn.decoder.own_tokens,
        trace=tracing.headers(span),
    )


def _to_make(turn: Turn) -> int:
    """Tokens of the shared prefix that the decode engine is expected to compute."""
    return max(0, len(turn.prefix.token_ids) - turn.here.cached_tokens) if turn.here else 0


def _note_first(
    turn: Turn, chunk: TokenChunk, handoff: Handoff | None, span: Span, called: float, called_ns: int
) -> None:
    """The first token has come: count the engines' calls as successes, and what the load or the prefill here took."""
    services, usage, pool, shared = turn.services, turn.usage, turn.route.decode, len(turn.prefix.token_ids)
    elapsed, costs = clock.now() - called, services.decider.costs[turn.decoder.pool]
    services.layer_choice.took(turn.decoder.pool, shared - chunk.local_tokens, turn.own_layers, elapsed)
    usage.load_s, usage.rest_load_s = chunk.load_s, chunk.rest_load_s
    if handoff is not None and (load_s := max(chunk.load_s, chunk.rest_load_s)):
        services.counted.kv_loaded(turn.decoder.name, load_s, turn.lease_ends - called - load_s)
        read = {"prefillshare.kv_bytes": chunk.kv_bytes, "prefillshare.local_tokens": chunk.local_tokens}
        tracing.past("kv load", tracing.inside(span), called_ns, load_s, **read)
    if turn.choice and turn.choice.source:
        turn.choice.pool.replicas.succeeded(turn.choice.source)
        own_s = usage.own_tokens * (costs.here_s.value or 0.0)  # it takes that wherever the prefix comes from
        costs.handed_over(turn.handoff_s + elapsed - chunk.load_s - own_s, chunk.load_s, shared - chunk.local_tokens)
    elif turn.here:
        cached, predicted = min(chunk.local_tokens, shared), min(turn.here.cached_tokens, shared)
        note_made(turn, pool, usage.decode_replica, cached, predicted, elapsed)
        costs.made_here(elapsed, shared - cached + usage.own_tokens, services.block_size)
        span.set_attributes({"prefillshare.prompt_tokens": shared, "prefillshare.cached_tokens": cached})
    pool.replicas.succeeded(usage.decode_replica)
    turn.terms.replicas[pool.name] = usage.decode_replica


@asynccontextmanager
async def _silence(turn: Turn, handoff: Handoff | None) -> AsyncIterator[Callable[[], bool]]:
    """The time before a decode call's first token. Yields a function to be called with every chunk, which ends it and returns
    True the first time.

    If KV is read, the time is limited: if a read hangs, the turn goes on elsewhere, and the engine keeps the blocks that the
    read may still write to. If the replica makes KV, that counts as its load meanwhile."""
    limit_s = turn.services.load_timeout_s
    scope = asyncio.timeout(limit_s if handoff else None)
    with ExitStack() as work:
        if to_make := _to_make(turn):
            work.enter_context(turn.route.decode.computing(turn.here, to_make, turn.prefix.keys))

        def broken() -> bool:
            if not turn.is_silent or scope.expired():
                return False
            scope.reschedule(None)
            work.close()
            turn.is_silent = False
            return True

        try:
            async with scope:
                yield broken
        except TimeoutError:
            if not scope.expired():
                raise
            text = f"no token within {limit_s:g} s of the handoff (cluster.kv_load_timeout_s)"
            raise NoToken(text, reason=ResumeReason.KV_LOAD_FAILED) from None
