"""Decides whether a turn that has lost its prefix or its replica goes on or fails."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from prefillshare.kvshare.errors import PrefixLost, ReplicaLost, ResumeReason, Unavailable
from prefillshare.router import clock
from prefillshare.router.turn.wedging import check_may_go_on

if TYPE_CHECKING:
    from prefillshare.router.turn.turn import Turn

logger = logging.getLogger(__name__)

#: Pause before a turn tries again after a replica failed it, doubled each time.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0


async def take_up_again(turn: Turn, lost: PrefixLost | ReplicaLost) -> None:
    """Count the loss, wait for room, and pause if a replica failed. Raises Unavailable if this has happened to the turn too
    often, and InvalidInput if the turn may be what stops engines (wedging.py)."""
    check_may_go_on(turn, lost)
    config, decoder, request_id = turn.services.config, turn.decoder.name, turn.call.request_id
    turn.services.counted.resumed(decoder, lost.reason, turn.lease_ends - clock.now())
    turn.usage.resumes += 1
    turn.span.add_event("taken up again", {"reason": lost.reason.value})
    turn.number += 1
    preempted = lost.reason is ResumeReason.PREEMPTED
    turn.failures += not preempted
    if turn.usage.resumes > config.max_resumes:
        raise Unavailable(
            f"request {request_id} was resumed {config.max_resumes} times: {lost}",
            fix="give the decode pool more KV cache (kv_cache_gib)",
        ) from lost
    if turn.failures > config.max_retries:
        raise Unavailable(f"request {request_id} failed on {turn.failures} replicas; the last: {lost}") from lost
    told = {"request_id": request_id, "decoder": decoder, "reason": lost.reason.value}
    logger.info("request %s resumes after %d tokens: %s", request_id, len(turn.generated), lost, extra=told)
    if lost.reason is ResumeReason.KV_LOAD_FAILED and turn.choice:
        turn.avoid.add(turn.choice.placed.replica.id)
    await turn.grant.readmit(len(turn.generated))
    if not preempted:
        await asyncio.sleep(min(FIRST_PAUSE_S * 2 ** (turn.failures - 1), LONGEST_PAUSE_S))
