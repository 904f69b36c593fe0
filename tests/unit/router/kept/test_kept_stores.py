"""What every store of kept contexts does: budgets hold, common beginnings count once, what is over counts no longer."""

import random

import pytest
from kept_stores import InMemory, InRedis

from prefillshare.router.kept.budgets import Budget
from prefillshare.router.kept.kept import Kept, block_keys, of_prompt, of_session
from prefillshare.router.kept.store import Answer

BLOCK = 4
PLENTY = Budget(1000, "own", 1000, "all")


@pytest.fixture(params=["memory", "redis"])
def where(request):
    return InMemory() if request.param == "memory" else InRedis(request.getfixturevalue("redis_server").url)


@pytest.fixture
async def store(where):
    store = where.make()
    yield store
    await store.close()


def keys(blocks: int, trunk: int = 0, salt: str | None = None) -> bytes:
    return block_keys([trunk, *range(blocks * BLOCK - 1)], BLOCK, salt)


def asked(name: str, of: bytes, tenant: str = "", **more) -> Kept:
    return Kept(tenant, name, len(of) // 8, **({"ttl_s": 100.0, "left_s": 100.0} | more))


async def keep(store, name: str, of: bytes, budget: Budget = PLENTY, tenant: str = "", **more):
    return await store.keep(asked(name, of, tenant, **more), of, budget)


async def test_what_is_kept_is_listed_with_the_time_that_is_left(store, where):
    await keep(store, "a", keys(3), tenant="ferry", priority=70, rank=8, salt="pepper")
    await where.pass_time(40)
    (kept,) = await store.of("ferry")
    assert (kept.name, kept.blocks, kept.ttl_s, kept.priority, kept.rank, kept.salt) == ("a", 3, 100, 70, 8, "pepper")
    assert kept.left_s == pytest.approx(60, abs=2)
    assert (await store.held(), await store.of("other")) == ({"ferry": 3}, [])
    assert (await store.own("ferry"), await store.own("other")) == (3, 0)


async def test_common_beginnings_count_once(store):
    await keep(store, "a", keys(5))
    assert (await keep(store, "b", keys(7))).own == 7
    assert (await keep(store, "c", keys(5, trunk=1))).own == 12
    assert (await keep(store, "d", keys(5, salt="pepper"))).own == 17
    await store.let_go("", "b")
    assert await store.held() == {"": 15}
    await store.let_go("", "a")
    assert await store.held() == {"": 10}


async def test_beyond_the_budget_nothing_changes_and_the_answer_says_what_is_kept(store):
    budget = Budget(8, "own", 100, "all")
    await keep(store, "a", keys(5), budget, ttl_s=30.0)
    answer = await keep(store, "b", keys(4, trunk=1), budget)
    assert (answer.kept, answer.refused, answer.own, answer.all) == (None, "own_budget", 5, 5)
    assert answer.free_s == pytest.approx(30, abs=2)
    assert [kept.name for kept in await store.of("")] == ["a"]
    assert (await keep(store, "b", keys(3, trunk=1), budget)).own == 8
    assert (await keep(store, "c", keys(9), budget)).refused == "never_fits"


async def test_all_tenants_together_have_a_budget(store):
    budget = Budget(8, "own", 10, "all")
    await keep(store, "a", keys(7), budget, "ferry")
    answer = await keep(store, "a", keys(7), budget, "harbour")
    assert (answer.refused, answer.own, answer.all) == ("all_budget", 0, 7)
    assert (await keep(store, "a", keys(3), budget, "harbour")).all == 10
    assert await store.held() == {"ferry": 7, "harbour": 3}


async def test_keeping_again_replaces_and_costs_the_difference_only(store, where):
    budget = Budget(8, "own", 100, "all")
    await keep(store, "a", keys(6), budget)
    await store.placed("", ["a"], "prefill", "one")
    await where.pass_time(60)
    again = await keep(store, "a", keys(8), budget)
    assert (again.kept.blocks, again.own) == (8, 8)
    assert again.kept.left_s == pytest.approx(100, abs=2)
    assert (again.kept.pool, again.kept.replica) == ("prefill", "one")
    assert (await keep(store, "a", keys(2), budget)).own == 2


async def test_a_budget_that_has_shrunk_takes_nothing_away_but_lets_nothing_grow(store):
    await keep(store, "a", keys(6))
    smaller = Budget(4, "own", 100, "all")
    assert (await store.prolong("", "a", keys(6), smaller)).refused == ""
    assert (await store.prolong("", "a", keys(7), smaller)).kept.blocks == 6
    assert (await store.prolong("", "a", keys(5), smaller)).kept.blocks == 5


async def test_a_context_that_goes_on_grows_within_the_budget_and_is_prolonged_anyway(store, where):
    budget = Budget(8, "own", 100, "all")
    await keep(store, "a", keys(6), budget)
    await where.pass_time(90)
    answer = await store.prolong("", "a", keys(8), budget)
    assert (answer.kept.blocks, answer.refused) == (8, "")
    await where.pass_time(90)
    answer = await store.prolong("", "a", keys(9), budget)
    assert (answer.kept.blocks, answer.refused, answer.own) == (8, "own_budget", 8)
    assert answer.kept.left_s == pytest.approx(100, abs=2)


async def test_what_is_not_kept_is_not_prolonged(store, where):
    assert (await store.prolong("", "a", keys(3), PLENTY)).kept is None
    await keep(store, "a", keys(3))
    await where.pass_time(100)
    assert (await store.prolong("", "a", keys(3), PLENTY)).kept is None
    assert await store.held() == {}


async def test_what_is_over_counts_no_longer(store, where):
    budget = Budget(8, "own", 8, "all")
    await keep(store, "a", keys(5), budget, ttl_s=10.0)
    await keep(store, "b", keys(3, trunk=1), budget, ttl_s=50.0)
    await where.pass_time(11)
    assert await store.held() == {"": 3}
    assert (await keep(store, "c", keys(5, trunk=2), budget)).own == 8
    await where.pass_time(40)
    assert [kept.name for kept in await store.of("")] == ["c"]


async def test_what_is_shortened_ends_sooner_now_and_whenever_it_is_prolonged(store, where):
    await keep(store, "a", keys(3), tenant="ferry", priority=70, rank=8, salt="pepper")
    await store.placed("ferry", ["a"], "prefill", "one")
    kept = await store.shorten("ferry", "a", 10.0)
    assert (kept.blocks, kept.ttl_s, kept.left_s) == (3, 10, pytest.approx(10, abs=1))
    assert (kept.priority, kept.rank, kept.salt, kept.replica) == (70, 8, "pepper", "one")
    assert (await store.shorten("ferry", "a", 50.0)).ttl_s == 10, "it is never lengthened"
    await where.pass_time(5)
    assert (await store.prolong("ferry", "a", keys(4), PLENTY)).kept.left_s == pytest.approx(10, abs=1)
    await where.pass_time(11)
    assert (await store.of("ferry"), await store.shorten("ferry", "a", 5.0)) == ([], None)


async def test_letting_go_tells_where_it_was_kept(store):
    await keep(store, "a", keys(3))
    assert await store.placed("", ["a", "unknown"], "prefill", "one") == ["unknown"]
    gone = await store.let_go("", "a")
    assert (gone.blocks, gone.pool, gone.replica) == (3, "prefill", "one")
    assert (await store.let_go("", "a"), await store.of(""), await store.held()) == (None, [], {})


async def test_a_longer_prompt_takes_the_place_of_those_it_begins_with_unless_they_are_kept_longer(store):
    system, first, second = keys(2), keys(4), keys(6)
    await keep(store, of_prompt(system), system, ttl_s=3600.0)
    await keep(store, of_prompt(first), first, ttl_s=300.0)
    await keep(store, of_session("s"), first, ttl_s=10.0)
    await keep(store, of_prompt(second), second, ttl_s=300.0)
    names = {kept.name for kept in await store.of("")}
    assert names == {of_prompt(system), of_prompt(second), of_session("s")}
    assert await store.held() == {"": 6}


async def test_one_caller_sees_to_a_context_for_a_time(store):
    assert await store.claim("", "a", 60)
    assert not await store.claim("", "a", 60)
    assert await store.claim("", "b", 60)
    assert await store.claim("ferry", "a", 60)


async def test_an_empty_context_may_be_kept_and_grow(store):
    assert (await keep(store, "a", b"")).kept.blocks == 0
    assert await store.held() == {"": 0}
    assert (await store.prolong("", "a", keys(2), PLENTY)).kept.blocks == 2


async def test_two_stores_count_the_same(redis_server):
    """Whatever is kept, prolonged, let go, and over."""
    rng, memory, redis = random.Random(5), InMemory(), InRedis(redis_server.url)
    stores = [memory.make(), redis.make()]
    try:
        for _ in range(150):
            of = keys(rng.randrange(9), trunk=rng.randrange(3))
            name = rng.choice(["x", "y", of_prompt(of) if of else "z"])
            budget, action = Budget(rng.randrange(6, 20), "own", rng.randrange(10, 25), "all"), rng.random()
            tenant, ttl_s = rng.choice(["", "ferry"]), rng.choice([5.0, 20.0, 100.0])
            told = []
            for store in stores:
                if action < 0.6:
                    answer = await keep(store, name, of, budget, tenant, ttl_s=ttl_s, rank=len(name))
                elif action < 0.8:
                    answer = await store.prolong(tenant, name, of, budget)
                elif action < 0.9:
                    await store.let_go(tenant, name)
                    answer = None
                else:
                    kept = await store.shorten(tenant, name, ttl_s)
                    answer = kept and Answer(kept)
                told.append(answer and (answer.refused, answer.own, answer.all, answer.kept and answer.kept.blocks))
            assert told[0] == told[1]
            for one in (memory, redis):
                await one.pass_time(1)
            held = [await store.held() for store in stores]
            assert held[0] == held[1]
        for one in (memory, redis):
            await one.pass_time(200)
        assert [await store.held() for store in stores] == [{}, {}]
        assert await redis.keys() == []
    finally:
        for store in stores:
            await store.close()
