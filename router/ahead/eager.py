"""Eager prefill: the base's KV of a response is computed before the next turn asks for it.

A decoder's own KV of what it generated is private to it; the next turn, of whatever decoder, needs the base's KV. It is
computed in idle time:
 1. Every `stride_tokens` tokens while a response streams, and when it has ended, the context so far is sent to the replica that
    holds most of it, of the pool that is to make it (Route.maker_ahead), at the lowest priority: any waiting turn goes first.
 2. At most `limit` such calls run at once; further ones are dropped, and counted.
 3. The session's next turn, or its deletion, cancels what still runs. Blocks computed so far stay cached.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.errors import PrefillShareError
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.background import Background
from prefillshare.router.pools.cache_index import BlockKeys
from prefillshare.router.pools.making import make_ahead
from prefillshare.router.pools.pool import Pool

logger = logging.getLogger(__name__)

#: Tenant, and the name of a session or of a context that no session holds (router/sessions/open_contexts.py).
ContextKey = tuple[str, str]


class EagerPrefill:
    """`maker` returns the pool that is to make a context's KV for a decode pool, or raises Unavailable if there is none."""

    def __init__(
        self, maker: Callable[[str, BlockKeys], Pool], base: Base, metrics: Metrics, *, limit: int, stride_tokens: int
    ):
        self._maker, self._base, self._metrics = maker, base, metrics
        self._limit, self._stride_tokens = limit, stride_tokens
        self._background = Background(metrics)
        self._running: dict[ContextKey, asyncio.Task] = {}
        #: Session -> tokens of its context that have been requested, while its response streams.
        self._asked: dict[ContextKey, int] = {}

    def grew(
        self,
        session: ContextKey,
        tokens: int,
        context: Callable[[], list[int]],
        salt: str | None,
        pool: str,
        *,
        ended: bool,
    ) -> None:
        """Take note that a session's context has `tokens` tokens now, the latest from decode pool `pool`. `ended`: it stays so
        until its next turn."""
        if ended:
            self.cancel(session)
        elif tokens - self._asked.setdefault(session, tokens) < self._stride_tokens:
            return
        if session in self._running:
            return
        if tokens >= self._base.max_model_len:  # no turn can follow, and no engine takes a prompt so long
            self._count("needless")
            return
        if len(self._running) >= self._limit:
            self._count("dropped")
            return
        self._asked[session] = tokens
        warming = self._warm(context(), salt, pool)
        task = self._running[session] = self._background.start("eager_prefill", warming, session=session)
        task.add_done_callback(lambda done: self._ended(session, done))
        if ended:
            self._asked.pop(session, None)

    def cancel(self, session: ContextKey) -> None:
        """Cancel what runs for a session that goes on without it, or is gone."""
        self._asked.pop(session, None)
        if task := self._running.pop(session, None):
            task.cancel()

    async def made(self, session: ContextKey) -> None:
        """Wait until nothing is computed for the session."""
        if task := self._running.get(session):
            await asyncio.wait({task})

    async def stop(self) -> None:
        await self._background.stop()

    def _ended(self, session: ContextKey, task: asyncio.Task) -> None:
        if self._running.get(session) is task:
            del self._running[session]

    async def _warm(self, token_ids: list[int], salt: str | None, decode_pool: str) -> None:
        outcome = "failed"
        try:
            keys = BlockKeys(token_ids, self._base.block_size, salt=salt)
            pool = self._maker(decode_pool, keys)
            placement = await pool.choose(len(token_ids), keys)
            if placement.missing_tokens < self._base.block_size:
                outcome = "needless"
                return
            made = self._metrics["eager_prefill_tokens_total"].inc
            how = {"stride_tokens": self._stride_tokens, "block_size": self._base.block_size}
            await make_ahead(pool, placement, token_ids, salt, made=made, **how)
            outcome = "done"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except PrefillShareError as error:
            logger.warning("eager prefill of %d tokens failed: %s", len(token_ids), error)
        finally:
            self._count(outcome)

    def _count(self, outcome: str) -> None:
        self._metrics["eager_prefills_total"].labels(outcome).inc()
