"""Calls of scripts on a Redis server, each of which ends within its time: what all of a router's stores in Redis go through."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import RedisError

from prefillshare.kvshare.config import Router
from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.redis_url import shown

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 16


class RedisCalls:
    """`store`: what is kept there, in words for errors and the log. `prefix` begins all keys, and tells apart the deployments
    that use one server.

    Clients are told neither the server's address nor its messages. Those are in the log, which tells of changes only, because
    every call would log that the server is gone, and in `trouble`.
    """

    def __init__(
        self,
        url: str,
        store: str,
        *,
        password: str | None = None,
        prefix: str = "prefillshare",
        max_connections: int = MAX_CONNECTIONS,
    ):
        # `run` sets the timeout and retries. With a socket_timeout, redis-py sends through asyncio.wait_for, which before
        # Python 3.12 may swallow a cancellation: a task that is being stopped would go on.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=None,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            **({"password": password} if password else {}),
        )
        self._url, self._secret, self._store = shown(url), pool.connection_kwargs.get("password"), store
        self._redis = Redis.from_pool(pool)
        self._prefix = f"{{{prefix}}}"
        self._scripts: dict[str, object] = {}
        #: What is wrong with the server, for those who run it; "" if nothing is.
        self.trouble = ""

    @classmethod
    def of(cls, config: Router, store: str, *, suffix: str = "", max_connections: int = MAX_CONNECTIONS) -> RedisCalls:
        """To the configured server. `suffix`: of the prefix. Raises ConfigError if the password is missing."""
        return cls(
            config.redis_url,
            store,
            password=config.redis_password(),
            prefix=config.redis_prefix + suffix,
            max_connections=max_connections,
        )

    def key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    async def run(self, script: str, keys: Sequence[str], args: Sequence, timeout_s: float, *, again: bool = True) -> list:
        """The script's answer. Raises Unavailable only; whether the script has run is then not known.

        `again`: it may be run twice, so it is tried once more if the connection is lost.
        """
        if script not in self._scripts:
            self._scripts[script] = self._redis.register_script(script)
        registered = self._scripts[script]
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    answer = await registered(keys=keys, args=args)
                except ConnectionLost:
                    if not again:
                        raise
                    answer = await registered(keys=keys, args=args)
        except TimeoutError:
            text = reason = f"no answer within {timeout_s:g} s"
        except (RedisError, OSError) as error:
            text = "it cannot be reached" if isinstance(error, (ConnectionLost, OSError)) else "it answers with an error"
            reason = f"{type(error).__name__}: {error}"
        else:
            self._note("")
            return answer
        self._note(reason)
        raise Unavailable(f"the {self._store}: {text}", fix="try again; if it lasts, tell those who run this service")

    async def close(self) -> None:
        await self._redis.aclose()

    def _note(self, reason: str) -> None:
        if self._secret:  # a server's message may repeat what it was sent
            reason = reason.replace(self._secret, "***")
        trouble = f"{self._url}: {reason}" if reason else ""
        if trouble != self.trouble:
            logger.warning("%s %s", self._store, trouble or f"{self._url} works again")
        self.trouble = trouble


def ms(seconds: float) -> int:
    """A time as scripts take it: whole milliseconds, at least one."""
    return max(1, round(seconds * 1000))
