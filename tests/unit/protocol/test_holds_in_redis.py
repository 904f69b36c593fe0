"""The session store in Redis does what the model of holds says, on every way through it: the real scripts on a real server."""

import uuid
from collections.abc import Sequence
from copy import copy

import pytest
from protocol import holds
from protocol.explorer import ways
from redis.asyncio import Redis

from prefillshare.kvshare.errors import Conflict, SessionBusy
from prefillshare.router.redis_calls import RedisCalls
from prefillshare.router.sessions import RedisSessions, turn_scripts

pytestmark = pytest.mark.slow

LEASE_MS = 60_000


class Routers:
    """Plays the model's steps on one session. Turns commit a token each that tells them apart."""

    def __init__(self, url: str, redis: Redis):
        self._redis, self._prefix = redis, uuid.uuid4().hex
        self.store = RedisSessions(RedisCalls(url, "session store", prefix=self._prefix), 10_000, 3600)
        self._name, self._begun = "", {}

    async def play(self, way: Sequence[str]) -> list[int]:
        """Returns the session's tokens, less its first. Fails where the store does not do what the step says."""
        self._name = uuid.uuid4().hex
        await self.store.create(self._name, [0], tenant="")
        self._begun = {}
        for step in way:
            what, _, turn = step.partition(" ")
            await getattr(self, f"_{what.replace('-', '_')}")(*([turn] if turn else []))
        return list((await self.store.get(self._name, tenant="")).token_ids)[1:]

    async def is_held(self) -> bool:
        (key,) = await self._redis.keys(f"*{self._prefix}*session*{self._name}")
        until = await self._redis.hget(key, "until")
        seconds, microseconds = await self._redis.time()
        return until is not None and int(until) > seconds * 1000 + microseconds // 1000

    async def _begins(self, turn: str) -> None:
        self._begun[turn] = await self.store._load(turn_scripts.BEGIN, "", self._name, turn, LEASE_MS)
        self._begun[turn].turn_id = turn

    async def _refused(self, turn: str) -> None:
        with pytest.raises(SessionBusy):
            await self._begins(turn)

    async def _renews(self, turn: str) -> None:
        assert await self.store._ask(turn_scripts.RENEW, "", self._name, turn, LEASE_MS) == [b"ok"]

    async def _commits(self, turn: str) -> None:
        session = copy(self._begun[turn])
        await self.store.commit(session, [*session.token_ids, 1 + holds.TURNS.index(turn)], open_response=False)

    _again = _commits

    async def _is_too_late(self, turn: str) -> None:
        with pytest.raises(Conflict):
            await self._commits(turn)

    async def _ends(self, turn: str) -> None:
        assert await self.store._ask(turn_scripts.END, "", self._name, turn) == [b"ok"]

    _is_left = _ends

    async def _dies(self, turn: str) -> None:
        """Its router says nothing any more."""

    async def _hold_ends(self) -> None:
        (key,) = await self._redis.keys(f"*{self._prefix}*session*{self._name}")
        await self._redis.hincrby(key, "until", -2 * LEASE_MS)


async def test_the_store_goes_every_way_that_the_model_goes(redis_server):
    every = list(ways(holds.World(), holds.steps))
    assert len(every) > 300
    async with Redis.from_url(redis_server.url) as redis:
        routers = Routers(redis_server.url, redis)
        for way, world in every:
            tokens = await routers.play(way)
            assert tokens == [1 + number for number, _ in world.log], way
            assert await routers.is_held() == world.is_held, way
        await routers.store.close()
