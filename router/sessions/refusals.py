"""What session stores refuse, in words for clients, once for all stores."""

from __future__ import annotations

from collections.abc import Mapping

from prefillshare.kvshare.errors import AlreadyExists, Conflict, NotFound, Overloaded, SessionBusy, SessionDamaged
from prefillshare.router.sessions.session import Mark, Session

MAX_NAME_CHARS = 128


class Refusals:
    """Of a store with these limits."""

    max_sessions: int
    ttl_s: float
    max_per_tenant: Mapping[str, int]

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
