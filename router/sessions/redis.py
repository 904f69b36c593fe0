"""Sessions in Redis: shared by several routers, and kept when any of them ends.

A turn holds its session by a lease that its router renews. If the router dies, the lease ends by itself, and only the turn is
lost. The turn's router keeps the context that it read, so that a commit sends only what is new.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType

import numpy as np
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import RedisError

from prefillshare.kvshare.errors import ContractMismatch, PrefillShareError, SessionDamaged, Unavailable
from prefillshare.kvshare.redis_url import shown
from prefillshare.router.sessions import scripts
from prefillshare.router.sessions.base import MAX_NAME_CHARS, Mark, OwnPart, Session, SessionStore
from prefillshare.router.sessions.listing import Listed, Page, Place
from prefillshare.router.sessions.marks import mark_of, said_by
from prefillshare.router.sessions.redis_values import (
    calls_of,
    listed_calls,
    ms,
    own_ttl,
    packed,
    pairs,
    text_of,
    written,
)
from prefillshare.router.sessions.transcript import Transcript

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
#: Largest token id that clients can be sent (protos/prefillshare/v1: int32).
MAX_TOKEN_ID = 2**31 - 1
RETRY_S = 0.1


class RedisSessions(SessionStore):
    """`prefix` tells apart the deployments that use one server. `lease_s`: how long a turn holds its session without renewal.
    `tokenizer`: fingerprint of the base's. Token ids of another one mean nothing here: such a session raises ContractMismatch.

    `timeout_s` bounds every call, its retry included. A commit that ends in Unavailable may or may not have happened;
    any other error means that it has not.
    """

    def __init__(
        self,
        url: str,
        max_sessions: int,
        ttl_s: float,
        max_per_tenant: Mapping[str, int] | None = None,
        *,
        password: str | None = None,
        prefix: str = "prefillshare",
        lease_s: float = 5.0,
        timeout_s: float = 2.0,
        evicts: bool = False,
        tokenizer: str = "",
    ):
        super().__init__(max_sessions, ttl_s, max_per_tenant, evicts=evicts)
        self._lease_s, self._timeout_s, self._prefix = lease_s, timeout_s, f"{{{prefix}}}"
        self._tokenizer = tokenizer
        # `_call` sets the timeout and retries. With a socket_timeout, redis-py sends through asyncio.wait_for, which before
        # Python 3.12 may swallow a cancellation: a task that is being stopped would go on.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=None,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            **({"password": password} if password else {}),
        )
        self._url, self._secret = shown(url), pool.connection_kwargs.get("password")
        self._redis = Redis.from_pool(pool)
        #: What is wrong with the server, for those who run it: clients are told neither its address nor its messages.
        self.trouble = ""

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
        session_id = self._name(session_id)
        most = (self.max_sessions, self._limit_of(tenant), int(self.evicts))
        content = (packed(token_ids), cache_domain, written(transcript), self._tokenizer)
        state = (mark_of(token_ids, transcript), own_ttl(ttl_s), listed_calls(calls))
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
        sessions = [self._listed(row, len(whose.encode())) for row in rows[:most]]
        last = Place(rows[most - 1][1].decode(), sessions[-1].session_id) if len(rows) > most else None
        return Page(sessions, last)

    async def set_ttl(self, session_id: str, ttl_s: float | None, *, tenant: str) -> Session:
        return await self._load(scripts.SET_TTL, tenant, session_id, own_ttl(ttl_s))

    async def count(self, tenant: str | None = None) -> int:
        names = f"{self._prefix}:names" if tenant is None else f"{self._prefix}:names:{tenant}"
        return (await self._run(scripts.COUNT, [names], ()))[1]

    @asynccontextmanager
    async def turn(self, session_id: str, *, tenant: str) -> AsyncIterator[Session]:
        turn_id = uuid.uuid4().hex
        try:
            session = await self._load(scripts.BEGIN, tenant, session_id, turn_id, ms(self._lease_s))
        except (asyncio.CancelledError, SessionDamaged, ContractMismatch):
            await self._end(tenant, session_id, turn_id)  # the turn may have begun nevertheless
            raise
        session.turn_id = turn_id
        renewal = asyncio.create_task(self._renew(tenant, session_id, turn_id))
        try:
            yield session
        finally:
            renewal.cancel()
            await asyncio.wait([renewal])
            await self._end(tenant, session_id, turn_id)

    async def notes(self, session_id: str, *, tenant: str, keys: Sequence[str] | None = None) -> dict[str, str]:
        answer = await self._ask(scripts.NOTES, tenant, session_id, *(keys or ()))
        self._check(answer, tenant, session_id)
        values = dict(zip(keys or (), answer[1], strict=True)) if keys is not None else pairs(answer[1])
        return {key: text.decode("utf-8", "replace") for key, text in values.items() if text is not None}

    async def note(self, session_id: str, notes: Mapping[str, str | None], *, tenant: str) -> None:
        pairs = [part for key, text in notes.items() for part in (key, "" if text is None else f"+{text}")]
        self._check(await self._ask(scripts.NOTE, tenant, session_id, *pairs), tenant, session_id)

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
        old, token_ids = session.token_ids, tuple(token_ids)
        extends = token_ids[: len(old)] == old
        answer = await self._ask(
            scripts.COMMIT,
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
            listed_calls(calls),
            *(part for pair in notes.items() for part in pair),
        )
        self._check(answer, session.tenant, session.session_id)
        if answer[0] != b"ok":
            raise self._deleted(session) if answer[0] == b"deleted" else self._lost(session)
        session.committed(token_ids, open_response, transcript, own, is_turn, calls)

    async def said_at(self, session: Session, tokens: int) -> Transcript | None:
        answer = await self._ask(scripts.MARKS, session.tenant, session.session_id)
        self._check(answer, session.tenant, session.session_id)
        return said_by(session.token_ids[:tokens], [text_of(mark) for mark in answer[1] if mark])

    async def check(self) -> None:
        await self.count()

    async def expires_in_s(self, session: Session) -> float:
        keys, _ = self._keys(session.tenant, session.session_id)
        return max(0, await self._call(lambda: self._redis.pttl(keys[0]))) / 1000

    async def close(self) -> None:
        await self._redis.aclose()

    async def _renew(self, tenant: str, session_id: str, turn_id: str) -> None:
        """Runs as long as the turn. If the turn has lost its session, its commit will say so."""
        pause_s = self._lease_s / 3
        while True:
            await asyncio.sleep(pause_s)
            pause_s = self._lease_s / 3
            try:
                answer = await self._ask(scripts.RENEW, tenant, session_id, turn_id, ms(self._lease_s))
            except Unavailable as error:
                logger.warning("turn %s on session %r: not renewed: %s", turn_id, session_id, error)
                pause_s = min(RETRY_S, pause_s)
                continue
            if answer[0] != b"ok":
                logger.warning("turn %s no longer holds session %r", turn_id, session_id)
                return

    async def _end(self, tenant: str, session_id: str, turn_id: str) -> None:
        try:
            await self._ask(scripts.END, tenant, session_id, turn_id)
        except PrefillShareError as error:
            logger.warning("session %r is held for up to %g s: %s", session_id, self._lease_s, error)

    @property
    def _ttl_ms(self) -> int:
        return ms(self.ttl_s)

    def _keys(self, tenant: str, session_id: str) -> tuple[list[str], str]:
        """Keys as scripts.py expects them, and the session's name in its sets. No two sessions share a name."""
        if len(session_id) > MAX_NAME_CHARS:
            raise self._missing(session_id)
        name, p = f"{len(tenant)}:{tenant}:{session_id}", self._prefix
        own = f"{p}:names:{tenant}"
        return [f"{p}:session:{name}", f"{p}:tokens:{name}", f"{p}:names", own, f"{p}:notes:{name}"], name

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
        """The session in an answer of scripts.py's `load`, which has checked its numbers. Raises SessionDamaged."""
        _, tokens, busy, (turns, is_open, prefilled, domain, version, transcript, tokenizer, own, ttl, calls) = answer
        self._check_tokenizer(text_of(tokenizer), session_id)
        token_ids = np.frombuffer(tokens, dtype="<u4")
        try:
            replicas, cache_domain = json.loads(prefilled), domain.decode()
        except (ValueError, RecursionError):
            raise self.damaged(session_id) from None
        named = isinstance(replicas, dict) and all(isinstance(replica, str) for replica in replicas.values())
        if not named or token_ids.max(initial=0) > MAX_TOKEN_ID:
            raise self.damaged(session_id)
        return Session(
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
            calls=calls_of(calls),
        )

    def _listed(self, row: list, whose: int) -> Listed:
        """`whose`: bytes before a session's own name."""
        name, _, expires_ms, status, *state = row
        session_id, expires_in_s = name[whose:].decode("utf-8", "replace"), max(0, expires_ms) / 1000
        if status != b"ok":
            return Listed(session_id, expires_in_s, damaged=True)
        tokens, turns, ttl, domain, busy = state
        ttl_s = int(ttl) / 1000 if ttl else self.ttl_s
        return Listed(session_id, expires_in_s, int(tokens), int(turns), ttl_s, domain.decode("utf-8", "replace"), bool(busy))

    def _check_tokenizer(self, theirs: str, session_id: str) -> None:
        if theirs and self._tokenizer and theirs != self._tokenizer:
            raise ContractMismatch(
                f"session {session_id!r} consists of tokens of the tokenizer {theirs[:12]}; this deployment's base has"
                f" {self._tokenizer[:12]}",
                field="session_id",
                fix="start a new session, or serve the base that it was begun with",
            )

    async def _run(self, script: str, keys: Sequence[str], args: Sequence, *, again: bool = True) -> list:
        registered = self._redis.register_script(script)
        return await self._call(lambda: registered(keys=keys, args=args), again=again)

    async def _call(self, work: Callable[[], Awaitable], *, again: bool = True):
        """Raises Unavailable only. `again`: `work` may be done twice, so it is tried once more after a lost connection."""
        try:
            async with asyncio.timeout(self._timeout_s):
                try:
                    done = await work()
                except ConnectionLost:
                    if not again:
                        raise
                    done = await work()
        except TimeoutError:
            text = reason = f"no answer within {self._timeout_s:g} s"
        except (RedisError, OSError) as error:
            text = "it cannot be reached" if isinstance(error, (ConnectionLost, OSError)) else "it answers with an error"
            reason = f"{type(error).__name__}: {error}"
        else:
            self._note("")
            return done
        self._note(reason)
        raise Unavailable(f"the session store: {text}", fix="try again; if it lasts, tell those who run this service")

    def _note(self, reason: str) -> None:
        """Logs changes only, because every call would log that the store is gone."""
        if self._secret:  # a server's message may repeat what it was sent
            reason = reason.replace(self._secret, "***")
        trouble = f"{self._url}: {reason}" if reason else ""
        if trouble != self.trouble:
            logger.warning("session store %s", trouble or f"{self._url} works again")
        self.trouble = trouble
