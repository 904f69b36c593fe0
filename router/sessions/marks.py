"""Where turns have ended in a session's context: what a context says as messages is known again when it is truncated to there.

A mark names a length, a digest of the tokens up to there, and what they say. Because of the digest it stays true whatever
becomes of the tokens behind: it is used only for a context that begins with the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from prefillshare.router.sessions.transcript import Transcript

#: Most marks of a session; each new one takes the place of the oldest.
MOST_MARKS = 64


def mark_of(token_ids: Sequence[int], transcript: Transcript | None) -> str:
    """The mark at the end of this context, for a store; "" if it does not consist of messages."""
    return f"{len(token_ids)}:{_digest(token_ids)}:{transcript}" if transcript is not None else ""


def said_by(token_ids: Sequence[int], marks: Iterable[str]) -> Transcript | None:
    """What this context says as messages; None if no mark tells."""
    if not token_ids:
        return Transcript()
    beginning = f"{len(token_ids)}:"
    found = [mark for mark in marks if mark.startswith(beginning)]
    digest = f"{beginning}{_digest(token_ids)}:" if found else ""
    return next((Transcript.parsed(mark.removeprefix(digest)) for mark in found if mark.startswith(digest)), None)


def _digest(token_ids: Sequence[int]) -> str:
    return hashlib.blake2b(np.asarray(token_ids, dtype="<u4").tobytes(), digest_size=16).hexdigest()
