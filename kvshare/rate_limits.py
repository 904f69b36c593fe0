"""How a call's tenant stands against its limits per minute, told to the client by the surface that took the call.

The turn notes it (`note`) and the surface tells it: headers that OpenAI's and Anthropic's clients read, or gRPC's trailing
metadata. A surface begins with `listen`, in the call's own context; the tasks that serve the call inherit what it returns.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

#: What OpenAI's and Anthropic's headers call turns and tokens.
REQUESTS, TOKENS = "requests", "tokens"


@dataclass(frozen=True)
class Allowance:
    """One limit. `what`: REQUESTS or TOKENS; `limit`: a minute's; `reset_s`: seconds until all of it is there again, if nothing
    more is taken."""

    what: str
    limit: int
    remaining: int
    reset_s: float


#: A tenant's allowances; empty if no limit applies.
Standing = tuple[Allowance, ...]


class Told:
    """What the turns of one call have noted: of several, the one that leaves least."""

    def __init__(self) -> None:
        self._least: dict[str, Allowance] = {}

    def note(self, standing: Standing) -> None:
        for allowance in standing:
            known = self._least.get(allowance.what)
            if known is None or allowance.remaining <= known.remaining:
                self._least[allowance.what] = allowance

    @property
    def standing(self) -> Standing:
        return tuple(self._least.values())


_told: ContextVar[Told | None] = ContextVar("prefillshare_rate_limits", default=None)


def listen() -> Told:
    """What the turns of this call note from now on."""
    told = Told()
    _told.set(told)
    return told


def note(standing: Standing) -> None:
    """The tenant of the call that is being served stands like this."""
    if told := _told.get():
        told.note(standing)


def headers_now() -> list[tuple[str, str]]:
    """`headers` of what has been noted in this call."""
    told = _told.get()
    return headers(told.standing) if told else []


def headers(standing: Standing) -> list[tuple[str, str]]:
    """As OpenAI's API has them (https://platform.openai.com/docs/guides/rate-limits)."""
    return [
        pair
        for one in standing
        for pair in (
            (f"x-ratelimit-limit-{one.what}", str(one.limit)),
            (f"x-ratelimit-remaining-{one.what}", str(one.remaining)),
            (f"x-ratelimit-reset-{one.what}", duration(one.reset_s)),
        )
    ]


def anthropic_headers(standing: Standing, now: datetime | None = None) -> list[tuple[str, str]]:
    """As Anthropic's API has them (https://docs.claude.com/en/api/rate-limits)."""
    now = now or datetime.now(UTC)
    return [
        pair
        for one in standing
        for pair in (
            (f"anthropic-ratelimit-{one.what}-limit", str(one.limit)),
            (f"anthropic-ratelimit-{one.what}-remaining", str(one.remaining)),
            (f"anthropic-ratelimit-{one.what}-reset", _moment(now + timedelta(seconds=one.reset_s))),
        )
    ]


def duration(seconds: float) -> str:
    """As OpenAI writes it: "20ms", "8.64s", "6m0s", "1h0m5s"."""
    ms = math.ceil(round(seconds * 1000, 6))
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    rest = f"{ms / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{rest}"
    return f"{minutes}m{rest}" if minutes else rest


def _moment(when: datetime) -> str:
    return when.replace(microsecond=0).isoformat().replace("+00:00", "Z")
