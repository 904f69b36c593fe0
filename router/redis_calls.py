"""Calls of scripts on a Redis server, each of which ends within its time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import RedisError

from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.redis_url import shown

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 16


class RedisCalls:
    """Scripts may be run twice: each call is tried once more if the connection is lost. `prefix` begins all keys.

    `what`: what is kept there, for the log, which tells of changes only: when the server goes, and when it works again.
    """

    def __init__(self, url: str, what: str, *, password: str | None = None, prefix: str = "prefillshare"):
        # `run` sets the timeout and retries; for socket_timeout see router/sessions/redis.py.
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
        self._url, self._secret, self._what = shown(url), pool.connection_kwargs.get("password"), what
        self._redis = Redis.from_pool(pool)
        self._prefix = f"{{{prefix}}}"
        self._scripts: dict[str, object] = {}
        self._trouble = ""

    def key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    async def run(self, script: str, keys: Sequence[str], args: Sequence, timeout_s: float) -> list:
        """The script's answer. Raises Unavailable."""
        if script not in self._scripts:
            self._scripts[script] = self._redis.register_script(script)
        registered = self._scripts[script]
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    answer = await registered(keys=keys, args=args)
                except ConnectionLost:
                    answer = await registered(keys=keys, args=args)
        except TimeoutError:
            reason = f"no answer within {timeout_s:g} s"
        except (RedisError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            self._note("")
            return answer
        self._note(reason)
        raise Unavailable(
            f"the store of {self._what} does not answer", fix="try again; if it lasts, tell those who run this service"
        )

    async def close(self) -> None:
        await self._redis.aclose()

    def _note(self, reason: str) -> None:
        if self._secret:  # a server's message may repeat what it was sent
            reason = reason.replace(self._secret, "***")
        trouble = f"{self._url}: {reason}" if reason else ""
        if trouble != self._trouble:
            logger.warning("store of %s %s", self._what, trouble or f"{self._url} works again")
        self._trouble = trouble
