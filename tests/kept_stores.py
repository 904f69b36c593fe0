"""The stores of what is kept that one suite of tests runs on, and how time passes for each."""

import uuid

from redis.asyncio import Redis

from prefillshare.router.kept.memory import MemoryKept
from prefillshare.router.kept.redis import RedisKept
from prefillshare.router.redis_calls import RedisCalls


class InMemory:
    now = 0.0

    def make(self) -> MemoryKept:
        return MemoryKept(lambda: self.now)

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds


class InRedis:
    """Time passes by moving all times at which something ends closer."""

    def __init__(self, url: str):
        self._url, self._prefix = url, uuid.uuid4().hex

    def make(self) -> RedisKept:
        return RedisKept(RedisCalls(self._url, "store of kept contexts", prefix=self._prefix))

    async def pass_time(self, seconds: float) -> None:
        by = round(seconds * 1000)
        async with Redis.from_url(self._url) as redis:
            for key in await redis.keys(f"{{{self._prefix}}}:*"):
                if await redis.type(key) == b"zset":
                    for name in await redis.zrange(key, 0, -1):
                        await redis.zincrby(key, -by, name)
                if (left := await redis.pttl(key)) > 0:
                    await redis.pexpire(key, max(1, left - by))

    async def keys(self) -> list[bytes]:
        async with Redis.from_url(self._url) as redis:
            return await redis.keys(f"{{{self._prefix}}}:*")
