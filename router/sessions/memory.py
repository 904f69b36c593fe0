"""Sessions in the memory of a deployment's only router. They are lost when it ends."""

from __future__ import annotations

import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from prefillshare.router.clock import now
from prefillshare.router.sessions.base import Mark, OwnPart, Session, SessionStore
from prefillshare.router.sessions.transcript import Transcript


@dataclass
class _Record:
    """`session` is never handed out: callers get copies, as they do from a store outside this process."""

    session: Session
    used_at: float
    turn_id: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    def copy(self, turn_id: str = "") -> Session:
        kept = self.session
        return replace(kept, replicas=dict(kept.replicas), busy=bool(self.turn_id), turn_id=turn_id)


class MemorySessions(SessionStore):
    """No method waits, so each is atomic for the event loop's other tasks."""

    def __init__(
        self,
        max_sessions: int,
        ttl_s: float,
        max_per_tenant: Mapping[str, int] | None = None,
        clock: Callable[[], float] = now,
        *,
        evicts: bool = False,
    ):
        super().__init__(max_sessions, ttl_s, max_per_tenant, evicts=evicts)
        self._clock = clock
        self._records: OrderedDict[tuple[str, str], _Record] = OrderedDict()  # least recently used first
        self._held: Counter[str] = Counter()  # by tenant, as in _records

    async def create(
        self,
        session_id: str = "",
        token_ids: Sequence[int] = (),
        *,
        tenant: str,
        cache_domain: str = "",
        transcript: Transcript | None = None,
    ) -> Session:
        new = Session(
            self._name(session_id), tenant, tuple(token_ids), cache_domain=cache_domain, transcript=transcript
        )
        return self._add(new).copy()

    async def get(self, session_id: str, *, tenant: str) -> Session:
        return self._use(session_id, tenant).copy()

    async def fork(self, session_id: str, new_session_id: str = "", *, tenant: str, at: Mark | None = None) -> Session:
        old = self._use(session_id, tenant).session
        if at is not None:
            if at.tokens > len(old.token_ids):
                raise self._shorter(session_id, at)
            old = old.at(at)
        new = replace(old, session_id=self._name(new_session_id), replicas=dict(old.replicas))
        return self._add(new, besides=session_id).copy()

    async def delete(self, session_id: str, *, tenant: str) -> None:
        self._use(session_id, tenant)
        self._forget(tenant, session_id)

    async def count(self, tenant: str | None = None) -> int:
        self._forget_expired()
        return len(self._records) if tenant is None else self._held[tenant]

    @asynccontextmanager
    async def turn(self, session_id: str, *, tenant: str) -> AsyncIterator[Session]:
        record = self._use(session_id, tenant)
        if record.turn_id:
            raise self._busy(session_id)
        record.turn_id = uuid.uuid4().hex
        try:
            yield record.copy(record.turn_id)
        finally:
            record.turn_id = ""
            if self._records.get((tenant, session_id)) is record:
                self._touch(tenant, session_id)

    async def notes(self, session_id: str, *, tenant: str, keys: Sequence[str] | None = None) -> dict[str, str]:
        notes = self._use(session_id, tenant).notes
        return dict(notes) if keys is None else {key: notes[key] for key in keys if key in notes}

    async def note(self, session_id: str, notes: Mapping[str, str | None], *, tenant: str) -> None:
        kept = self._use(session_id, tenant).notes
        for key, text in notes.items():
            if text is None:
                kept.pop(key, None)
            else:
                kept[key] = text

    async def commit(
        self,
        session: Session,
        token_ids: Sequence[int],
        open_response: bool,
        transcript: Transcript | None = None,
        notes: Mapping[str, str] = MappingProxyType({}),
        own: OwnPart | None = None,
    ) -> None:
        record = self._records.get((session.tenant, session.session_id))
        if record is None:
            raise self._deleted(session)
        if not session.turn_id or (record.turn_id, record.session.version) != (session.turn_id, session.version):
            raise self._lost(session)
        self._committed(session, token_ids, open_response, transcript, own)
        record.session = replace(session, replicas=dict(session.replicas))
        record.notes |= notes

    async def check(self) -> None:
        pass

    async def expires_in_s(self, session: Session) -> float:
        record = self._records.get((session.tenant, session.session_id))
        return max(0.0, record.used_at + self.ttl_s - self._clock()) if record else 0.0

    async def close(self) -> None:
        self._records.clear()
        self._held.clear()

    def _add(self, session: Session, besides: str = "") -> _Record:
        self._forget_expired()
        key = (session.tenant, session.session_id)
        if key in self._records:
            raise self._exists(session.session_id)
        if self._held[session.tenant] >= self._limit_of(session.tenant) and not self._evict(session.tenant, besides):
            raise self._full(session.tenant)
        if len(self._records) >= self.max_sessions:
            raise self._all_full()
        record = self._records[key] = _Record(session, self._clock())
        self._held[session.tenant] += 1
        return record

    def _use(self, session_id: str, tenant: str) -> _Record:
        self._forget_expired()
        if (tenant, session_id) not in self._records:
            raise self._missing(session_id)
        return self._touch(tenant, session_id)

    def _touch(self, tenant: str, session_id: str) -> _Record:
        record = self._records[tenant, session_id]
        record.used_at = self._clock()
        self._records.move_to_end((tenant, session_id))
        return record

    def _forget_expired(self) -> None:
        limit = self._clock() - self.ttl_s
        expired = []
        for key, record in self._records.items():
            if record.used_at > limit:
                break
            if not record.turn_id:
                expired.append(key)
        for key in expired:
            self._forget(*key)

    def _evict(self, tenant: str, besides: str) -> bool:
        """Returns whether a session of the tenant, but for one, has made room."""
        mine = ((key, record) for key, record in self._records.items() if key[0] == tenant and key[1] != besides)
        unused = (key for key, record in mine if not record.turn_id)
        if not self.evicts or (key := next(unused, None)) is None:
            return False
        self._forget(*key)
        return True

    def _forget(self, tenant: str, session_id: str) -> None:
        del self._records[tenant, session_id]
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
