"""What stands in Redis for the parts of a session, and what is read from there (router/sessions/scripts.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from prefillshare.router.sessions.session import OwnPart
from prefillshare.router.sessions.transcript import Transcript


def ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def written(state: Transcript | OwnPart | None) -> str:
    return "" if state is None else str(state)


def text_of(stored: bytes | None) -> str:
    return (stored or b"").decode("ascii", "replace")


def own_ttl(ttl_s: float | None) -> int | str:
    return "" if ttl_s is None else ms(ttl_s)


def listed_calls(calls: Sequence[str] | None) -> str:
    return "" if calls is None else json.dumps(list(calls))


def calls_of(listed: bytes | None) -> tuple[str, ...] | None:
    """The inverse; None for anything that is not a list of ids, too."""
    try:
        calls = json.loads(listed or b"null")
    except (ValueError, RecursionError):
        return None
    known = isinstance(calls, list) and all(isinstance(call, str) for call in calls)
    return tuple(calls) if known else None


def pairs(listed: Sequence[bytes]) -> dict[str, bytes]:
    return {key.decode("utf-8", "replace"): text for key, text in zip(listed[::2], listed[1::2], strict=True)}


def packed(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, dtype="<u4").tobytes()
