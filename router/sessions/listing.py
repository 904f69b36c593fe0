"""Pages of a tenant's sessions, for those who keep an account of them. Being listed does not renew a session's time.

They come in the order in which they would be forgotten. A session that is used between two pages moves to the end: it may come
twice, but none that was there all the time is left out.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from prefillshare.kvshare.errors import InvalidInput

USUAL_PER_PAGE, MOST_PER_PAGE = 100, 1000


@dataclass(frozen=True)
class Listed:
    """A session without its context. Of a damaged one, which can only be deleted, no more than its name is known."""

    session_id: str
    expires_in_s: float
    tokens: int = 0
    turns: int = 0
    ttl_s: float = 0.0
    cache_domain: str = ""
    busy: bool = False
    damaged: bool = False


@dataclass(frozen=True)
class Place:
    """Behind which session a page begins: when that one would be forgotten, as its store counts time, and its name there."""

    expires: str = ""
    name: str = ""

    def token(self) -> str:
        """For clients, to whom it says nothing; "" is the beginning."""
        if not self.expires:
            return ""
        return base64.urlsafe_b64encode(json.dumps([self.expires, self.name]).encode()).decode()

    @classmethod
    def of(cls, token: str) -> Place:
        """The inverse of `token`. Raises InvalidInput for what no store's place is written as: stores take a place as it is."""
        if not token:
            return cls()
        try:
            expires, name = json.loads(base64.urlsafe_b64decode(token))
            place = cls(expires, name)
            if _is_written(expires) and _is_name(name) and place.token() == token:
                return place
        except (ValueError, TypeError, RecursionError, binascii.Error):
            pass
        raise InvalidInput(
            "no page begins there", field="page_token", fix="use next_page_token of the page before, or leave it out"
        )


def _is_written(expires: object) -> bool:
    """Whether a store writes a moment in this way: Redis as whole milliseconds, memory as Python's own form of a float."""
    if not isinstance(expires, str):
        return False
    moment = float(expires)
    return math.isfinite(moment) and expires in (str(int(moment)), repr(moment))


def _is_name(name: object) -> bool:
    """No store has half of a pair of surrogates in a name, which cannot be sent to it either."""
    return isinstance(name, str) and name == name.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Page:
    """`next`: where the next page begins; None: this is the last one."""

    sessions: Sequence[Listed]
    next: Place | None


def per_page(asked: int) -> int:
    """How many sessions a page has for a client that asked for so many; 0: as many as usual. Raises InvalidInput."""
    if asked < 0:
        raise InvalidInput(f"{asked} is out of range", field="page_size", fix=f"use 1 to {MOST_PER_PAGE}, or leave it out")
    return min(asked, MOST_PER_PAGE) or USUAL_PER_PAGE
