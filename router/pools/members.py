"""The members of a pool. Serve pushes which replicas run (router/pools/pinned.py); a new one describes itself and joins."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from prefillshare.kvshare.errors import PrefillShareError
from prefillshare.kvshare.replica_info import ReplicaInfo
from prefillshare.router.pools.calls import CALL_ERRORS, Calls, answer
from prefillshare.router.pools.health import Health
from prefillshare.router.pools.pinned import MEMBERS, WATCHERS
from prefillshare.router.pools.questions import Questions
from prefillshare.router.pools.replica import Replica

logger = logging.getLogger(__name__)

ANSWER_S = 30.0
#: Called with a replica's id, and what it is if it has joined, or None if it has left.
Listener = Callable[[str, ReplicaInfo | None], Awaitable[None]]


class Members:
    """`replicas`: by id. `on_change` is called when one has joined or left."""

    def __init__(self, pool: str, calls: Calls, questions: Questions, on_change: Callable[[], None]):
        self._pool, self._calls, self._questions, self._on_change = pool, calls, questions, on_change
        self.replicas: dict[str, Replica] = {}
        self.listener: Listener | None = None
        #: Set when there may be replicas that have to join or leave.
        self.told = asyncio.Event()
        self._watcher: Callable[[], None] | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        WATCHERS[self._calls.deployment] = self._watcher = lambda: loop.call_soon_threadsafe(self.told.set)

    def stop(self) -> None:
        if self._watcher and WATCHERS.get(self._calls.deployment) is self._watcher:
            del WATCHERS[self._calls.deployment]

    async def reconcile(self) -> None:
        """Let replicas join and leave as Serve has last told."""
        there = MEMBERS.get(self._calls.deployment, frozenset())
        for replica in self.replicas.keys() - there:
            await self._leave(replica)
        for replica in there - self.replicas.keys():
            self._questions.ask(f"join {replica}", self._join(replica))

    async def _join(self, replica: str) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                info = await answer(self._calls.on(replica).describe.remote())
            if self.listener:
                await self.listener(replica, info)
            self.replicas[replica] = Replica(info, Health())
            logger.info("replica %s of %s has joined", replica, self._pool)
            self._on_change()
            self.told.set()  # it may have gone meanwhile
        except (*CALL_ERRORS, PrefillShareError, TimeoutError) as error:
            logger.warning("replica %s of %s does not say what it is: %s", replica, self._pool, error)

    async def _leave(self, replica: str) -> None:
        del self.replicas[replica]
        logger.info("replica %s of %s has left", replica, self._pool)
        self._on_change()
        if self.listener:
            await self.listener(replica, None)
