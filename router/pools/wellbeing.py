"""Watches whether the replicas of a pool work.

1. Each replica is asked from time to time. One whose engine has died is ejected; one that does not answer, or whose engine does
   not step, is wedged.
2. Calls on a wedged replica end at once, as ReplicaLost: the turn goes on elsewhere. A replica that has died fails its calls
   itself; one that is being stopped finishes them.
3. An ejected replica is probed from time to time, and used again when it has generated a token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from prefillshare.kvshare.errors import PrefillShareError, ResumeReason, Unavailable
from prefillshare.router.pools.calls import CALL_ERRORS, Calls, answer
from prefillshare.router.pools.questions import Questions
from prefillshare.router.pools.replica import Replica

logger = logging.getLogger(__name__)


class Wellbeing:
    """Watches `replicas`, by id. `wedged_after_s`: how long a replica may leave a question unanswered, or an engine with calls
    may go without a step. `on_change` is called when a replica may no longer get work, or may again."""

    def __init__(
        self,
        pool: str,
        calls: Calls,
        questions: Questions,
        replicas: Mapping[str, Replica],
        wedged_after_s: float,
        on_change: Callable[[], None],
    ):
        self._pool, self._calls, self._questions, self._replicas = pool, calls, questions, replicas
        self.wedged_after_s, self._on_change = wedged_after_s, on_change

    def ask(self) -> None:
        for replica in self._replicas.values():
            self._questions.ask(f"stats {replica.id}", self._ask_stats(replica))
            if replica.health.probe_due:
                self._questions.ask(f"probe {replica.id}", self._probe(replica))

    async def _ask_stats(self, replica: Replica) -> None:
        active, queued_tokens = replica.active, replica.queued_tokens
        try:
            async with asyncio.timeout(self.wedged_after_s):
                stats = await answer(self._calls.on(replica.id).stats.remote())
            replica.told(stats, active, queued_tokens)
            if stats.stalled_s > self.wedged_after_s:
                self.failed(replica.id, ResumeReason.WEDGED)
        except TimeoutError:
            self.failed(replica.id, ResumeReason.WEDGED)
        except Unavailable:
            self.failed(replica.id, ResumeReason.GONE, for_good=True)
        except (*CALL_ERRORS, PrefillShareError) as error:
            logger.warning("replica %s of %s does not say how it fares: %s", replica.id, self._pool, error)

    async def _probe(self, replica: Replica) -> None:
        well = False
        try:
            async with asyncio.timeout(self.wedged_after_s):
                await answer(self._calls.on(replica.id).probe.remote())
            well = True
            logger.info("replica %s of %s is let back in", replica.id, self._pool)
        except TimeoutError:
            self.failed(replica.id, ResumeReason.WEDGED)
        except (*CALL_ERRORS, PrefillShareError) as error:
            logger.warning("replica %s of %s stays out: %s: %s", replica.id, self._pool, type(error).__name__, error)
        finally:
            replica.health.probed(well)
        if well:
            self._on_change()

    def succeeded(self, replica_id: str) -> None:
        if replica := self._replicas.get(replica_id):
            replica.health.succeeded()

    def failed(self, replica_id: str, reason: ResumeReason, *, for_good: bool = False) -> None:
        """A call on this replica failed, and not because of the request. `for_good`: the next one will fail, too."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        ejected, hangs = replica.health.failed(reason, for_good=for_good), reason is ResumeReason.WEDGED
        if ejected:
            logger.warning("replica %s of %s is ejected: %s", replica_id, self._pool, reason.value)
        if ejected or hangs:
            self._on_change()
        if hangs:
            replica.end_calls()
