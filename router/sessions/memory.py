"""Sessions in the memory of a deployment's only router. They are lost when it ends."""

from __future__ import annotations

import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from prefillshare.router.admission.lazy_heap import LazyHeap
from prefillshare.router.clock import now
from prefillshare.router.sessions.base import Mark, OwnPart, Session, SessionStore
from prefillshare.router.sessions.ends import MOST_ENDS, Ending
from prefillshare.router.sessions.listing import Listed, Page, Place
from prefillshare.router.sessions.marks import MOST_MARKS, mark_of, said_by
from prefillshare.router.sessions.transcript import Transcript


@dataclass
class _Record:
    """`session` is never handed out: callers get copies, as they do from a store outside this process."""

    session: Session
    used_at: float
    turn_id: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    #: By number; a new one takes the place of the oldest (router/sessions/marks.py).
    marks: dict[int, str] = field(default_factory=dict)
    #: Keys of the notes that belong to the context's ends, by the transcripts' digests; the latest last.
    ends: dict[str, str] = field(default_factory=dict)

    def mark(self) -> None:
        """Note where the context ends now."""
        kept = self.session
        self.marks[kept.turns % MOST_MARKS] = mark_of(kept.token_ids, kept.transcript)

    def set_notes(self, notes: Mapping[str, str | None]) -> None:
        for key, text in notes.items():
            if text is None:
                self.notes.pop(key, None)
            else:
                self.notes[key] = text

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
        self._ends: LazyHeap[tuple[str, str]] = LazyHeap()  # by the time at which they expire; without those that turns hold
        self._held: Counter[str] = Counter()  # by tenant, as in _records
        #: By tenant and digest of a transcript: the session whose context has ended with it.
        self._said: dict[tuple[str, str], str] = {}

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
        new = Session(
            self._name(session_id),
            tenant,
            tuple(token_ids),
            cache_domain=cache_domain,
            transcript=transcript,
            ttl_s=ttl_s,
            unanswered=None if unanswered is None else tuple(unanswered),
        )
        return self._add(new).copy()

    async def get(self, session_id: str, *, tenant: str) -> Session:
        return self._use(session_id, tenant).copy()

    async def fork(self, session_id: str, new_session_id: str = "", *, tenant: str, at: Mark | None = None) -> Session:
        record = self._use(session_id, tenant)
        old = record.session
        if at is not None:
            if at.tokens > len(old.token_ids):
                raise self._shorter(session_id, at)
            old = old.at(at)
        new = replace(old, session_id=self._name(new_session_id), replicas=dict(old.replicas))
        fork = self._add(new, besides=session_id)
        fork.marks = record.marks | fork.marks
        return fork.copy()

    async def delete(self, session_id: str, *, tenant: str) -> None:
        self._use(session_id, tenant)
        self._forget(tenant, session_id)

    async def listed(self, most: int, after: Place, *, tenant: str) -> Page:
        self._forget_expired()
        begins = (float(after.expires), after.name) if after.expires else (-1.0, "")
        mine = sorted((self._ends_at(record), name) for (whose, name), record in self._records.items() if whose == tenant)
        found = [place for place in mine if place > begins][: most + 1]
        last = Place(repr(found[most - 1][0]), found[most - 1][1]) if len(found) > most else None
        return Page([self._listed(self._records[tenant, name]) for _, name in found[:most]], last)

    async def set_ttl(self, session_id: str, ttl_s: float | None, *, tenant: str) -> Session:
        record = self._use(session_id, tenant)
        record.session.ttl_s = ttl_s
        self._touch(tenant, session_id)
        return record.copy()

    async def count(self, tenant: str | None = None) -> int:
        self._forget_expired()
        return len(self._records) if tenant is None else self._held[tenant]

    @asynccontextmanager
    async def turn(self, session_id: str, *, tenant: str) -> AsyncIterator[Session]:
        record = self._use(session_id, tenant)
        if record.turn_id:
            raise self._busy(session_id)
        record.turn_id = uuid.uuid4().hex
        self._ends.discard((tenant, session_id))
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
        self._use(session_id, tenant).set_notes(notes)

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
        record = self._records.get((session.tenant, session.session_id))
        if record is None:
            raise self._deleted(session)
        if not session.turn_id or (record.turn_id, record.session.version) != (session.turn_id, session.version):
            raise self._lost(session)
        session.committed(token_ids, open_response, transcript, own, is_turn, unanswered)
        record.session = replace(session, replicas=dict(session.replicas), ttl_s=record.session.ttl_s)
        record.set_notes(notes)
        if is_turn:
            record.mark()
        if end and transcript:
            record.ends.pop(transcript.digest, None)
            record.ends[transcript.digest] = end
            self._said[session.tenant, transcript.digest] = session.session_id
            if len(record.ends) > MOST_ENDS:
                self._forget_end(session.tenant, session.session_id, next(iter(record.ends)))

    async def said_at(self, session: Session, tokens: int) -> Transcript | None:
        record = self._use(session.session_id, session.tenant)
        return said_by(session.token_ids[:tokens], record.marks.values())

    async def found(self, said: Sequence[Transcript], *, tenant: str) -> Ending | None:
        self._forget_expired()
        for digest in (transcript.digest for transcript in said):
            if (session_id := self._said.get((tenant, digest))) is None:
                continue
            record = self._records[tenant, session_id]
            key = record.ends[digest]
            if (note := record.notes.get(key)) is not None:
                self._touch(tenant, session_id)
                return Ending(session_id, key, note)
            self._forget_end(tenant, session_id, digest)
        return None

    async def check(self) -> None:
        pass

    async def expires_in_s(self, session: Session) -> float:
        record = self._records.get((session.tenant, session.session_id))
        return max(0.0, self._ends_at(record) - self._clock()) if record else 0.0

    async def close(self) -> None:
        self._records.clear()
        self._held.clear()
        self._said.clear()
        self._ends = LazyHeap()

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
        record.mark()
        self._held[session.tenant] += 1
        self._touch(*key)
        return record

    def _use(self, session_id: str, tenant: str) -> _Record:
        self._forget_expired()
        if (tenant, session_id) not in self._records:
            raise self._missing(session_id)
        return self._touch(tenant, session_id)

    def _touch(self, tenant: str, session_id: str) -> _Record:
        key = (tenant, session_id)
        record = self._records[key]
        record.used_at = self._clock()
        self._records.move_to_end(key)
        if not record.turn_id:
            self._ends.put(key, self._ends_at(record))
        return record

    def _ends_at(self, record: _Record) -> float:
        return record.used_at + (self.ttl_s if record.session.ttl_s is None else record.session.ttl_s)

    def _forget_expired(self) -> None:
        while (key := self._ends.first()) and self._ends_at(self._records[key]) <= self._clock():
            self._forget(*key)

    def _listed(self, record: _Record) -> Listed:
        kept = record.session
        return Listed(
            kept.session_id,
            max(0.0, self._ends_at(record) - self._clock()),
            len(kept.token_ids),
            kept.turns,
            self.ttl_s if kept.ttl_s is None else kept.ttl_s,
            kept.cache_domain,
            bool(record.turn_id),
        )

    def _evict(self, tenant: str, besides: str) -> bool:
        """Returns whether a session of the tenant, but for one, has made room."""
        mine = ((key, record) for key, record in self._records.items() if key[0] == tenant and key[1] != besides)
        unused = (key for key, record in mine if not record.turn_id)
        if not self.evicts or (key := next(unused, None)) is None:
            return False
        self._forget(*key)
        return True

    def _forget_end(self, tenant: str, session_id: str, digest: str) -> None:
        del self._records[tenant, session_id].ends[digest]
        if self._said.get((tenant, digest)) == session_id:
            del self._said[tenant, digest]

    def _forget(self, tenant: str, session_id: str) -> None:
        for digest in list(self._records[tenant, session_id].ends):
            self._forget_end(tenant, session_id, digest)
        del self._records[tenant, session_id]
        self._ends.discard((tenant, session_id))
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
