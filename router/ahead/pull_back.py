"""Pull-back: the prefill pool reads the KV of a response from the decode engine that made it, instead of computing it again.

In modes whose generated KV is base KV (ICaRus), the decode engine already has the KV that the next turn of any decoder needs:
 1. At the end of a session's turn the decode engine lends the context's KV, under a lease.
 2. It is pulled if pulling has lately taken less time per token than computing, or always, depending on `router.pull_back`.
    Less than a block is never pulled.
 3. The prefill replica that holds most of the context pulls what it lacks. The next turn's prefill waits for that read
    (kvshare_vllm/transfer/nixl/connector.py), however far it has come.
 4. A next turn that comes meanwhile waits for the pull, but only as long as computing those tokens would take; then the pull
    is cancelled.
 5. A loan that will not be read is given back at once. If the KV was not pulled, `otherwise` is called.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.errors import PrefillShareError, PrefixLost
from prefillshare.kvshare.handoff import Handoff, PrefillResult
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router import clock
from prefillshare.router.background import Background
from prefillshare.router.pools.cache_index import BlockKeys
from prefillshare.router.pools.calls import CALL_ERRORS, answer
from prefillshare.router.pools.pool import Placed, Pool
from prefillshare.router.service_rate import MEMORY_S, MeanRatio

logger = logging.getLogger(__name__)

#: Longest time for a pull, in seconds: meanwhile the decode engine keeps the blocks, and the next turn's prefill waits.
PATIENCE_S = 10.0


@dataclass(eq=False)
class _Pull:
    """`missing`: number of tokens to pull; all of them until the replica has been chosen."""

    token_ids: list[int]
    lent: Handoff
    salt: str | None
    done: bool = False
    task: asyncio.Task | None = None

    def __post_init__(self) -> None:
        self.missing = len(self.token_ids)


class PullBack:
    """`pool` returns the current shared prefill pool, or raises Unavailable if there is none. `when`: as
    config.Router.pull_back. `compute_s` returns the seconds that the prefill pool has lately taken to compute a token,
    None while that is not known."""

    def __init__(
        self,
        pool: Callable[[], Pool],
        base: Base,
        metrics: Metrics,
        *,
        when: str,
        limit: int,
        compute_s: Callable[[], float | None],
    ):
        self._pool, self._base, self._metrics, self._limit = pool, base, metrics, limit
        self._always = when == "always"
        self._compute_s, self._pull_s = compute_s, MeanRatio(clock.now)
        self._measured_at = -math.inf
        #: Pairs of prefill replica and decode engine that have had a pull. The first includes connecting and is not measured.
        self._met: set[tuple[str, str]] = set()
        self._background = Background(metrics)
        #: Session -> the pull of its context.
        self._of_session: dict[Hashable, _Pull] = {}

    def lent(
        self,
        session: Hashable,
        token_ids: list[int],
        lent: Handoff,
        salt: str | None,
        otherwise: Callable[[], object] | None = None,
    ) -> None:
        """A session has ended a turn. `token_ids`: its context. `lent`: the part of its KV that the decode engine lends."""
        pull = _Pull(token_ids[: lent.tokens + 1], lent, salt)
        if len(self._of_session) >= self._limit:
            self.give_back(lent, "dropped")
            return
        task = pull.task = self._background.start("pull_back", self._take(pull), session=session)
        self._of_session[session] = pull

        def ended(_) -> None:
            if self._of_session.get(session) is pull:
                del self._of_session[session]
            if otherwise and not pull.done:
                otherwise()

        task.add_done_callback(ended)

    def give_back(self, lent: Handoff, outcome: str = "unwanted") -> None:
        """Release a loan that nobody will pull; by default because the turn that made it has failed."""
        self._release(lent)
        self._count(outcome)

    async def settled(self, session: Hashable) -> None:
        """Wait until nothing is being pulled for the session. A pull that takes longer than computing would is cancelled."""
        if pull := self._of_session.get(session):
            compute_s = self._compute_s()
            timeout = PATIENCE_S if compute_s is None else min(PATIENCE_S, pull.missing * compute_s)
            _, unfinished = await asyncio.wait({pull.task}, timeout=timeout)
            for task in unfinished:
                task.cancel()

    async def made(self, session: Hashable) -> None:
        """Wait until nothing is pulled for the session."""
        if pull := self._of_session.get(session):
            await asyncio.wait({pull.task})

    async def stop(self) -> None:
        await self._background.stop()

    async def _take(self, pull: _Pull) -> None:
        outcome = "failed"
        try:
            async with asyncio.timeout(min(pull.lent.lease_s, PATIENCE_S)):
                outcome = await self._pulled_or_not(pull)
        except (PrefillShareError, PrefixLost, TimeoutError, *CALL_ERRORS) as error:
            logger.warning("KV of %d tokens was not pulled back: %s: %s", len(pull.token_ids), type(error).__name__, error)
        finally:
            self._count(outcome)

    async def _pulled_or_not(self, pull: _Pull) -> str:
        """Returns the outcome."""
        keys = BlockKeys(pull.token_ids, self._base.block_size, salt=pull.salt)
        pool = self._pool()
        placement = await pool.choose(len(pull.token_ids), keys)
        pull.missing = placement.missing_tokens
        if len(pull.token_ids) >= self._base.max_model_len or pull.missing < self._base.block_size:
            self._release(pull.lent, placement)
            return "needless"
        if not self._worth():
            self._release(pull.lent, placement)
            return "declined"
        result = await self._pull(pool, placement, pull, keys)
        pull.done = True
        self._metrics["pulled_back_tokens_total"].inc(result.cached_tokens - placement.cached_tokens)
        return "done"

    def _count(self, outcome: str) -> None:
        self._metrics["pull_backs_total"].labels(outcome).inc()

    def _release(self, lent: Handoff, placement: Placed | None = None) -> None:
        """Have any prefill replica tell the decode engine that nobody will read the loan."""
        name = _new_name()
        self._background.start("loan_release", self._have_released(lent, placement, name), request=name)

    async def _have_released(self, lent: Handoff, placement: Placed | None, name: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                pool = self._pool()
                placement = placement or await pool.choose(1, BlockKeys([0], self._base.block_size))
                await answer(pool.replicas.on(placement.replica.id).release.remote(lent, name))
        except (PrefillShareError, TimeoutError, *CALL_ERRORS) as error:
            logger.warning("a loan of %d tokens ends by itself: %s: %s", lent.tokens, type(error).__name__, error)

    async def _pull(self, pool: Pool, placement: Placed, pull: _Pull, keys: BlockKeys) -> PrefillResult:
        began = clock.now()
        pool.coming(placement, keys)
        async with pool.calling(placement):
            call = pool.replicas.on(placement.replica.id).pull
            result = await answer(call.remote(pull.token_ids, pull.lent, _new_name(), cache_salt=pull.salt))
        if (pair := (placement.replica.id, pull.lent.transfer.get("remote_engine_id", ""))) in self._met:
            self._measured_at = clock.now()
            self._pull_s.add(self._measured_at - began, placement.missing_tokens)
        self._met.add(pair)
        return result

    def _worth(self) -> bool:
        compute_s, pull_s = self._compute_s(), self._pull_s.value
        if self._always or compute_s is None or pull_s is None or clock.now() - self._measured_at > MEMORY_S:
            return True  # to measure it
        return pull_s < compute_s


def _new_name() -> str:
    return f"pull-{uuid.uuid4().hex}"
