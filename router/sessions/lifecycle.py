"""Opens a router replica's session store, and reports how many sessions there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.config import Base, Router
from prefillshare.kvshare.errors import Unavailable
from prefillshare.router.background import Periodic
from prefillshare.router.redis_calls import RedisCalls
from prefillshare.router.sessions.base import SessionStore
from prefillshare.router.sessions.memory import MemorySessions
from prefillshare.router.sessions.redis import RedisSessions

GAUGE_PERIOD_S = 5.0
#: Of each store, to Redis: every turn asks there several times, and its lease is renewed.
MAX_CONNECTIONS = 64


async def open_sessions(config: Router, base: Base, max_per_tenant: Mapping[str, int]) -> SessionStore:
    """The store of clients' sessions, after it has answered once. Raises ConfigError or Unavailable."""
    return await _open(config, base, config.max_sessions, config.session_ttl_s, max_per_tenant)


async def open_threads(config: Router, base: Base, tenants: Sequence[str]) -> SessionStore:
    """The store of what stored responses and conversations go on from; else as `open_sessions`. `tenants`: all their names."""
    each = dict.fromkeys(tenants, config.max_responses)
    most = config.max_responses * len(each)
    return await _open(config, base, most, config.response_ttl_s, each, suffix=":threads", evicts=True)


async def _open(
    config: Router,
    base: Base,
    most: int,
    ttl_s: float,
    most_per_tenant: Mapping[str, int],
    *,
    suffix: str = "",
    evicts: bool = False,
) -> SessionStore:
    if config.redis_url is None:
        return MemorySessions(most, ttl_s, most_per_tenant, evicts=evicts)
    tokenizer = fingerprint.tokenizer(base.model)
    calls = RedisCalls.of(config, "session store", suffix=suffix, max_connections=MAX_CONNECTIONS)
    store = RedisSessions(calls, most, ttl_s, most_per_tenant, evicts=evicts, tokenizer=tokenizer)
    try:
        await store.check()
    except Unavailable:
        await store.close()
        raise Unavailable(store.trouble, field="router.redis_url", fix="start that server, or correct the URL") from None
    except BaseException:
        await store.close()
        raise
    return store


class SessionGauge:
    """Sets `gauge` to the store's count every `period_s` seconds, because a scrape must not wait. Call `stop` at the end."""

    def __init__(self, store: SessionStore, gauge, period_s: float = GAUGE_PERIOD_S):
        self._store, self._gauge = store, gauge
        self._counting = Periodic("sessions are not counted", self._count, period_s)

    async def stop(self) -> None:
        await self._counting.stop()

    async def _count(self) -> None:
        self._gauge.set(await self._store.count())
