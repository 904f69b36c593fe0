"""What every session store does."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import MappingProxyType

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.router.sessions.ends import Ending
from prefillshare.router.sessions.listing import Page, Place
from prefillshare.router.sessions.refusals import MAX_NAME_CHARS, Refusals
from prefillshare.router.sessions.session import Mark, OwnPart, Session
from prefillshare.router.sessions.transcript import Transcript

__all__ = ["MAX_NAME_CHARS", "Mark", "OwnPart", "Session", "SessionStore"]


class SessionStore(Refusals, ABC):
    """Sessions by tenant and name ("" is the tenant of a deployment without tenants). Bounded, with a time to live.

    A tenant neither sees another's sessions nor competes with them for names. Using a session renews its time.
    `max_per_tenant`: tenant -> most sessions it holds of the `max_sessions`; a tenant that is not named may hold all.
    A session may have a time to live of its own, which a fork inherits.
    A session may have notes, texts by key that live as long as it does; a fork begins without any.
    `evicts`: where the tenant's most sessions are held, a new one takes the place of the one that was unused for longest. No
    session of such a store has a time to live of its own.
    Where the store is not in this process, all methods may raise Unavailable, and those that name a session SessionDamaged.
    """

    def __init__(
        self,
        max_sessions: int,
        ttl_s: float,
        max_per_tenant: Mapping[str, int] | None = None,
        *,
        evicts: bool = False,
    ):
        self.max_sessions, self.ttl_s, self.evicts = max_sessions, ttl_s, evicts
        self.max_per_tenant = dict(max_per_tenant or {})

    @abstractmethod
    async def create(
        self,
        session_id: str = "",
        token_ids: Sequence[int] = (),
        *,
        tenant: str,
        cache_domain: str = "",
        transcript: Transcript | None = None,
        ttl_s: float | None = None,
        unanswered: Sequence[str] | None = None,
    ) -> Session:
        """`transcript`, `unanswered`: those of `token_ids`. Raises InvalidInput, AlreadyExists if the name is taken, Overloaded
        at the limit of the tenant or of the store."""

    @abstractmethod
    async def get(self, session_id: str, *, tenant: str) -> Session:
        """Raises NotFound."""

    @abstractmethod
    async def fork(self, session_id: str, new_session_id: str = "", *, tenant: str, at: Mark | None = None) -> Session:
        """A second session with the context as last committed, or as it was `at` that place; KV is found by content.
        Raises as `get` and `create`, and Conflict if the context is shorter than that."""

    @abstractmethod
    async def delete(self, session_id: str, *, tenant: str) -> None:
        """Raises NotFound. A turn that is under way cannot commit any more."""

    @abstractmethod
    async def listed(self, most: int, after: Place, *, tenant: str) -> Page:
        """Up to `most` of the tenant's sessions, from `after` on."""

    @abstractmethod
    async def set_ttl(self, session_id: str, ttl_s: float | None, *, tenant: str) -> Session:
        """Give a session a time to live of its own, or the store's again. Raises NotFound."""

    @abstractmethod
    async def count(self, tenant: str | None = None) -> int:
        """Sessions held: a tenant's, or by default all that `max_sessions` counts."""

    @abstractmethod
    def turn(self, session_id: str, *, tenant: str) -> AbstractAsyncContextManager[Session]:
        """Hold a session for one turn. Raises NotFound, or SessionBusy while another turn holds it."""

    @abstractmethod
    async def notes(self, session_id: str, *, tenant: str, keys: Sequence[str] | None = None) -> dict[str, str]:
        """The session's notes, or those of them that have these keys. Raises NotFound if there is no such session."""

    @abstractmethod
    async def note(self, session_id: str, notes: Mapping[str, str | None], *, tenant: str) -> None:
        """Add or replace notes of the session; those that are None are taken out. Raises NotFound."""

    @abstractmethod
    async def commit(
        self,
        session: Session,
        token_ids: Sequence[int],
        open_response: bool,
        transcript: Transcript | None = None,
        notes: Mapping[str, str | None] = MappingProxyType({}),
        own: OwnPart | None = None,
        *,
        is_turn: bool = True,
        unanswered: Sequence[str] | None = None,
        end: str = "",
    ) -> None:
        """End a turn well: the context becomes `token_ids`, which say `transcript` and leave tool calls `unanswered`; `session`
        is brought up to date. In the same step, `notes` are set as by `note`. `own`: of the agent that took the turn.
        `is_turn`: false if the session was held to be changed in another way, which is not counted. `end`: key of the note that
        belongs to where the context ends now, by which `found` finds it.

        Raises Conflict, and changes nothing, if the session was deleted or another turn has begun since.
        """

    @abstractmethod
    async def said_at(self, session: Session, tokens: int) -> Transcript | None:
        """What the first `tokens` tokens of the context say as messages, if one of its last turns has ended there; else None.
        Raises NotFound."""

    @abstractmethod
    async def found(self, said: Sequence[Transcript], *, tenant: str) -> Ending | None:
        """The end of a turn (`end` of `commit`) at which a context of this tenant said the first of these transcripts; the next
        one if there is none, or its session or its note is gone. Uses the session. One call of the store."""

    @abstractmethod
    async def check(self) -> None:
        """Raises Unavailable if the store cannot be used now."""

    @abstractmethod
    async def expires_in_s(self, session: Session) -> float:
        """Seconds until the session is forgotten if nobody uses it; 0 if it has been forgotten."""

    @abstractmethod
    async def close(self) -> None:
        """Close connections. Sessions held outside this process stay."""

    def _name(self, session_id: str) -> str:
        if len(session_id) > MAX_NAME_CHARS:
            raise InvalidInput(
                f"{len(session_id)} characters", field="session_id", fix=f"use at most {MAX_NAME_CHARS}"
            )
        if not session_id.isprintable():  # it stands in logs
            raise InvalidInput("it has line breaks or other control characters", field="session_id", fix="leave them out")
        return session_id or uuid.uuid4().hex
