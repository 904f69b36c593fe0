"""A turn over token ids: prefill, handoff, decode, and again where a replica or the prefix was lost.

1. Admit: room for the turn's decode and prefill, or a place in the queue, or a refusal (router/admission/admission.py).
2. Ask the mode how many prompt tokens are handed over, and place the prefill: in the shared pool, or in the pool's own.
3. The prefill replica computes what it has not cached and answers with a lease on the blocks.
4. Place the decode and stream its tokens. From the first contact the decode engine owns the lease; before it, we do.
5. PrefixLost (preempted, or the load failed or came late) or ReplicaLost (died, wedged, says it cannot): go to 2 with
   the tokens so far as `replay`, past the replica that failed. The client sees one stream, as if nothing had happened.
6. Whatever ends the turn - its end, an error, the deadline, a client that left - closes both calls, which frees KV.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from types import MappingProxyType

from opentelemetry.trace import Span, SpanKind

from kvshare import tracing
from kvshare.caller import current_caller
from kvshare.config import Base, Router
from kvshare.decoders import Decoder
from kvshare.errors import (
    DeadlineExceeded,
    Internal,
    NotFound,
    PrefillShareError,
    PrefixLost,
    ReplicaLost,
    ResumeReason,
    Unavailable,
)
from kvshare.handoff import Handoff, TokenChunk, TurnContext, TurnUsage
from kvshare.layer_group import LayerGroup
from kvshare.metrics import Metrics
from kvshare.modes import get_mode
from router.admission.admission import Admission, PoolSource
from router.admission.grant import NOBODY, Demand, TenantShare
from router.pools.cache_index import BlockKeys
from router.pools.pool import Placed, Pool
from router.pools.route import Route
from router.service_rate import MeanRatio
from router.turn.attempt import Attempt
from router.turn.in_progress import InProgress
from router.turn.layer_choice import LayerChoice
from router.turn.metrics import TurnMetrics
from router.turn.prefix import Prefix
from router.turn.releases import Releases
from router.turn.span import turn_span
from router.turn.wedging import NoToken, check_may_go_on

logger = logging.getLogger(__name__)


#: Pause before a turn tries again after a replica failed it, doubled each time.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0


class Orchestrator:
    """`tenants`: what each may ask of the queue; others may what anybody may."""

    def __init__(
        self,
        config: Router,
        base: Base,
        decoders: dict[str, Decoder],
        routes: Mapping[str, Route],
        metrics: Metrics,
        tenants: Mapping[str, TenantShare] = MappingProxyType({}),
        load_timeout_s: float = 30.0,
    ):
        self._tenants, self._load_timeout_s = tenants, load_timeout_s
        self._config, self.routes = config, routes
        #: Changed in place: surfaces hold it too.
        self.decoders = decoders
        self._base = base
        self._admission = Admission(config, base.block_size, self._sources(), metrics)
        self._watch_capacity()
        self.in_progress = InProgress(metrics)
        self.draining = False
        self._releases = Releases(metrics)
        self.layer_choice = LayerChoice()
        self._counted = TurnMetrics(metrics, base.block_size)
        #: Seconds per token that the shared pool has lately computed.
        self.compute_s = MeanRatio(time.monotonic)

    def serve(self, decoders: Mapping[str, Decoder], routes: Mapping[str, Route], config: Router) -> None:
        """From now on serve these. Turns in progress keep the route they started on."""
        self.decoders.clear()
        self.decoders.update(decoders)
        self.routes, self._config = routes, config
        self._admission.serve(config, self._sources())
        self._watch_capacity()

    def _sources(self) -> dict[str, PoolSource]:
        return {
            name: PoolSource(route.decode.capacity, route.prefill.name, lambda pool=route.prefill: len(pool.replicas.usable()))
            for name, route in self.routes.items()
        }

    def _watch_capacity(self) -> None:
        for route in self.routes.values():
            route.decode.replicas.on_change = route.prefill.replicas.on_change = self._admission.refresh

    def admit(self, decoder: str | None, turns: int = 1, logprobs: int | None = None) -> None:
        """Raises before any of a request's turns is made: NotFound, InvalidInput for more than there is ever room for or than
        the decoder's engines would take, or Unavailable while stopping. A decoder that is None is not looked at."""
        self._admission.check_turns(turns, self._tenants.get(current_caller.get().tenant, NOBODY))
        if decoder is not None and decoder not in self.decoders:
            raise NotFound(f"unknown decoder {decoder!r}", field="decoder", fix=f"use one of {', '.join(self.decoders)}")
        if decoder is not None:
            self.decoders[decoder].check_logprobs(logprobs)
        if self.draining:
            raise Unavailable("the router is stopping", fix="try again; another replica or its successor takes over")

    async def run(
        self, name: str, prompt: list[int], sampling, request_id: str, context: TurnContext
    ) -> AsyncIterator[TokenChunk]:
        """Yields the turn's tokens. Fills the context's usage. Raises PrefillShareError only."""
        self.admit(name)
        usage, deadline_s = context.usage, context.deadline_s
        decoder, started, outcome = self.decoders[name], time.perf_counter(), "cancelled"
        usage.prompt_tokens = len(prompt)
        try:
            with turn_span(name, request_id, context), self.in_progress.turn(name):
                async with asyncio.timeout(deadline_s if deadline_s is not None else self._config.default_deadline_s):
                    if context.ready:
                        await context.ready()
                    async with aclosing(self._attempts(decoder, prompt, sampling, request_id, context)) as chunks:
                        async for chunk in chunks:
                            self._counted.generated(name, usage, chunk, time.perf_counter() - started)
                            yield chunk
            outcome = "ok"
        except TimeoutError:
            outcome = DeadlineExceeded.__name__
            raise DeadlineExceeded(
                f"request {request_id}: the deadline passed after {usage.completion_tokens} tokens"
            ) from None
        except PrefillShareError as error:
            outcome = type(error).__name__
            raise
        except GeneratorExit:
            outcome = "ok" if context.ended_well else "cancelled"
            raise
        except Exception as error:
            outcome = Internal.__name__
            logger.exception("request %s failed", request_id, extra={"request_id": request_id})
            raise Internal(f"request {request_id}: {type(error).__name__}: {error}") from error
        finally:
            self._record(name, request_id, outcome, usage, time.perf_counter() - started)

    async def _attempts(
        self, decoder: Decoder, prompt, sampling, request_id: str, context: TurnContext
    ) -> AsyncIterator[TokenChunk]:
        route = self.routes[decoder.pool]
        prefix = self._prefix(decoder, prompt, [], context)
        shared = bool(prefix.token_ids)
        overlaps = route.prefill.overlaps(prefix.keys) if shared else {}
        demand = Demand(
            pool=decoder.pool,
            prompt_tokens=len(prompt),
            cached_tokens=max(overlaps.values(), default=0) if shared else len(prompt),
            max_tokens=sampling.max_tokens,
            tenant=self._tenants.get(context.tenant, NOBODY),
            priority=context.priority,
            deadline_s=context.deadline_s,
        )
        with tracing.span("queue", tracing.inside(context.span)):
            room = await self._admission.admit(demand)
        with room as grant:
            context.usage.queue_s = grant.waited_s
            attempt = Attempt(route, grant, prefix)
            attempts = self._until_it_ends(decoder, prompt, sampling, request_id, context, attempt)
            async with aclosing(attempts) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _until_it_ends(
        self,
        decoder: Decoder,
        prompt: list[int],
        sampling,
        request_id: str,
        context: TurnContext,
        attempt: Attempt,
    ) -> AsyncIterator[TokenChunk]:
        while True:
            tag, attempt.is_silent = f"{request_id}-{attempt.number}", False
            try:
                handoff = await self._prefill(decoder, tag, context, attempt)
                decode = self._decode(decoder, prompt, handoff, sampling, tag, context, attempt)
                async with aclosing(decode) as chunks:
                    async for chunk in chunks:
                        attempt.generated += chunk.token_ids
                        attempt.grant.grow_to(len(attempt.generated))
                        yield chunk
                        if chunk.finish_reason:
                            return
            except (PrefixLost, ReplicaLost) as lost:
                check_may_go_on(sampling, attempt, lost)
                await self._take_up_again(decoder, request_id, context, attempt, lost)
                attempt.prefix = self._prefix(decoder, prompt, attempt.generated, context)

    def _prefix(self, decoder: Decoder, prompt: list[int], generated: list[int], context: TurnContext) -> Prefix:
        return Prefix.of(decoder, prompt, generated, self._base.block_size, context.cache_salt)

    def _decode_keys(self, decoder: Decoder, context: TurnContext, attempt: Attempt) -> BlockKeys:
        """Keys of the prefix's blocks where they are read. The first time, this decides which layers the turn has the decoder
        compute: each group's blocks have keys of their own."""
        prefix, pool, usage = attempt.prefix, attempt.route.decode, context.usage

        def cached_tokens(group: LayerGroup | None) -> int:
            return max(pool.overlaps(prefix.decode_keys(group)).values(), default=0)

        if not attempt.is_chosen:
            spent_s = usage.queue_s + usage.prefill_s
            attempt.own_layers = self.layer_choice.choose(decoder, len(prefix.token_ids), spent_s, cached_tokens)
            attempt.is_chosen, usage.own_layers = True, str(attempt.own_layers or "")
            if get_mode(decoder.sharing).recomputes:
                self._counted.own_layers(decoder.name, attempt.own_layers)
        return prefix.decode_keys(attempt.own_layers)

    async def _take_up_again(
        self, decoder: Decoder, request_id: str, context: TurnContext, attempt: Attempt, lost: PrefixLost | ReplicaLost
    ) -> None:
        """Count the loss and pause if a replica failed. Raises Unavailable where the turn has lost enough."""
        self._counted.resumed(decoder.name, lost.reason, attempt.lease_ends - time.perf_counter())
        context.usage.resumes += 1
        context.span.add_event("taken up again", {"reason": lost.reason.value})
        attempt.number += 1
        preempted = lost.reason is ResumeReason.PREEMPTED
        attempt.failures += not preempted
        if context.usage.resumes > self._config.max_resumes:
            raise Unavailable(
                f"request {request_id} was resumed {self._config.max_resumes} times: {lost}",
                fix="give the decode pool more KV cache (kv_cache_gib)",
            ) from lost
        if attempt.failures > self._config.max_retries:
            raise Unavailable(f"request {request_id} failed on {attempt.failures} replicas; the last: {lost}") from lost
        told = {"request_id": request_id, "decoder": decoder.name, "reason": lost.reason.value}
        logger.info("request %s resumes after %d tokens: %s", request_id, len(attempt.generated), lost, extra=told)
        if lost.reason is ResumeReason.KV_LOAD_FAILED:
            attempt.avoid.add(attempt.source)
        await attempt.grant.readmit(len(attempt.generated))
        if not preempted:
            await asyncio.sleep(min(FIRST_PAUSE_S * 2 ** (attempt.failures - 1), LONGEST_PAUSE_S))

    async def _prefill(
        self, decoder: Decoder, request_id: str, context: TurnContext, attempt: Attempt
    ) -> Handoff | None:
        shared, keys = attempt.prefix.token_ids, attempt.prefix.keys
        if not shared:
            return None
        mode, pool = get_mode(decoder.sharing), attempt.route.prefill
        usage, session = context.usage, context.session
        last = session.prefilled_on.get(pool.name) if session else None
        placement = await pool.choose(len(shared), keys, last_replica=last, without=attempt.avoid)
        replica = attempt.source = placement.replica.id
        # An engine computes at least the last token, and so its block, again.
        predicted = min(placement.cached_tokens, (len(shared) - 1) // self._base.block_size * self._base.block_size)
        queued = len(shared) - predicted
        adapter = None if mode.shares_prefill else decoder.adapter
        started = time.perf_counter()
        attempt.avoid.add(replica)
        async with self._calling("prefill", pool, placement, context, queued, keys) as span:
            call = pool.replicas.on(replica).prefill.remote(
                shared,
                request_id,
                adapter=adapter,
                cache_salt=context.cache_salt,
                queued_tokens=queued,
                priority=attempt.priority,
                trace=tracing.headers(span),
            )
            result = await self._releases.answered(call, attempt.route.decode, request_id)
            span.set_attributes({"prefillshare.prompt_tokens": len(shared), "prefillshare.cached_tokens": result.cached_tokens})
        attempt.avoid.discard(replica)
        attempt.grant.prefill_done()
        ended = time.perf_counter()
        elapsed = ended - started
        if result.handoff is not None:
            attempt.lease_ends = ended + result.handoff.lease_s
        if mode.shares_prefill and result.computed_tokens >= self._base.block_size:  # less says what a call costs
            self.compute_s.add(result.prefill_s, result.computed_tokens)
        self._counted.prefilled(decoder.name, elapsed)
        if not usage.prefill_replica:  # a resumed turn finds in the cache what it has put there itself
            usage.cached_tokens, usage.predicted_tokens = result.cached_tokens, predicted
            usage.prefill_s, usage.prefill_replica = elapsed, replica
            self._counted.found_cached(pool.name, predicted, result.cached_tokens)
            if mode.shares_prefill:
                self._counted.asked_of_shared(decoder.name, keys, result.cached_tokens)
        usage.computed_tokens += result.computed_tokens
        if session is not None:
            session.prefilled_on[pool.name] = replica
        return result.handoff

    async def _decode(
        self,
        decoder: Decoder,
        prompt: list[int],
        handoff: Handoff | None,
        sampling,
        request_id: str,
        context: TurnContext,
        attempt: Attempt,
    ) -> AsyncIterator[TokenChunk]:
        usage, session, route = context.usage, context.session, attempt.route
        pool, stream, bytes_before, has_ended = route.decode, None, usage.kv_bytes, False
        try:
            last = session.prefilled_on.get(pool.name) if session else None
            grant, keys = attempt.grant, self._decode_keys(decoder, context, attempt)
            placement = await pool.choose(len(prompt), keys, fits=grant.fits, last_replica=last, without=attempt.avoid)
            replica = usage.decode_replica = placement.replica.id
            if grant.fits(replica):
                grant.on(replica)
            attempt.avoid.add(replica)
            async with self._calling("decode", pool, placement, context) as span, self._loading() as loading:
                stream = pool.replicas.streaming_on(replica).decode.remote(
                    prompt + attempt.generated,
                    handoff,
                    sampling,
                    request_id,
                    adapter=decoder.adapter,
                    replay=len(attempt.generated),
                    cache_salt=context.cache_salt,
                    priority=attempt.priority,
                    lend=context.lend and get_mode(decoder.sharing).two_streams,
                    own_layers=attempt.own_layers,
                    trace=tracing.headers(span),
                )
                attempt.is_silent = True
                called, called_ns = time.perf_counter(), time.time_ns()
                async for chunk in stream:
                    if loading.when() is not None and not loading.expired():
                        loading.reschedule(None)
                        attempt.is_silent = False
                        computed = len(attempt.prefix.token_ids) - chunk.local_tokens
                        self.layer_choice.took(decoder.pool, computed, attempt.own_layers, time.perf_counter() - called)
                        usage.load_s, usage.rest_load_s = chunk.load_s, chunk.rest_load_s
                        if handoff is not None and (load_s := max(chunk.load_s, chunk.rest_load_s)):
                            self._counted.kv_loaded(decoder.name, load_s, attempt.lease_ends - called - load_s)
                            read = {"prefillshare.kv_bytes": chunk.kv_bytes, "prefillshare.local_tokens": chunk.local_tokens}
                            tracing.past("kv load", tracing.inside(span), called_ns, load_s, **read)
                        route.prefill.replicas.succeeded(attempt.source)
                        pool.replicas.succeeded(replica)
                        if session is not None:
                            session.prefilled_on[pool.name] = replica
                    usage.kv_bytes = bytes_before + chunk.kv_bytes
                    context.lent = chunk.lent
                    yield chunk
                    if chunk.finish_reason:
                        return
                raise Unavailable(f"request {request_id}: the stream ended early")
        except PrefixLost as lost:
            if lost.reason is ResumeReason.KV_LOAD_FAILED:  # whose fault it was shows where turns go well
                route.prefill.replicas.failed(attempt.source, lost.reason)
                pool.replicas.failed(usage.decode_replica, lost.reason)
            else:
                attempt.avoid.discard(usage.decode_replica)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            has_ended = True
            raise
        finally:
            if stream is not None:
                stream.cancel()
            if handoff is not None and stream is None:
                self._releases.have_released(pool, handoff, request_id)
            elif handoff is not None and has_ended and attempt.is_silent:
                self._releases.give_up(pool, usage.decode_replica, handoff, request_id)

    @asynccontextmanager
    async def _calling(self, stage: str, pool: Pool, placement: Placed, context: TurnContext, *work) -> AsyncIterator[Span]:
        """As Pool.calling; counted, and a span of the turn's."""
        self._counted.placed(pool.name, placement.reason)
        where = {"pool": pool.name, "replica": placement.replica.id, "placed_by": placement.reason}
        attributes = {f"prefillshare.{name}": value for name, value in where.items()}
        with tracing.span(stage, tracing.inside(context.span), SpanKind.CLIENT, **attributes) as span:
            async with pool.calling(placement, *work):
                yield span

    @asynccontextmanager
    async def _loading(self) -> AsyncIterator[asyncio.Timeout]:
        """Bounds the wait for a decode call's first token. A read that hangs is left to the engine, which keeps the
        blocks it may still write to; the turn goes on elsewhere."""
        scope = asyncio.timeout(self._load_timeout_s)
        try:
            async with scope:
                yield scope
        except TimeoutError:
            if not scope.expired():
                raise
            text = f"no token within {self._load_timeout_s:g} s of the handoff (cluster.kv_load_timeout_s)"
            raise NoToken(text, reason=ResumeReason.KV_LOAD_FAILED) from None

    async def drain(self, timeout_s: float) -> None:
        """Admit no further turn and wait until running ones have ended, at most `timeout_s`."""
        self.draining = True
        await self.in_progress.ended(None, timeout_s)

    def _record(self, name: str, request_id: str, outcome: str, usage: TurnUsage, elapsed: float) -> None:
        told = {"request_id": request_id, "decoder": name, "outcome": outcome, **usage.report(), "total_s": elapsed}
        logger.info("request %s of %s: %s, %.3f s", request_id, name, outcome, elapsed, extra=told)
        self._counted.ended(name, outcome, usage, elapsed)
