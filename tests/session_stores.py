"""The session stores that one suite of tests runs on, and how time passes for each."""

import uuid

from redis.asyncio import Redis

from prefillshare.router.redis_calls import RedisCalls
from prefillshare.router.sessions import MemorySessions, RedisSessions


class InMemory:
    now = 0.0

    def make(self, **options) -> MemorySessions:
        return MemorySessions(**options, clock=lambda: self.now)

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds


class InRedis:
    """Time passes by moving all expiry times closer. Turns hold their sessions for longer than the time that passes."""

    def __init__(self, url: str):
        self._url, self._prefix = url, uuid.uuid4().hex

    def make(self, **options) -> RedisSessions:
        return RedisSessions(RedisCalls(self._url, "session store", prefix=self._prefix), **options, lease_s=15)

    async def pass_time(self, seconds: float) -> None:
        by = round(seconds * 1000)
        async with Redis.from_url(self._url) as redis:
            for key in await redis.keys(f"{{{self._prefix}}}:*"):
                match await redis.type(key):
                    case b"hash" if await redis.hexists(key, "until"):
                        await redis.hincrby(key, "until", -by)
                    case b"zset":
                        for name in await redis.zrange(key, 0, -1):
                            await redis.zincrby(key, -by, name)
                await redis.pexpire(key, await redis.pttl(key) - by)
