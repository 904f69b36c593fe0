"""What stands in Redis for the parts of a session, and what is read from there (router/sessions/script_parts.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from prefillshare.router.redis_calls import ms
from prefillshare.router.sessions.listing import Listed
from prefillshare.router.sessions.session import OwnPart, Session
from prefillshare.router.sessions.transcript import Transcript

#: Largest token id that clients can be sent (protos/prefillshare/v1: int32).
MAX_TOKEN_ID = 2**31 - 1


def written(state: Transcript | OwnPart | None) -> str:
    return "" if state is None else str(state)


def text_of(stored: bytes | None) -> str:
    return (stored or b"").decode("ascii", "replace")


def own_ttl(ttl_s: float | None) -> int | str:
    return "" if ttl_s is None else ms(ttl_s)


def ids_text(ids: Sequence[str] | None) -> str:
    return "" if ids is None else json.dumps(list(ids))


def ids_of(stored: bytes | None) -> tuple[str, ...] | None:
    """The inverse; None for anything that is not a list of ids, too."""
    try:
        ids = json.loads(stored or b"null")
    except (ValueError, RecursionError):
        return None
    known = isinstance(ids, list) and all(isinstance(one, str) for one in ids)
    return tuple(ids) if known else None


def listed_notes(notes: Mapping[str, str | None]) -> list[str]:
    """As script_parts.py's `set_notes` reads them."""
    return [part for key, text in notes.items() for part in (key, "" if text is None else f"+{text}")]


def pairs(listed: Sequence[bytes]) -> dict[str, bytes]:
    return {key.decode("utf-8", "replace"): text for key, text in zip(listed[::2], listed[1::2], strict=True)}


def packed(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, dtype="<u4").tobytes()


def session_of(answer: list, tenant: str, session_id: str) -> tuple[Session | None, str]:
    """From an answer of script_parts.py's `load`, which has checked its numbers: the session, None if it is damaged, and the
    tokenizer that its token ids are of."""
    _, tokens, busy, (turns, is_open, prefilled, domain, version, transcript, tokenizer, own, ttl, waiting) = answer
    token_ids, theirs = np.frombuffer(tokens, dtype="<u4"), text_of(tokenizer)
    try:
        replicas, cache_domain = json.loads(prefilled), domain.decode()
    except (ValueError, RecursionError):
        return None, theirs
    named = isinstance(replicas, dict) and all(isinstance(replica, str) for replica in replicas.values())
    if not named or token_ids.max(initial=0) > MAX_TOKEN_ID:
        return None, theirs
    session = Session(
        session_id,
        tenant,
        tuple(token_ids.tolist()),
        int(turns),
        is_open == b"1",
        replicas,
        cache_domain,
        Transcript.parsed(text_of(transcript)),
        OwnPart.parsed(text_of(own)),
        bool(busy),
        int(version),
        ttl_s=int(ttl) / 1000 if ttl else None,
        unanswered=ids_of(waiting),
    )
    return session, theirs


def listed_of(row: list, whose: int, usual_ttl_s: float) -> Listed:
    """From a row of scripts.py's LIST. `whose`: bytes before a session's own name."""
    name, _, expires_ms, status, *state = row
    session_id, expires_in_s = name[whose:].decode("utf-8", "replace"), max(0, expires_ms) / 1000
    if status != b"ok":
        return Listed(session_id, expires_in_s, damaged=True)
    tokens, turns, ttl, domain, busy = state
    ttl_s = int(ttl) / 1000 if ttl else usual_ttl_s
    return Listed(session_id, expires_in_s, int(tokens), int(turns), ttl_s, domain.decode("utf-8", "replace"), bool(busy))
