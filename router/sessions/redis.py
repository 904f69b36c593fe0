"""Sessions in Redis: shared by several routers, and kept when any of them ends.

A turn holds its session by a lease that its router renews. If the router dies, the lease ends by itself, and only the turn is
lost. The turn's router keeps the context that it read, so that a commit sends only what is new.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType

from prefillshare.kvshare.errors import ContractMismatch, SessionDamaged
from prefillshare.router.redis_calls import RedisCalls, ms
from prefillshare.router.sessions import scripts, turn_scripts
from prefillshare.router.sessions.base import MAX_NAME_CHARS, Mark, OwnPart, Session, SessionStore
from prefillshare.router.sessions.ends import Ending
from prefillshare.router.sessions.listing import Page, Place
from prefillshare.router.sessions.marks import mark_of, said_by
from prefillshare.router.sessions.redis_lease import Lease
from prefillshare.router.sessions.redis_values import (
    ids_text,
    listed_notes,
    listed_of,
    own_ttl,
    packed,
    pairs,
    session_of,
    text_of,
    written,
)
from prefillshare.router.sessions.transcript import Transcript


class RedisSessions(SessionStore):
    """Owns `calls`. `lease_s`: how long a turn holds its session without renewal.
    `tokenizer`: fingerprint of the base's. Token ids of another one mean nothing here: such a session raises ContractMismatch.

    `timeout_s` bounds every call, its retry included. A commit that ends in Unavailable may or may not have happened;
    any other error means that it has not.
    """

    def __init__(
        self,
        calls: RedisCalls,
        max_sessions: int,
        ttl_s: float,
        max_per_tenant: Mapping[str, int] | None = None,
        *,
        lease_s: float = 5.0,
        timeout_s: float = 2.0,
        evicts: bool = False,
        tokenizer: str = "",
    ):
        super().__init__(max_sessions, ttl_s, max_per_tenant, evicts=evicts)
        self._calls, self._lease_s, self._timeout_s, self._tokenizer = calls, lease_s, timeout_s, tokenizer

    @property
    def trouble(self) -> str:
        """What is wrong with the server, for those who run it."""
        return self._calls.trouble

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
        session_id = self._name(session_id)
        most = (self.max_sessions, self._limit_of(tenant), int(self.evicts))
        content = (packed(token_ids), cache_domain, written(transcript), self._tokenizer)
        state = (mark_of(token_ids, transcript), own_ttl(ttl_s), ids_text(unanswered))
        return await self._load(scripts.CREATE, tenant, session_id, uuid.uuid4().hex, *most, *content, *state)

    async def get(self, session_id: str, *, tenant: str) -> Session:
        return await self._load(scripts.GET, tenant, session_id)

    async def fork(self, session_id: str, new_session_id: str = "", *, tenant: str, at: Mark | None = None) -> Session:
        new_session_id = self._name(new_session_id)
        keys, name = self._keys(tenant, session_id)
        new_keys, new_name = self._keys(tenant, new_session_id)
        most = (self.max_sessions, self._limit_of(tenant), int(self.evicts))
        place = () if at is None else (at.tokens, int(at.open_response), written(at.transcript), written(at.own))
        args = (name, self._ttl_ms, new_name, uuid.uuid4().hex, *most, *place)
        answer = await self._run(scripts.FORK, [*keys, *new_keys[:2], new_keys[-1]], args)
        if answer[0] == b"shorter":
            raise self._shorter(session_id, at)
        self._check(answer, tenant, session_id, new_session_id)
        try:
            return self._session(answer, tenant, new_session_id)
        except (SessionDamaged, ContractMismatch) as error:
            await self.delete(new_session_id, tenant=tenant)
            raise self.damaged(session_id) if isinstance(error, SessionDamaged) else error from None

    async def delete(self, session_id: str, *, tenant: str) -> None:
        keys, name = self._keys(tenant, session_id)
        # Not retried: if the first try worked, the second would say that there is no such session.
        self._check(await self._run(scripts.DELETE, keys, (name, self._ttl_ms), again=False), tenant, session_id)

    async def listed(self, most: int, after: Place, *, tenant: str) -> Page:
        _, whose = self._keys(tenant, "")
        begins = (after.expires or "-inf", whose + after.name if after.expires else "")
        _, rows = await self._ask(scripts.LIST, tenant, "", *begins, most + 1)
        sessions = [listed_of(row, len(whose.encode()), self.ttl_s) for row in rows[:most]]
        last = Place(rows[most - 1][1].decode(), sessions[-1].session_id) if len(rows) > most else None
        return Page(sessions, last)

    async def set_ttl(self, session_id: str, ttl_s: float | None, *, tenant: str) -> Session:
        return await self._load(scripts.SET_TTL, tenant, session_id, own_ttl(ttl_s))

    async def count(self, tenant: str | None = None) -> int:
        names = self._calls.key("names") if tenant is None else self._calls.key("names", tenant)
        return (await self._run(scripts.COUNT, [names], ()))[1]

    @asynccontextmanager
    async def turn(self, session_id: str, *, tenant: str) -> AsyncIterator[Session]:
        turn_id = uuid.uuid4().hex
        lease = self._lease(tenant, session_id, turn_id)
        try:
            session = await self._load(turn_scripts.BEGIN, tenant, session_id, turn_id, ms(self._lease_s))
        except (asyncio.CancelledError, SessionDamaged, ContractMismatch):
            await lease.end()  # the turn may have begun nevertheless
            raise
        session.turn_id = turn_id
        async with lease.renewed():
            yield session

    async def notes(self, session_id: str, *, tenant: str, keys: Sequence[str] | None = None) -> dict[str, str]:
        answer = await self._ask(scripts.NOTES, tenant, session_id, *(keys or ()))
        self._check(answer, tenant, session_id)
        values = dict(zip(keys or (), answer[1], strict=True)) if keys is not None else pairs(answer[1])
        return {key: text.decode("utf-8", "replace") for key, text in values.items() if text is not None}

    async def note(self, session_id: str, notes: Mapping[str, str | None], *, tenant: str) -> None:
        self._check(await self._ask(scripts.NOTE, tenant, session_id, *listed_notes(notes)), tenant, session_id)

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
        old, token_ids = session.token_ids, tuple(token_ids)
        extends = token_ids[: len(old)] == old
        answer = await self._ask(
            turn_scripts.COMMIT,
            session.tenant,
            session.session_id,
            session.turn_id,
            session.version,
            packed(token_ids[len(old) :] if extends else token_ids),
            len(old) if extends else "",
            int(open_response),
            json.dumps(session.replicas),
            written(transcript),
            written(own),
            int(is_turn),
            mark_of(token_ids, transcript) if is_turn else "",
            ids_text(unanswered),
            end if transcript else "",
            transcript.digest if transcript else "",
            *listed_notes(notes),
        )
        self._check(answer, session.tenant, session.session_id)
        if answer[0] != b"ok":
            raise self._deleted(session) if answer[0] == b"deleted" else self._lost(session)
        session.committed(token_ids, open_response, transcript, own, is_turn, unanswered)

    async def said_at(self, session: Session, tokens: int) -> Transcript | None:
        answer = await self._ask(turn_scripts.MARKS, session.tenant, session.session_id)
        self._check(answer, session.tenant, session.session_id)
        return said_by(session.token_ids[:tokens], [text_of(mark) for mark in answer[1] if mark])

    async def found(self, said: Sequence[Transcript], *, tenant: str) -> Ending | None:
        _, whose = self._keys(tenant, "")
        _, *there = await self._ask(scripts.FOUND, tenant, "", *(transcript.digest for transcript in said))
        if not there:
            return None
        name, key, note = (part.decode("utf-8", "replace") for part in there)
        return Ending(name.removeprefix(whose), key, note)

    async def check(self) -> None:
        await self.count()

    async def expires_in_s(self, session: Session) -> float:
        keys, _ = self._keys(session.tenant, session.session_id)
        _, left_ms = await self._run(scripts.EXPIRES_IN, keys[:1], ())
        return max(0, left_ms) / 1000

    async def close(self) -> None:
        await self._calls.close()

    def _lease(self, tenant: str, session_id: str, turn_id: str) -> Lease:
        async def ask(script: str, *args) -> list:
            return await self._ask(script, tenant, session_id, *args)

        return Lease(ask, session_id, turn_id, self._lease_s)

    @property
    def _ttl_ms(self) -> int:
        return ms(self.ttl_s)

    def _keys(self, tenant: str, session_id: str) -> tuple[list[str], str]:
        """Keys as script_parts.py expects them, and the session's name in its sets. No two sessions share a name."""
        if len(session_id) > MAX_NAME_CHARS:
            raise self._missing(session_id)
        name = f"{len(tenant)}:{tenant}:{session_id}"
        parts = (("session", name), ("tokens", name), ("names",), ("names", tenant), ("notes", name))
        return [self._calls.key(*part) for part in parts], name

    async def _load(self, script: str, tenant: str, session_id: str, *args) -> Session:
        answer = await self._ask(script, tenant, session_id, *args)
        self._check(answer, tenant, session_id, session_id)
        return self._session(answer, tenant, session_id)

    async def _ask(self, script: str, tenant: str, session_id: str, *args) -> list:
        keys, name = self._keys(tenant, session_id)
        return await self._run(script, keys, (name, self._ttl_ms, *args))

    def _check(self, answer: list, tenant: str, session_id: str, new_session_id: str = "") -> None:
        match answer[0]:
            case b"damaged":
                raise self.damaged(session_id)
            case b"missing":
                raise self._missing(session_id)
            case b"busy":
                raise self._busy(session_id)
            case b"exists":
                raise self._exists(new_session_id)
            case b"own full":
                raise self._full(tenant)
            case b"all full":
                raise self._all_full()

    def _session(self, answer: list, tenant: str, session_id: str) -> Session:
        """The session in an answer of script_parts.py's `load`. Raises SessionDamaged, ContractMismatch."""
        session, tokenizer = session_of(answer, tenant, session_id)
        self._check_tokenizer(tokenizer, session_id)
        if session is None:
            raise self.damaged(session_id)
        return session

    def _check_tokenizer(self, theirs: str, session_id: str) -> None:
        if theirs and self._tokenizer and theirs != self._tokenizer:
            raise ContractMismatch(
                f"session {session_id!r} consists of tokens of the tokenizer {theirs[:12]}; this deployment's base has"
                f" {self._tokenizer[:12]}",
                field="session_id",
                fix="start a new session, or serve the base that it was begun with",
            )

    async def _run(self, script: str, keys: Sequence[str], args: Sequence, *, again: bool = True) -> list:
        return await self._calls.run(script, keys, args, self._timeout_s, again=again)
