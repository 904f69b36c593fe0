"""Sessions in Redis: shared by routers, held by leases, sent as deltas, and what happens when the server or a router goes."""

import asyncio
import uuid

import pytest
from polling import PATIENCE_S, until
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as ConnectionLost

from prefillshare.kvshare.errors import Conflict, ContractMismatch, NotFound, Unavailable
from prefillshare.router.redis_calls import RedisCalls
from prefillshare.router.sessions import RedisSessions
from prefillshare.router.sessions.redis_lease import Lease

pytestmark = pytest.mark.slow

#: For tests in which a lease or a TTL ends by itself.
SHORT_S = 0.2

@pytest.fixture
async def routers(redis_server):
    """make(**options) -> one more router's store of the same deployment."""
    stores, prefix = [], uuid.uuid4().hex

    def make(prefix: str = prefix, **options) -> RedisSessions:
        calls = RedisCalls(redis_server.url, "session store", prefix=prefix)
        stores.append(RedisSessions(calls, **({"max_sessions": 5, "ttl_s": 60} | options)))
        return stores[-1]

    yield make
    for store in stores:
        await store.close()


@pytest.fixture
async def redis(redis_server):
    async with Redis.from_url(redis_server.url) as client:
        yield client


def vanish(store: RedisSessions, monkeypatch) -> None:
    """From here on the router is silent: it renews nothing and ends nothing."""

    async def silent(*_):
        return [b"ok"]

    monkeypatch.setattr(store, "_lease", lambda *_: Lease(silent, "", "", SHORT_S))


async def test_routers_share_sessions_and_their_turns_exclude_each_other(routers):
    one, two = routers(), routers()
    await one.create("s", [1], tenant="")
    async with one.turn("s", tenant="") as session:
        with pytest.raises(Conflict, match="another turn runs"):
            async with two.turn("s", tenant=""):
                pass
        await one.commit(session, [1, 2], open_response=True)
    async with two.turn("s", tenant="") as session:
        assert (session.token_ids, session.open_response) == ((1, 2), True)
        await two.commit(session, [1, 2, 3], open_response=False)
    assert (await one.get("s", tenant="")).token_ids == (1, 2, 3)
    assert await one.count() == await two.count() == 1


async def test_of_many_turns_at_once_one_runs(routers):
    stores = [routers() for _ in range(4)]
    await stores[0].create("s", tenant="")
    begun, go_on = [], asyncio.Event()

    async def take(store):
        async with store.turn("s", tenant="") as session:
            begun.append(session)
            await go_on.wait()
            await store.commit(session, [len(begun)], open_response=False)

    turns = [asyncio.create_task(take(store)) for store in stores for _ in range(4)]
    await asyncio.wait(turns, timeout=PATIENCE_S, return_when=asyncio.FIRST_EXCEPTION)
    go_on.set()
    outcomes = await asyncio.gather(*turns, return_exceptions=True)
    assert (len(begun), sum(isinstance(o, Conflict) for o in outcomes), outcomes.count(None)) == (1, 15, 1)
    assert (await stores[0].get("s", tenant="")).turns == 1


async def test_sessions_outlive_their_router(routers):
    first = routers()
    await first.create("s", [1, 2], tenant="t", cache_domain="d")
    await first.close()
    session = await routers().get("s", tenant="t")
    assert (session.token_ids, session.cache_domain) == ((1, 2), "d")


async def test_deployments_on_one_server_do_not_meet(routers):
    await routers().create("s", tenant="")
    other = routers(prefix=uuid.uuid4().hex)
    with pytest.raises(NotFound):
        await other.get("s", tenant="")
    assert await other.count() == 0


@pytest.mark.parametrize("begun", [True, False])
async def test_a_vanished_routers_turn_ends_with_its_lease_and_commits_only_if_no_other_has_begun(routers, monkeypatch, begun):
    gone, other = routers(lease_s=SHORT_S), routers()
    vanish(gone, monkeypatch)
    await gone.create("s", [1], tenant="")

    async def free():
        return not (await other.get("s", tenant="")).busy

    async with gone.turn("s", tenant="") as late:
        await until(free)
        if not begun:
            await gone.commit(late, [1, 2], open_response=True)
            assert (await other.get("s", tenant="")).token_ids == (1, 2)
            return
        async with other.turn("s", tenant="") as session:
            with pytest.raises(Conflict, match="no longer holds"):
                await gone.commit(late, [1, 2], open_response=True)
            await other.commit(session, [1, 3], open_response=False)
    assert (late.token_ids, late.turns) == ((1,), 0)
    session = await other.get("s", tenant="")
    assert (session.token_ids, session.turns, session.open_response) == ((1, 3), 1, False)


async def test_a_turn_longer_than_its_lease_and_the_ttl_keeps_its_session(routers, redis):
    store = routers(lease_s=6)
    await store.create("s", [1], tenant="")
    store.ttl_s = SHORT_S
    (key,) = await redis.keys(store._calls.key("session", "*"))
    async with store.turn("s", tenant="") as session:
        first = int(await redis.hget(key, "until"))

        async def renewed():
            return int(await redis.hget(key, "until")) > first

        await until(renewed)
        assert await redis.pttl(key) > 1000 * SHORT_S
        await store.commit(session, [1, 2], open_response=False)
    assert 0 <= await redis.pttl(key) <= 1000 * SHORT_S or not await redis.exists(key)


async def test_what_expires_leaves_nothing_behind(routers, redis):
    store = routers(ttl_s=2)
    for tenant in ("", "t"):
        await store.create("s", [1], tenant=tenant)
        await store.fork("s", tenant=tenant)

    async def empty():
        return await redis.keys(store._calls.key("*")) == []

    await until(empty)
    assert await store.count() == 0


async def test_a_session_of_which_the_server_evicted_a_part_is_no_session(routers, redis):
    store = routers()
    for kind in ("tokens", "session"):
        await store.create("s", [1, 2], tenant="")
        (key,) = await redis.keys(store._calls.key(kind, "*"))
        await redis.delete(key)
        with pytest.raises(NotFound):
            await store.get("s", tenant="")
    assert (await store.create("s", [3], tenant="")).token_ids == (3,)


async def test_a_commit_sends_only_what_is_new(routers, redis):
    async def received() -> int:
        return (await redis.info("stats"))["total_net_input_bytes"]

    store, context = routers(), tuple(range(20_000))
    await store.create("warm", tenant="")
    async with store.turn("warm", tenant="") as session:
        await store.commit(session, [1], open_response=False)  # the server has all scripts from here on
    await store.create("s", context, tenant="")
    await store.fork("s", "t", tenant="")
    before = await received()
    async with store.turn("s", tenant="") as session:
        await store.commit(session, (*context, *range(100)), open_response=False)
    extended = await received() - before
    async with store.turn("t", tenant="") as session:
        await store.commit(session, context[1:], open_response=False)
    rewritten = await received() - before - extended
    assert 400 < extended < 2_400
    assert rewritten > 4 * len(context) - 4


@pytest.mark.parametrize("lost", ["request", "reply"])
async def test_a_lost_connection_is_tried_again_and_nothing_is_done_twice(routers, monkeypatch, lost):
    store = routers()
    evalsha, losses = store._calls._redis.evalsha, []

    async def flaky(*args):
        if losses:
            losses.clear()
            return await evalsha(*args)
        losses.append(lost)
        if lost == "reply":
            await evalsha(*args)
        raise ConnectionLost("Connection closed by server.")

    await store.create("warm", tenant="")
    await store.fork("warm", tenant="")
    async with store.turn("warm", tenant="") as session:
        await store.commit(session, [1], open_response=False)
    await store.create("gone", tenant="")
    await store.delete("gone", tenant="")
    monkeypatch.setattr(store._calls._redis, "evalsha", flaky)
    await store.create("s", [1], tenant="")
    async with store.turn("s", tenant="") as session:
        await store.commit(session, [1, 2], open_response=False)
        await store.commit(session, [1, 2, 3], open_response=False)
    fork = await store.fork("s", "t", tenant="")
    assert (fork.token_ids, fork.turns, fork.busy, await store.count()) == ((1, 2, 3), 2, False, 4)
    with pytest.raises(Unavailable):
        await store.delete("s", tenant="")


async def test_a_turn_cancelled_while_it_begins_leaves_the_session_free(routers, monkeypatch):
    store = routers()
    await store.create("s", tenant="")
    load, begun = store._load, asyncio.Event()

    async def stuck(*args):
        await load(*args)
        begun.set()
        await asyncio.Event().wait()

    async def take():
        async with store.turn("s", tenant=""):
            pass

    monkeypatch.setattr(store, "_load", stuck)
    turn = asyncio.create_task(take())
    await begun.wait()
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    monkeypatch.undo()
    assert not (await store.get("s", tenant="")).busy


async def test_token_ids_of_another_tokenizer_are_not_taken_for_ours(redis_server):
    prefix = uuid.uuid4().hex
    calls = [RedisCalls(redis_server.url, "session store", prefix=prefix) for _ in range(2)]
    ours, theirs = (RedisSessions(own, 5, 100, tokenizer=name * 64) for own, name in zip(calls, "ab", strict=True))
    await ours.create("s", [1, 2], tenant="")
    for ask in (theirs.get("s", tenant=""), theirs.fork("s", "f", tenant=""), theirs.turn("s", tenant="").__aenter__()):
        with pytest.raises(ContractMismatch, match="aaaaaaaaaaaa; this deployment's base has bbbbbbbbbbbb"):
            await ask
    async with ours.turn("s", tenant="") as session:
        assert session.token_ids == (1, 2)
    assert await ours.count() == 1, "the fork is not left"
    await theirs.delete("s", tenant="")
    for store in (ours, theirs):
        await store.close()
