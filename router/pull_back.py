"""Pull-back: KV of a response goes from the decode engine that made it to the prefill pool, instead of being computed again.

In modes whose generated KV is base KV (ICaRus), the next turn, whoever takes it, wants what the decode engine already has:
 1. At the end of a session's turn the decode engine lends the context's KV, under a lease.
 2. Pulling it, or computing it in the next turn: whichever has lately taken less time for so many tokens, or always pulling
    (`router.pull_back`). Less than a block is never worth a pull.
 3. The prefill replica that holds most of the context pulls what it lacks. The next turn's prefill waits for that read
    (kvshare_vllm/connector.py), wherever it stands.
 4. A next turn that comes meanwhile waits, at most as long as computing the context would take.
 5. A loan that nobody reads is given back at once. If the read fails, the next turn computes what is missing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Hashable

from kvshare.config import Base
from kvshare.errors import PrefillShareError, PrefixLost
from kvshare.handoff import Handoff, PrefillResult
from kvshare.metrics import Metrics
from router.cache_index import BlockKeys
from router.pools import Placement, Pool
from router.replicas import CALL_ERRORS, answer
from router.service_rate import MEMORY_S, MeanRatio

logger = logging.getLogger(__name__)

#: The decode engine keeps the blocks meanwhile, and the next turn's prefill waits.
PATIENCE_S = 10.0


class PullBack:
    """`when`: as config.Router.pull_back. `compute_s`: seconds that the prefill pool has lately taken to compute a token, None
    while that is not known."""

    def __init__(
        self, pool: Pool, base: Base, metrics: Metrics, *, when: str, limit: int, compute_s: Callable[[], float | None]
    ):
        self._pool, self._base, self._metrics, self._limit = pool, base, metrics, limit
        self._always = when == "always"
        self._compute_s, self._pull_s = compute_s, MeanRatio(time.monotonic)
        self._measured_at = -math.inf
        #: Prefill replicas that have pulled: the first time engines must meet, which says nothing of the next.
        self._met: set[tuple[str, str]] = set()
        self._running: set[asyncio.Task] = set()
        #: Session -> the pull of its context.
        self._of_session: dict[Hashable, asyncio.Task] = {}

    def lent(self, session: Hashable, token_ids: list[int], lent: Handoff, salt: str | None) -> None:
        """The context of a session that has just ended a turn, and what the decode engine lends of it."""
        room = len(self._running) < self._limit and len(token_ids) < self._base.max_model_len
        task = self._start(self._take(token_ids[: lent.tokens + 1], lent, salt, room))
        self._of_session[session] = task
        task.add_done_callback(lambda _: self._of_session.get(session) is task and self._of_session.pop(session))

    async def settled(self, session: Hashable, tokens: int) -> None:
        """Returns when nothing is being pulled for the session, or after as long as computing `tokens` takes."""
        if task := self._of_session.get(session):
            compute_s = self._compute_s()
            await asyncio.wait({task}, timeout=PATIENCE_S if compute_s is None else min(PATIENCE_S, tokens * compute_s))

    def give_back(self, lent: Handoff) -> None:
        """Nobody will pull this."""
        self._start(self._take([0], lent, None, False))

    def _start(self, work: Coroutine) -> asyncio.Task:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def stop(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _take(self, token_ids: list[int], lent: Handoff, salt: str | None, room: bool) -> None:
        outcome, name = "failed", f"pull-{uuid.uuid4().hex}"
        try:
            async with asyncio.timeout(min(lent.lease_s, PATIENCE_S)):
                keys = BlockKeys(token_ids, self._base.block_size, salt=salt)
                placement = await self._pool.choose(len(token_ids), keys)
                if room and self._worth(placement):
                    result = await self._pull(placement, token_ids, lent, name, keys, salt)
                    outcome = "done"
                    self._metrics["pulled_back_tokens_total"].inc(result.cached_tokens - placement.cached_tokens)
                else:
                    outcome = "needless"
                    await answer(self._pool.replicas.on(placement.replica.id).release.remote(lent, name))
        except (PrefillShareError, PrefixLost, TimeoutError, *CALL_ERRORS) as error:
            logger.warning("KV of %d tokens was not pulled back: %s: %s", len(token_ids), type(error).__name__, error)
        finally:
            self._metrics["pull_backs_total"].labels(outcome).inc()

    async def _pull(
        self, placement: Placement, token_ids: list[int], lent: Handoff, name: str, keys: BlockKeys, salt: str | None
    ) -> PrefillResult:
        began = time.monotonic()
        async with self._pool.calling(placement, keys=keys):
            pull = self._pool.replicas.on(placement.replica.id).pull
            result = await answer(pull.remote(token_ids, lent, name, cache_salt=salt))
        if (pair := (placement.replica.id, lent.transfer.get("remote_engine_id", ""))) in self._met:
            self._measured_at = time.monotonic()
            self._pull_s.add(self._measured_at - began, placement.missing_tokens)
        self._met.add(pair)
        return result

    def _worth(self, placement: Placement) -> bool:
        if placement.missing_tokens < self._base.block_size:
            return False
        compute_s, pull_s = self._compute_s(), self._pull_s.value
        if self._always or compute_s is None or pull_s is None or time.monotonic() - self._measured_at > MEMORY_S:
            return True  # to know it
        return pull_s < compute_s
