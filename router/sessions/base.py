"""What a session is, and what every session store does. Errors for clients are worded here, once for all stores."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from prefillshare.kvshare.errors import (
    AlreadyExists,
    Conflict,
    InvalidInput,
    NotFound,
    Overloaded,
    SessionBusy,
    SessionDamaged,
)
from prefillshare.router.sessions.listing import Page, Place
from prefillshare.router.sessions.transcript import Transcript

MAX_NAME_CHARS = 128


@dataclass(frozen=True)
class OwnPart:
    """An agent's own part of the prompt, which the context does not contain: where it stands in its agent's turns, as long as
    these follow each other, in tokens of the context, and a digest of it."""

    tokens: int
    digest: str

    def __str__(self) -> str:
        """For a store; `parsed` is the inverse."""
        return f"{self.tokens}:{self.digest}"

    @classmethod
    def parsed(cls, written: str) -> OwnPart | None:
        """None for what `__str__` has not written."""
        tokens, _, digest = written.partition(":")
        return cls(int(tokens), digest) if tokens.isascii() and tokens.isdigit() and digest else None


@dataclass(frozen=True)
class Mark:
    """A place in a session's context at which a turn has ended: `tokens` before it, and what a Session says of them."""

    tokens: int
    open_response: bool = False
    transcript: Transcript | None = None
    own: OwnPart | None = None


@dataclass
class Session:
    """A session as it was when the store was asked. Only a commit by the turn that holds it changes what is stored."""

    session_id: str
    tenant: str = ""
    token_ids: tuple[int, ...] = ()
    turns: int = 0
    #: True while the context ends in a response to chat messages that has not been closed yet (router/sessions/chat.py).
    open_response: bool = False
    #: Pool -> replica that its last turn ran on, for prefill and decode. What a turn changes here is stored by its commit.
    replicas: dict[str, str] = field(default_factory=dict)
    #: Cache domain within which this session's KV is shared; a fork has its parent's.
    cache_domain: str = ""
    #: What the context says as chat messages; None if it does not consist of messages only.
    transcript: Transcript | None = None
    #: That of the agent that took the last turn; None: it had none, or the turn was not a chat's.
    own: OwnPart | None = None
    #: A turn holds it.
    busy: bool = False
    #: Grows with every commit. A commit is refused if the stored version is not the one that its turn began from.
    version: int = 0
    #: The turn that this object was handed to; empty outside a turn.
    turn_id: str = ""
    #: Its own time to live in seconds; None: the store's.
    ttl_s: float | None = None
    #: Ids of the tool calls in its context that no result answers; None: not known.
    calls: tuple[str, ...] | None = None

    @property
    def mark(self) -> Mark:
        """The end of the context."""
        return Mark(len(self.token_ids), self.open_response, self.transcript, self.own)

    def at(self, mark: Mark) -> Session:
        """The session as it was at that place."""
        state = {"open_response": mark.open_response, "transcript": mark.transcript, "own": mark.own, "calls": None}
        return replace(self, token_ids=self.token_ids[: mark.tokens], **state)


class SessionStore(ABC):
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
        calls: Sequence[str] | None = None,
    ) -> Session:
        """`transcript`, `calls`: those of `token_ids`. Raises InvalidInput, AlreadyExists if the name is taken, Overloaded at
        the limit of the tenant or of the store."""

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
        notes: Mapping[str, str] = MappingProxyType({}),
        own: OwnPart | None = None,
        *,
        is_turn: bool = True,
        calls: Sequence[str] | None = None,
    ) -> None:
        """End a turn well: the context becomes `token_ids`, which say `transcript` and leave `calls` unanswered; `session` is
        brought up to date. In the same step, `notes` are added. `own`: of the agent that took the turn. `is_turn`: false if
        the session was held to be changed in another way, which is not counted.

        Raises Conflict, and changes nothing, if the session was deleted or another turn has begun since.
        """

    @abstractmethod
    async def said_at(self, session: Session, tokens: int) -> Transcript | None:
        """What the first `tokens` tokens of the context say as messages, if one of its last turns has ended there; else None.
        Raises NotFound."""

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
        return session_id or uuid.uuid4().hex

    def _missing(self, session_id: str) -> NotFound:
        return NotFound(
            f"no session {session_id[:MAX_NAME_CHARS]!r}; it was never made, deleted, or unused for {self.ttl_s:g} s"
            " (or for a time to live of its own)",
            field="session_id",
        )

    @staticmethod
    def damaged(session_id: str) -> SessionDamaged:
        return SessionDamaged(
            f"session {session_id[:MAX_NAME_CHARS]!r} is damaged in the session store and cannot be read",
            field="session_id",
            fix="delete it and start a new session",
        )

    def _exists(self, session_id: str) -> AlreadyExists:
        return AlreadyExists(
            f"session {session_id!r} exists already", field="session_id", fix="choose another name or leave it out"
        )

    def _limit_of(self, tenant: str) -> int:
        return self.max_per_tenant.get(tenant, self.max_sessions)

    def _shorter(self, session_id: str, at: Mark) -> Conflict:
        return Conflict(
            f"the context of session {session_id!r} is shorter than {at.tokens} tokens by now",
            field="session_id",
            fix="go on from where it ends",
        )

    def _full(self, tenant: str) -> Overloaded:
        """The error for a tenant that holds as many sessions as it may."""
        if tenant not in self.max_per_tenant:
            return self._all_full()
        return Overloaded(
            f"tenant {tenant!r} holds {self._limit_of(tenant)} sessions, which is its most",
            field=f"tenants.{tenant}.max_sessions",
            retry_after_s=min(self.ttl_s, 60.0),
            fix="delete sessions that are done, or have the limit raised in the keys file",
        )

    def _all_full(self) -> Overloaded:
        return Overloaded(
            f"{self.max_sessions} sessions are held, which is the most",
            field="router.max_sessions",
            retry_after_s=min(self.ttl_s, 60.0),
            fix="delete sessions that are done",
        )

    def _busy(self, session_id: str) -> SessionBusy:
        return SessionBusy(
            f"another turn runs on session {session_id!r}",
            field="session_id",
            fix="wait for it to end, or fork the session",
        )

    def _deleted(self, session: Session) -> Conflict:
        return Conflict(f"session {session.session_id!r} was deleted during the turn", field="session_id")

    def _lost(self, session: Session) -> Conflict:
        return Conflict(
            f"the turn no longer holds session {session.session_id!r}", field="session_id", fix="take the turn again"
        )

    @staticmethod
    def _committed(
        session: Session,
        token_ids: Sequence[int],
        open_response: bool,
        transcript: Transcript | None,
        own: OwnPart | None,
        is_turn: bool,
        calls: Sequence[str] | None,
    ) -> None:
        session.token_ids, session.open_response = tuple(token_ids), open_response
        session.transcript, session.own = transcript, own
        session.calls = None if calls is None else tuple(calls)
        session.turns += is_turn
        session.version += 1
