"""Handoffs that nobody will read: their leases are ended early, behind the turn's back."""

from __future__ import annotations

import asyncio
import logging

from kvshare.errors import PrefillShareError
from kvshare.handoff import Handoff
from kvshare.metrics import Metrics
from router.background import Background
from router.pools import Pool
from router.replicas import CALL_ERRORS

logger = logging.getLogger(__name__)


class Releases:
    def __init__(self, metrics: Metrics):
        self._background = Background(metrics)

    def have_released(self, decode: Pool, handoff: Handoff, request_id: str) -> None:
        """Have any decode replica say that nobody will read it. If none can, the lease ends by itself."""
        if usable := decode.replicas.usable():
            releasing = self._release(decode, usable[0].id, handoff, request_id)
            self._background.start("handoff_release", releasing, request=request_id)

    async def _release(self, decode: Pool, replica: str, handoff: Handoff, request_id: str) -> None:
        try:
            async with asyncio.timeout(handoff.lease_s):
                await decode.replicas.on(replica).release.remote(handoff, request_id)
        except (TimeoutError, *CALL_ERRORS, PrefillShareError) as error:
            told = {"request_id": request_id}
            logger.warning("request %s: its KV stays leased for %g s: %s", request_id, handoff.lease_s, error, extra=told)
