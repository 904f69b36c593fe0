"""Limits over several routers: one count for all, also of turns whose router is gone, and what holds while Redis is away."""

import asyncio

import pytest
from account_stores import InRedis
from polling import PATIENCE_S, until
from redis.asyncio import Redis

from prefillshare.kvshare.errors import Overloaded, Unavailable
from prefillshare.router.accounts import redis_limits
from prefillshare.router.accounts.limits import Charge
from prefillshare.router.admission.grant import Demand, TenantShare
from prefillshare.router.redis_calls import RedisCalls

pytestmark = pytest.mark.slow

ACME = TenantShare("acme", max_in_progress=2, tokens_per_minute=6000)
TURN = Demand("agents", 100, tenant=ACME)


async def fits(limits, demand: Demand = TURN) -> bool:
    try:
        charge = await limits.take(demand, 10)
    except Overloaded:
        return False
    charge.give_back()
    await charge.settled()
    return True


async def test_turns_in_progress_and_tokens_are_counted_over_all_routers(in_redis):
    one, other = in_redis.limits(), in_redis.limits()
    first, second = await one.take(TURN, 10), await other.take(TURN, 2900)
    assert not await fits(one)
    assert not await fits(other)
    second.settle(2900)
    await second.settled()
    assert await fits(one)
    with pytest.raises(Overloaded, match=r"^tenants\.acme\.tokens_per_minute: of 6000 tokens a minute"):
        await one.take(TURN, 5000)
    first.settle(10)
    await first.settled()


async def test_too_many_turns_in_progress_are_refused_with_a_hint(in_redis):
    limits = in_redis.limits()
    for _ in range(2):
        await limits.take(TURN, 10)
    with pytest.raises(Overloaded) as caught:
        await limits.take(TURN, 10)
    error = caught.value
    assert (error.field, error.message) == ("tenants.acme.max_in_progress", "2 turns are in progress or waiting")
    assert error.retry_after_s == redis_limits.RETRY_S


async def test_the_turns_of_a_router_that_died_count_until_their_leases_end_and_others_go_on(in_redis):
    dead, alive = in_redis.limits(), in_redis.limits()
    await dead.take(TURN, 10)
    kept = await alive.take(TURN, 10)
    for _ in range(2):
        assert not await fits(alive)
        await in_redis.pass_time(redis_limits.LEASE_S * 0.6)
        await alive.renew()
    another = await alive.take(TURN, 10)
    assert not await fits(alive)
    for charge in (kept, another):
        charge.settle(0)
        await charge.settled()
    assert await fits(alive)


async def test_a_turn_that_has_ended_is_not_renewed(in_redis):
    limits = in_redis.limits()
    first, second = [await limits.take(TURN, 10) for _ in range(2)]
    first.settle(10)
    await first.settled()
    limits._open[first.turn] = first  # a renewal that was under way when the turn ended
    await limits.renew()
    assert await fits(limits)
    second.settle(10)


async def test_what_a_turn_generates_beyond_what_was_expected_is_taken_while_it_runs(in_redis):
    limits, half = in_redis.limits(), Demand("agents", 3000, tenant=ACME)
    charge = await limits.take(TURN, 10)
    charge.used(50)
    await limits.renew()
    assert await fits(limits, half)
    charge.used(5990)
    await limits.renew()
    assert not await fits(limits, half)
    charge.settle(100)
    await charge.settled()
    assert await fits(limits, half)


class Repeating(RedisCalls):
    """Each answer is lost once: the script runs twice."""

    async def run(self, script, keys, args, timeout_s):
        await super().run(script, keys, args, timeout_s)
        return await super().run(script, keys, args, timeout_s)


async def test_a_call_whose_answer_was_lost_and_that_is_repeated_counts_once(in_redis):
    limits = in_redis.limits()
    limits._calls.__class__ = Repeating
    charge = await limits.take(TURN, 2000)
    charge.settle(2000)
    await charge.settled()
    assert await fits(limits)
    (await limits.take(TURN, 3500)).give_back()
    with pytest.raises(Overloaded):
        await limits.take(TURN, 4500)


class Late(RedisCalls):
    """The answer to the first call comes after its deadline: the script has run."""

    first = True

    async def run(self, script, keys, args, timeout_s):
        answer = await super().run(script, keys, args, timeout_s)
        if self.first:
            self.first = False
            raise Unavailable("no answer within 0.25 s")
        return answer


async def test_a_turn_that_redis_took_too_late_is_charged_once_and_is_no_turn_in_progress_there(in_redis, monkeypatch):
    monkeypatch.setattr(redis_limits, "AWAY_S", 0)
    late, other = in_redis.limits(), in_redis.limits()
    late._calls.__class__ = Late
    alone = await late.take(Demand("agents", 4000, tenant=ACME), 0)
    assert type(alone).__name__ != "_InRedis"
    await asyncio.gather(*late._background._running)
    taken = [await other.take(Demand("agents", 2900, tenant=ACME), 0) for _ in range(2)]
    assert len(taken) == 2, "both turns and the whole minute's tokens are there"
    alone.settle(4000)


@pytest.fixture
async def own(own_redis_server):
    server = own_redis_server()
    made = InRedis(server.url)
    yield server, made
    server.resume()
    await made.close()


@pytest.mark.parametrize("way", ["kill", "pause"])
async def test_without_redis_each_router_limits_by_itself_and_nobody_waits_for_long(own, way, monkeypatch):
    server, stores = own
    limits = stores.limits()
    monkeypatch.setattr(redis_limits, "AWAY_S", 0.3)
    (await limits.take(TURN, 10)).settle(10)
    getattr(server, way)()
    async with asyncio.timeout(PATIENCE_S):
        taken = await asyncio.gather(*(limits.take(Demand("agents", 2000, tenant=ACME), 0) for _ in range(3)))
        assert len(taken) == 3
        with pytest.raises(Overloaded, match="tokens_per_minute"):
            await limits.take(TURN, 10)
    assert stores.registry.get_sample_value("prefillshare_turns_limited_alone_total") == 4
    for charge in taken:
        charge.settle(0)
    server.resume() if way == "pause" else server.start()

    async def over_all_again():
        charge = await limits.take(TURN, 10)
        charge.give_back()
        return type(charge).__name__ == "_InRedis"

    await until(over_all_again)


async def test_a_tenant_without_limits_does_not_ask_redis(own):
    server, stores = own
    limits = stores.limits()
    server.pause()
    async with asyncio.timeout(redis_limits.PATIENCE_S / 2):
        assert type(await limits.take(Demand("agents", 10**9, tenant=TenantShare("free")), 10)) is Charge


async def test_nothing_of_a_tenant_stays_in_redis_when_it_asks_no_more(in_redis):
    limits = in_redis.limits()
    ended, _ = [await limits.take(TURN, 10) for _ in range(2)]
    async with Redis.from_url(in_redis.url) as redis:
        keys = await redis.keys(f"{{{in_redis.prefix}}}:limits:*")
        left_ms = [await redis.pttl(key) for key in keys]
        assert len(keys) == 3
        assert all(0 < ms <= 60_000 for ms in left_ms)
    ended.settle(10)
    await ended.settled()
