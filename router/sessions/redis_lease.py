"""A turn's hold on a session in Redis: a lease that its router renews as long as the turn runs, and gives back at its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from prefillshare.kvshare.errors import PrefillShareError, Unavailable
from prefillshare.router.redis_calls import ms
from prefillshare.router.sessions import turn_scripts

logger = logging.getLogger(__name__)

#: Pause before a renewal that has failed is tried again, seconds.
RETRY_S = 0.1


class Lease:
    """`ask` runs a script for the session, with the turn's id and these further arguments. Raises PrefillShareError."""

    def __init__(self, ask: Callable[..., Awaitable[list]], session_id: str, turn_id: str, lease_s: float):
        self._ask, self._session_id, self._turn_id, self._lease_s = ask, session_id, turn_id, lease_s

    @asynccontextmanager
    async def renewed(self) -> AsyncIterator[None]:
        """The lease, which has begun, is renewed meanwhile and ends with the block."""
        renewal = asyncio.create_task(self._renew())
        try:
            yield
        finally:
            renewal.cancel()
            await asyncio.wait([renewal])
            await self.end()

    async def end(self) -> None:
        try:
            await self._ask(turn_scripts.END, self._turn_id)
        except PrefillShareError as error:
            logger.warning("session %r is held for up to %g s: %s", self._session_id, self._lease_s, error)

    async def _renew(self) -> None:
        """If the turn has lost its session, its commit will say so."""
        pause_s = self._lease_s / 3
        while True:
            await asyncio.sleep(pause_s)
            pause_s = self._lease_s / 3
            try:
                answer = await self._ask(turn_scripts.RENEW, self._turn_id, ms(self._lease_s))
            except Unavailable as error:
                logger.warning("turn %s on session %r: not renewed: %s", self._turn_id, self._session_id, error)
                pause_s = min(RETRY_S, pause_s)
                continue
            if answer[0] != b"ok":
                logger.warning("turn %s no longer holds session %r", self._turn_id, self._session_id)
                return
