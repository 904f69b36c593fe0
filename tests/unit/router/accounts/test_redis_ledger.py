"""The ledger in Redis is exact: over several routers, lost answers, and Redis being away."""

import asyncio
import random

import pytest
from account_stores import InRedis
from polling import PATIENCE_S, until
from redis.asyncio import Redis

from prefillshare.kvshare.errors import Unavailable
from prefillshare.router.accounts import redis_ledger
from prefillshare.router.accounts.figures import Figures, total
from prefillshare.router.redis_calls import RedisCalls

pytestmark = pytest.mark.slow


async def figures(ledger) -> Figures:
    return total(row.figures for row in await ledger.rows())


@pytest.fixture
async def own(own_redis_server):
    """A server that the test may stop, and stores there."""
    server = own_redis_server()
    made = InRedis(server.url)
    yield server, made
    server.resume()
    await made.close()


async def test_routers_add_to_one_ledger(in_redis):
    ledgers = [in_redis.ledger() for _ in range(3)]
    for ledger in ledgers:
        for _ in range(50):
            ledger.add("acme", "tools", Figures(1, 10, 6, 4, 2, 1 << 45))
        await ledger.written()
    for ledger in ledgers:
        assert await figures(ledger) == Figures(150, 1500, 900, 600, 300, 150 << 45)


async def test_what_is_waited_for_is_in_redis_and_outlives_the_router(in_redis):
    ledger = in_redis.ledger()
    for tokens in range(1, 6):
        ledger.add("acme", "tools", Figures(generated_tokens=1))
        await ledger.written()
        assert (await figures(in_redis.ledger())).generated_tokens == tokens
    ledger._task.cancel()  # the router is gone
    assert await figures(in_redis.ledger()) == Figures(generated_tokens=5)


class Losing(RedisCalls):
    """Loses what it sends, or the answer, at random."""

    rng = random.Random(5)

    async def run(self, script, keys, args, timeout_s):
        fate = self.rng.random()
        if fate < 0.3:
            raise Unavailable("lost on the way")
        answer = await super().run(script, keys, args, timeout_s)
        if fate < 0.6:
            raise Unavailable("the answer was lost")
        return answer


async def test_a_write_that_is_repeated_is_counted_once_however_often_its_answer_is_lost(in_redis, monkeypatch):
    monkeypatch.setattr(redis_ledger, "PAUSE_S", 0.001)
    ledger = in_redis.ledger()
    ledger._calls.__class__ = Losing
    for _ in range(200):
        ledger.add("acme", "tools", Figures(1, 3, generated_tokens=1))
        await ledger.written()
        await asyncio.sleep(0)
    await asyncio.wait_for(ledger._idle.wait(), PATIENCE_S)
    assert await figures(in_redis.ledger()) == Figures(200, 600, generated_tokens=200)


async def test_turns_that_wait_at_the_same_time_share_writes(in_redis):
    ledger = in_redis.ledger()

    async def turn():
        for _ in range(10):
            ledger.add("acme", "tools", Figures(generated_tokens=1))
            await ledger.written()

    await asyncio.gather(*(turn() for _ in range(100)))
    assert (await figures(ledger)).generated_tokens == 1000
    assert ledger._number < 50


@pytest.mark.parametrize("way", ["kill", "pause"])
async def test_without_redis_turns_go_on_and_their_usage_is_written_once_it_is_back(own, way, monkeypatch):
    monkeypatch.setattr(redis_ledger, "PAUSE_S", 0.05)
    monkeypatch.setattr(redis_ledger, "CALL_S", 0.3)
    server, stores = own
    ledger = stores.ledger()
    ledger.add("acme", "tools", Figures(1))
    await ledger.written()
    getattr(server, way)()

    async def turn():
        for _ in range(20):
            ledger.add("acme", "tools", Figures(generated_tokens=1))
            await ledger.written()

    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(turn() for _ in range(5)))
    # One wait for all together; generous, because the machine may be busy.
    assert asyncio.get_running_loop().time() - began < redis_ledger.PATIENCE_S + 2
    assert ledger.is_behind
    assert stores.registry.get_sample_value("prefillshare_usage_unwritten_seconds") > 0
    with pytest.raises(Unavailable, match="the store of accounts: "):
        await ledger.rows()
    server.resume() if way == "pause" else server.start()
    await asyncio.wait_for(ledger._idle.wait(), PATIENCE_S)
    assert not ledger.is_behind
    assert stores.registry.get_sample_value("prefillshare_usage_unwritten_seconds") == 0
    assert await figures(stores.ledger()) == Figures(1, generated_tokens=100)


async def test_a_router_that_stops_writes_what_is_left(in_redis):
    ledger = in_redis.ledger()
    ledger.add("acme", "tools", Figures(1, 7))
    await ledger.close()
    assert await figures(in_redis.ledger()) == Figures(1, 7)


async def test_a_router_that_stops_without_redis_stops_nevertheless_and_says_what_is_lost(own, monkeypatch, caplog):
    monkeypatch.setattr(redis_ledger, "CLOSE_S", 0.3)
    server, stores = own
    ledger = stores.ledger()
    server.kill()
    ledger.add("acme", "tools", Figures(1, 7))
    async with asyncio.timeout(PATIENCE_S):
        await ledger.close()
    assert "what came meanwhile is lost" in caplog.text


@pytest.mark.parametrize("broken", ["hash", "figure", "days"])
async def test_what_somebody_else_has_damaged_is_named_and_nothing_is_half_written(in_redis, broken, monkeypatch, caplog):
    monkeypatch.setattr(redis_ledger, "PAUSE_S", 0.01)
    ledger, name = in_redis.ledger(), f"{{{in_redis.prefix}}}:usage"
    day = f"{name}:2026-05-01"
    async with Redis.from_url(in_redis.url) as redis:
        where = f"{name}:days" if broken == "days" else day
        if broken == "figure":
            await redis.hset(day, "b/d:turns", "many")
        else:
            await redis.set(where, "x")
        ledger.add("a", "d", Figures(1, 2))
        ledger.add("b", "d", Figures(1, 2))
        await ledger.written()

        async def named():
            return f"{where!r}" in caplog.text.replace("b'", "'")

        await until(named)
        assert broken == "hash" or await redis.hget(day, "a/d:turns") is None
        await redis.delete(where)
    await asyncio.wait_for(ledger._idle.wait(), PATIENCE_S)
    assert await figures(ledger) == Figures(2, 4)


async def test_routers_that_have_long_written_nothing_are_forgotten(in_redis):
    routers = f"{{{in_redis.prefix}}}:usage:routers"
    async with Redis.from_url(in_redis.url) as redis:
        now = (await redis.time())[0]
        await redis.hset(routers, mapping={"long": f"7 {now - redis_ledger.ROUTER_S - 1}", "lately": f"7 {now - 60}"})
        ledger = in_redis.ledger()
        ledger.add("a", "d", Figures(1))
        await ledger.written()

        async def forgotten():
            return set(await redis.hkeys(routers)) == {b"lately", ledger._router.encode()}

        await until(forgotten)
