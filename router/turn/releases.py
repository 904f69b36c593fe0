"""Handoffs that nobody will read: their leases are ended early, in the background."""

from __future__ import annotations

import asyncio
import logging

from prefillshare.kvshare.errors import PrefillShareError
from prefillshare.kvshare.handoff import Handoff, PrefillResult
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.background import Background
from prefillshare.router.pools.calls import CALL_ERRORS, answer
from prefillshare.router.pools.pool import Pool

logger = logging.getLogger(__name__)

#: Seconds that a prefill may still take when nobody waits for it any more.
LAST_WORD_S = 0.25
#: Seconds that a cancelled call may take to end, with or without an answer.
TAKEN_BACK_S = 5.0


class Releases:
    def __init__(self, metrics: Metrics):
        self._background = Background(metrics)

    async def answered(self, call, decode: Pool, request_id: str, source: str = "") -> PrefillResult:
        """Wait for the answer of a prefill call. If the turn is cancelled meanwhile, the call is not cancelled at once: its
        answer may be on its way, and only the answer says what is leased."""
        answering = asyncio.create_task(answer(call))
        try:
            return await asyncio.shield(answering)
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                ending = self._end(call, answering, decode, request_id, source)
                self._background.start("handoff_release", ending, request=request_id)
            raise

    async def _end(
        self, call, answering: asyncio.Task[PrefillResult], decode: Pool, request_id: str, source: str
    ) -> None:
        await asyncio.wait({answering}, timeout=LAST_WORD_S)
        if not answering.done():
            call.cancel()  # its answer may be on the way by now
            await asyncio.wait({answering}, timeout=TAKEN_BACK_S)
        answering.cancel()
        await asyncio.wait({answering})
        if not answering.cancelled() and not answering.exception() and (handoff := answering.result().handoff):
            self.have_released(decode, handoff, request_id, source)

    def have_released(self, decode: Pool, handoff: Handoff, request_id: str, source: str = "") -> None:
        """Have any decode replica, but not the `source` itself, say that nobody will read the handoff. If none can, the lease
        ends by itself."""
        others = [replica.id for replica in decode.replicas.usable() if replica.id != source]
        if others:
            self._tell(decode.replicas.on(others[0]).release, handoff, request_id)

    def give_up(self, decode: Pool, replica: str, handoff: Handoff, request_id: str) -> None:
        """Tell a decode replica that a turn has ended while its call there was under way; it may or may not have arrived."""
        self._tell(decode.replicas.on(replica).give_up, handoff, request_id)

    def _tell(self, method, handoff: Handoff, request_id: str) -> None:
        self._background.start("handoff_release", self._told(method, handoff, request_id), request=request_id)

    async def _told(self, method, handoff: Handoff, request_id: str) -> None:
        try:
            async with asyncio.timeout(handoff.lease_s):
                await method.remote(handoff, request_id)
        except (TimeoutError, *CALL_ERRORS, PrefillShareError) as error:
            told = {"request_id": request_id}
            logger.warning("request %s: its KV stays leased for %g s: %s", request_id, handoff.lease_s, error, extra=told)
