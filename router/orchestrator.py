"""A turn over token ids: prefill, handoff, decode, and again where a decode engine lost the prefix.

1. Admit: a bounded number of turns, a decoder that exists.
2. Ask the mode how many prompt tokens are handed over, and place the prefill: in the shared pool, or in the pool's own.
3. The prefill replica computes what it has not cached and answers with a lease on the blocks.
4. Place the decode and stream its tokens. From the first contact the decode engine owns the lease; before it, we do.
5. PrefixLost (preempted, or the load failed or came late): go to 3 with the tokens so far as `replay`.
6. Whatever ends the turn - its end, an error, the deadline, a client that left - closes both calls, which frees KV.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from ray.exceptions import RayError

from kvshare.config import Router
from kvshare.decoders import Decoder
from kvshare.errors import (
    DeadlineExceeded,
    Internal,
    NotFound,
    Overloaded,
    PrefillShareError,
    PrefixLost,
    Unavailable,
)
from kvshare.handoff import Handoff, PrefillResult, TokenChunk, TurnContext, TurnUsage
from kvshare.metrics import Metrics
from kvshare.modes import get_mode
from router.placement import place
from router.replicas import ReplicaSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """A decode pool and the prefill engines it draws on."""

    decode: ReplicaSet
    prefill: ReplicaSet


class Orchestrator:
    def __init__(self, config: Router, decoders: Mapping[str, Decoder], pools: Mapping[str, Pool], metrics: Metrics):
        self._config, self.decoders, self.pools, self._metrics = config, decoders, pools, metrics
        self._in_progress = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._releases: set[asyncio.Task] = set()

    def admit(self, decoder: str) -> None:
        """Raises before a turn is queued: NotFound, or Overloaded when `max_queued` turns are in progress."""
        if decoder not in self.decoders:
            raise NotFound(f"unknown decoder {decoder!r}", field="decoder", fix=f"use one of {', '.join(self.decoders)}")
        if self.draining:
            raise Unavailable("the router is stopping", fix="try again; another replica or its successor takes over")
        if self._in_progress >= self._config.max_queued:
            self._metrics["turns_total"].labels(decoder, "Overloaded").inc()
            raise Overloaded(f"{self._in_progress} turns are in progress (router.max_queued)", fix="try again later")

    async def run(
        self, name: str, prompt: list[int], sampling, request_id: str, context: TurnContext
    ) -> AsyncIterator[TokenChunk]:
        """Yields the turn's tokens. Fills the context's usage. Raises PrefillShareError only."""
        self.admit(name)
        usage, deadline_s = context.usage, context.deadline_s
        decoder, started, outcome = self.decoders[name], time.perf_counter(), "cancelled"
        self._count(+1)
        usage.prompt_tokens = len(prompt)
        try:
            async with asyncio.timeout(deadline_s if deadline_s is not None else self._config.default_deadline_s):
                async with aclosing(self._attempts(decoder, prompt, sampling, request_id, context)) as chunks:
                    async for chunk in chunks:
                        if chunk.token_ids and not usage.completion_tokens:
                            usage.ttft_s = time.perf_counter() - started
                            self._metrics["time_to_first_token_seconds"].labels(name).observe(usage.ttft_s)
                        usage.completion_tokens += len(chunk.token_ids)
                        usage.total_s = time.perf_counter() - started
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
        except RayError as error:
            outcome = Unavailable.__name__
            raise Unavailable(f"request {request_id}: a replica failed: {type(error).__name__}: {error}") from error
        except GeneratorExit:
            outcome = "ok" if context.ended_well else "cancelled"
            raise
        except Exception as error:
            outcome = Internal.__name__
            logger.exception("request %s failed", request_id)
            raise Internal(f"request {request_id}: {type(error).__name__}: {error}") from error
        finally:
            self._count(-1)
            self._record(name, outcome, usage, time.perf_counter() - started)

    async def _attempts(
        self, decoder: Decoder, prompt, sampling, request_id: str, context: TurnContext
    ) -> AsyncIterator[TokenChunk]:
        generated: list[int] = []
        usage = context.usage
        while True:
            handoff = await self._prefill(decoder, prompt, f"{request_id}-p{usage.resumes}", context)
            decode = self._decode(
                decoder, prompt + generated, handoff, sampling, f"{request_id}-d{usage.resumes}", len(generated), context
            )
            try:
                async with aclosing(decode) as chunks:
                    async for chunk in chunks:
                        generated += chunk.token_ids
                        yield chunk
                        if chunk.finish_reason:
                            return
                raise Unavailable(f"request {request_id}: the decode replica's stream ended early")
            except PrefixLost as lost:
                self._metrics["resumes_total"].labels(decoder.name, lost.reason.value).inc()
                usage.resumes += 1
                if usage.resumes > self._config.max_resumes:
                    raise Unavailable(
                        f"request {request_id} was resumed {self._config.max_resumes} times: {lost}",
                        fix="give the decode pool more KV cache (kv_cache_gib)",
                    ) from lost
                logger.info("request %s resumes after %d tokens: %s", request_id, len(generated), lost.reason.value)

    async def _prefill(self, decoder: Decoder, prompt, request_id: str, context: TurnContext) -> Handoff | None:
        mode = get_mode(decoder.sharing)
        tokens = mode.handoff_tokens(len(prompt))
        if tokens <= 0:
            return None
        usage, session, replicas = context.usage, context.session, self.pools[decoder.pool].prefill
        sticky = session.prefilled_on.get(replicas.name) if session else None
        replica = place(replicas.name, replicas.ids, replicas.outstanding, sticky)
        adapter = None if mode.shares_prefill else decoder.adapter
        started = time.perf_counter()
        with replicas.using(replica):
            call = replicas.on(replica).prefill.remote(
                prompt[:tokens], request_id, adapter=adapter, cache_salt=context.cache_salt
            )
            try:
                result: PrefillResult = await call
            except asyncio.CancelledError:
                call.cancel()
                raise
            except RayError:
                replicas.lost(replica)
                raise
        elapsed = time.perf_counter() - started
        self._metrics["prefill_seconds"].labels(decoder.name).observe(elapsed)
        if not usage.resumes:  # a resumed turn finds in the cache what it has put there itself
            usage.cached_tokens = result.cached_tokens
            usage.prefill_s, usage.prefill_replica = elapsed, replica
        usage.computed_tokens += result.computed_tokens
        if session is not None:
            session.prefilled_on[replicas.name] = replica
        return result.handoff

    async def _decode(
        self, decoder: Decoder, tokens, handoff: Handoff | None, sampling, request_id: str, replay: int, context: TurnContext
    ) -> AsyncIterator[TokenChunk]:
        usage, replicas = context.usage, self.pools[decoder.pool].decode
        stream, bytes_before = None, usage.kv_bytes
        try:
            replica = usage.decode_replica = place(replicas.name, replicas.ids, replicas.outstanding)
            with replicas.using(replica):
                stream = replicas.streaming_on(replica).decode.remote(
                    tokens, handoff, sampling, request_id, adapter=decoder.adapter, replay=replay, cache_salt=context.cache_salt
                )
                async for chunk in stream:
                    usage.kv_bytes = bytes_before + chunk.kv_bytes
                    yield chunk
                    if chunk.finish_reason:
                        return
        except RayError:
            replicas.lost(usage.decode_replica)
            raise
        finally:
            if stream is not None:
                stream.cancel()
            elif handoff is not None:
                self._release_later(replicas, handoff, request_id)

    def _release_later(self, replicas: ReplicaSet, handoff: Handoff, request_id: str) -> None:
        """Nobody will read this handoff: have any decode replica say so. If none can, the lease ends by itself."""
        if not replicas.ids:
            return

        async def release() -> None:
            try:
                async with asyncio.timeout(handoff.lease_s):
                    await replicas.on(replicas.ids[0]).release.remote(handoff, request_id)
            except (TimeoutError, RayError, PrefillShareError) as error:
                logger.warning("request %s: its KV stays leased for %g s: %s", request_id, handoff.lease_s, error)

        task = asyncio.create_task(release())
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    def _count(self, change: int) -> None:
        self._in_progress += change
        self._metrics["turns_in_progress"].set(self._in_progress)
        (self._idle.clear if self._in_progress else self._idle.set)()

    async def drain(self, timeout_s: float) -> None:
        """Admit no further turn and wait until running ones have ended, at most `timeout_s`."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d turns still run after %g s", self._in_progress, timeout_s)

    def _record(self, name: str, outcome: str, usage: TurnUsage, elapsed: float) -> None:
        m = self._metrics
        m["turns_total"].labels(name, outcome).inc()
        m["turn_seconds"].labels(name).observe(elapsed)
        m["prefill_tokens_total"].labels(name, "cached").inc(usage.cached_tokens)
        m["prefill_tokens_total"].labels(name, "computed").inc(usage.computed_tokens)
        m["completion_tokens_total"].labels(name).inc(usage.completion_tokens)
        m["kv_transfer_bytes_total"].labels(name).inc(usage.kv_bytes)
