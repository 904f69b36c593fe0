"""Sessions: a context as token ids, extended turn by turn. In memory: one router replica."""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvshare.errors import Conflict, InvalidInput, NotFound, Overloaded


@dataclass
class Session:
    session_id: str
    token_ids: tuple[int, ...] = ()
    turns: int = 0
    #: True while the context ends in a response to chat messages that nobody has closed yet (router/chat.py).
    open_response: bool = False
    #: Prefill replica that holds this context's KV, per pool of prefill engines.
    prefilled_on: dict[str, str] = field(default_factory=dict)
    busy: bool = False
    used_at: float = 0.0
    tenant: str = ""
    #: Where this context's KV is shared (kvshare/caller.py).
    cache_domain: str = ""


class SessionStore:
    """Bounded, with a time to live. One turn at a time per session."""

    def __init__(self, max_sessions: int, ttl_s: float, clock: Callable[[], float] = time.monotonic):
        self._max, self.ttl_s, self._clock = max_sessions, ttl_s, clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        self._forget_expired()
        return len(self._sessions)

    def create(self, session_id: str = "", token_ids: Sequence[int] = (), **state) -> Session:
        self._forget_expired()
        session_id = session_id or uuid.uuid4().hex
        if len(session_id) > 128:
            raise InvalidInput(f"{len(session_id)} characters", field="session_id", fix="use at most 128")
        if session_id in self._sessions:
            raise Conflict(
                f"session {session_id!r} exists already", field="session_id", fix="choose another name or leave it out"
            )
        if len(self._sessions) >= self._max:
            raise Overloaded(
                f"{self._max} sessions are held (router.max_sessions)",
                retry_after_s=min(self.ttl_s, 60.0),
                fix="delete sessions that are done",
            )
        session = self._sessions[session_id] = Session(session_id, tuple(token_ids), used_at=self._clock(), **state)
        return session

    def get(self, session_id: str) -> Session:
        self._forget_expired()
        try:
            session = self._sessions[session_id]
        except KeyError:
            raise NotFound(
                f"no session {session_id!r}; it was never made, deleted, or unused for {self.ttl_s:g} s", field="session_id"
            ) from None
        session.used_at = self._clock()
        self._sessions.move_to_end(session_id)
        return session

    def fork(self, session_id: str, new_session_id: str = "") -> Session:
        """A second session with the same context. Token ids are shared, KV is found by content."""
        old = self.get(session_id)
        return self.create(
            new_session_id,
            old.token_ids,
            turns=old.turns,
            open_response=old.open_response,
            prefilled_on=dict(old.prefilled_on),
            tenant=old.tenant,
            cache_domain=old.cache_domain,
        )

    def delete(self, session_id: str) -> None:
        self.get(session_id)
        del self._sessions[session_id]

    def expires_in_s(self, session: Session) -> float:
        return max(0.0, session.used_at + self.ttl_s - self._clock())

    @contextmanager
    def turn(self, session_id: str) -> Iterator[Session]:
        """Hold a session for one turn. A second turn meanwhile gets Conflict."""
        session = self.get(session_id)
        if session.busy:
            raise Conflict(
                f"another turn runs on session {session_id!r}",
                field="session_id",
                fix="wait for it to end, or fork the session",
            )
        session.busy = True
        try:
            yield session
        finally:
            session.busy = False
            if self._sessions.get(session_id) is session:
                session.used_at = self._clock()
                self._sessions.move_to_end(session_id)

    def commit(self, session: Session, token_ids: Sequence[int], open_response: bool) -> None:
        """End a turn well: the context becomes `token_ids`. Raises Conflict if the session was deleted meanwhile."""
        if self._sessions.get(session.session_id) is not session:
            raise Conflict(f"session {session.session_id!r} was deleted during the turn", field="session_id")
        session.token_ids, session.open_response = tuple(token_ids), open_response
        session.turns += 1

    def _forget_expired(self) -> None:
        limit = self._clock() - self.ttl_s
        expired = []
        for session in self._sessions.values():
            if session.used_at > limit:
                break
            if not session.busy:
                expired.append(session.session_id)
        for session_id in expired:
            del self._sessions[session_id]
