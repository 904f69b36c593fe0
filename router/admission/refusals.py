"""Refused turns: the reasons, the errors that clients get, and their count."""

from __future__ import annotations

from enum import StrEnum

from prefillshare.kvshare.errors import InvalidInput, OverLimit, Overloaded, PrefillShareError, Unavailable
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.admission.grant import Grant

#: Bounds of the hint when to try again, in seconds.
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 60.0


class Refusal(StrEnum):
    NEVER_FITS = "never_fits"
    NO_REPLICA = "no_replica"
    TENANT_LIMIT = "tenant_limit"
    TURNS_PER_MINUTE = "turns_per_minute"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    TOO_LATE = "too_late"
    QUEUE_FULL = "queue_full"
    WAITED_TOO_LONG = "waited_too_long"


class Refusals:
    def __init__(self, metrics: Metrics):
        self._total = metrics["turns_refused_total"]

    def never_fits(self, grant: Grant) -> InvalidInput:
        pool, has = grant.line.pool, grant.line.room.largest
        return self._counted(Refusal.NEVER_FITS, grant, InvalidInput(
            f"the turn needs {grant.blocks} KV blocks, a replica of pool {pool!r} has {has}",
            fix="send a shorter prompt or ask for fewer tokens, or raise kv_cache_gib of the pool",
        ))

    def no_replica(self, grant: Grant) -> Unavailable:
        return self._counted(Refusal.NO_REPLICA, grant, Unavailable(
            f"no replica of {grant.line.pool} is ready", fix="try again when it has started"
        ))

    def overloaded(self, reason: Refusal, grant: Grant, message: str, retry_s: float) -> Overloaded:
        retry_s = min(max(retry_s, LEAST_RETRY_S), MOST_RETRY_S)
        kind = OverLimit if reason is Refusal.TENANT_LIMIT else Overloaded
        error = kind(message, retry_after_s=retry_s, fix=f"try again in {retry_s:.0f} s")
        return self._counted(reason, grant, error)

    def _counted(self, reason: Refusal, grant: Grant, error: PrefillShareError):
        self._total.labels(grant.line.pool, reason.value).inc()
        return error
