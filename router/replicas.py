"""The replicas of one Serve deployment as the router sees them: who is there, how busy, and how to call one."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import contextmanager

from ray.serve.exceptions import DeploymentUnavailableError

from kvshare.errors import Unavailable

logger = logging.getLogger(__name__)

REFRESH_S = 2.0
POLL_S = 0.2


class ReplicaSet:
    """Ids of the running replicas of `handle`'s deployment, refreshed every REFRESH_S, and outstanding calls per replica."""

    def __init__(self, name: str, handle):
        self.name = name
        self._handle = handle.options(_by_reference=False)
        self._streams = handle.options(stream=True, _by_reference=False)
        self._discover = handle
        self.ids: tuple[str, ...] = ()
        self.outstanding: Counter[str] = Counter()
        self._task: asyncio.Task | None = None

    async def start(self, timeout_s: float) -> None:
        """Wait for the first replica: all deployments of an application start at once."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.ids:
                    try:
                        await self.refresh()
                    except (DeploymentUnavailableError, TimeoutError):
                        await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Unavailable(f"no replica of {self.name} has started within {timeout_s:g} s") from None
        self._task = asyncio.create_task(self._keep_fresh())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def refresh(self) -> None:
        ids = await self._discover.broadcast("replica_id").results_async(timeout_s=10)
        self.ids = tuple(sorted(ids))

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.refresh()
            except Exception as error:
                logger.warning("Cannot list replicas of %s: %s: %s", self.name, type(error).__name__, error)

    def lost(self, replica: str) -> None:
        """Forget a replica a call found gone, until the next refresh."""
        self.ids = tuple(r for r in self.ids if r != replica)

    @contextmanager
    def using(self, replica: str):
        self.outstanding[replica] += 1
        try:
            yield
        finally:
            self.outstanding[replica] -= 1
            if not self.outstanding[replica]:
                del self.outstanding[replica]

    def on(self, replica: str):
        """Handle whose calls go to this replica."""
        return self._handle.options(session_id=replica)

    def streaming_on(self, replica: str):
        return self._streams.options(session_id=replica)
