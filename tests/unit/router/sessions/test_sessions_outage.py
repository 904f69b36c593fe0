"""Sessions while Redis is gone, silent or locked: a typed error in time that tells clients nothing of the server, a log without
its password, and all is well afterwards."""

import asyncio
import re

import pytest
from polling import PATIENCE_S, until
from prometheus_client import CollectorRegistry, Gauge
from redis.exceptions import ResponseError

from prefillshare.kvshare.config import Base, Router
from prefillshare.kvshare.errors import ConfigError, Unavailable
from prefillshare.router.redis_calls import MAX_CONNECTIONS, RedisCalls
from prefillshare.router.sessions import MemorySessions, RedisSessions, SessionGauge, open_sessions, open_threads

PASSWORD = "p w/@:#"

@pytest.fixture
def server(own_redis_server):
    return own_redis_server()


@pytest.fixture
def base(model):
    return Base(model=str(model()))


@pytest.fixture
async def store(server):
    store = RedisSessions(RedisCalls(server.url, "session store"), 5, 60, timeout_s=1, lease_s=30)
    yield store
    await store.close()


async def test_a_killed_server_is_unavailable_and_after_its_restart_the_session_is_there(store, server, caplog):
    await store.create("s", [1], tenant="")
    server.kill()
    async with asyncio.timeout(PATIENCE_S):
        for use in (store.get("s", tenant=""), store.create(tenant=""), store.delete("s", tenant=""), store.count()):
            with pytest.raises(Unavailable, match="the session store: it cannot be reached") as raised:
                await use
            assert not re.search(rf"redis|127|{server.port}", str(raised.value))
        with pytest.raises(Unavailable):
            async with store.turn("s", tenant=""):
                pass
    server.start()
    async with store.turn("s", tenant="") as session:
        await store.commit(session, [1, 2], open_response=False)
    assert (await store.get("s", tenant="")).token_ids == (1, 2)
    told = [record.getMessage() for record in caplog.records if record.message.startswith("session store")]
    where = f"redis://127.0.0.1:{server.port}/0"
    assert told[0].startswith(f"session store {where}: ConnectionError: ")
    assert told[-1] == f"session store {where} works again"
    assert len(told) <= 3  # changes, not calls: the connection breaks, then there is none, then there is again


async def test_a_turn_fails_while_the_server_is_gone_and_goes_on_once_it_is_back(store, server):
    await store.create("s", [1], tenant="")
    async with store.turn("s", tenant="") as session:
        server.kill()
        with pytest.raises(Unavailable):
            await store.commit(session, [1, 2], open_response=False)
        server.start()
        assert (await store.get("s", tenant="")).token_ids == (1,)
        await store.commit(session, [1, 2], open_response=False)
    session = await store.get("s", tenant="")
    assert (session.token_ids, session.turns, session.busy) == ((1, 2), 1, False)


async def test_a_turn_whose_end_cannot_be_told_ends_with_its_lease(server, caplog):
    store = RedisSessions(RedisCalls(server.url, "session store"), 5, 60, lease_s=0.2)
    await store.create("s", tenant="")
    async with store.turn("s", tenant=""):
        server.kill()
    assert "session 's' is held for up to 0.2 s" in caplog.text
    server.start()

    async def free():
        return not (await store.get("s", tenant="")).busy

    await until(free)
    await store.close()


async def test_a_silent_server_is_unavailable_after_the_timeout_for_any_number_of_callers(store, server):
    await store.create("s", [1], tenant="")
    server.pause()
    async with asyncio.timeout(PATIENCE_S):
        calls = (store.get("s", tenant="") for _ in range(MAX_CONNECTIONS + 10))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {(type(outcome), outcome.message) for outcome in outcomes} == {
        (Unavailable, "the session store: no answer within 1 s")
    }
    server.resume()
    assert (await store.get("s", tenant="")).token_ids == (1,)


async def test_whoever_is_cancelled_while_the_store_is_asked_stops(store):
    async def ask():
        while True:
            await store.count()

    await store.count()
    for steps in range(40):
        asking = asyncio.create_task(ask())
        for _ in range(steps):
            await asyncio.sleep(0)
        asking.cancel()
        assert (await asyncio.wait([asking], timeout=PATIENCE_S))[0] == {asking}


async def test_a_router_starts_only_if_its_store_answers(server, base, monkeypatch):
    monkeypatch.setenv("REDIS_SECRET", PASSWORD)
    server.kill()
    with pytest.raises(Unavailable, match=rf"^router\.redis_url: redis://someone@127\.0\.0\.1:{server.port}") as raised:
        await open_sessions(
            Router(redis_url=f"redis://someone@127.0.0.1:{server.port}", redis_password_env="REDIS_SECRET"), base, {}
        )
    assert PASSWORD not in str(raised.value)


async def test_the_password_comes_from_the_environment_or_the_url_and_is_never_shown(
    own_redis_server, base, monkeypatch, caplog
):
    caplog.set_level("DEBUG")
    server = own_redis_server(PASSWORD)
    bare = f"redis://127.0.0.1:{server.port}"
    by_env = Router(redis_url=bare, redis_password_env="REDIS_SECRET")
    for password, problem in ((None, ConfigError), ("", ConfigError), ("wrong " + PASSWORD, Unavailable)):
        if password is not None:
            monkeypatch.setenv("REDIS_SECRET", password)
        with pytest.raises(problem) as raised:
            await open_sessions(by_env, base, {})
        assert "REDIS_SECRET" in str(raised.value) if problem is ConfigError else PASSWORD not in str(raised.value)
    with pytest.raises(Unavailable, match="Authentication required"):
        await open_sessions(Router(redis_url=bare), base, {})
    monkeypatch.setenv("REDIS_SECRET", PASSWORD)
    for store in (await open_sessions(by_env, base, {}), RedisSessions(RedisCalls(server.url, "session store"), 5, 60)):
        assert (await store.create(tenant="")).turns == 0

        async def repeats(*_):
            raise ResponseError(f"ERR unknown command 'AUTH', with args beginning with: '{PASSWORD}'")

        monkeypatch.setattr(store._calls._redis, "evalsha", repeats)
        with pytest.raises(Unavailable) as raised:
            await store.count()
        assert raised.value.message == "the session store: it answers with an error"
        assert store.trouble.endswith("beginning with: '***'")
        await store.close()
    assert PASSWORD not in caplog.text


async def test_the_configured_prefix_limit_and_time_to_live_are_the_stores(server, base):
    config = Router(redis_url=server.url, redis_prefix="mine", max_sessions=1, session_ttl_s=7)
    store = await open_sessions(config, base, {"a": 1})
    session = await store.create("s", tenant="")
    assert 0 < await store.expires_in_s(session) <= 7
    assert (await store._calls._redis.keys("{mine}:*")) == await store._calls._redis.keys("*")
    assert (store.max_sessions, store.ttl_s, store.max_per_tenant) == (1, 7, {"a": 1})
    await store.close()


async def test_without_a_url_sessions_are_in_memory(base):
    store = await open_sessions(Router(max_sessions=3, session_ttl_s=7), base, {"a": 1})
    assert (type(store), store.max_sessions, store.ttl_s, store.max_per_tenant) == (MemorySessions, 3, 7, {"a": 1})


async def test_the_store_of_threads_is_apart_and_makes_room_for_new_ones(server, base):
    config = Router(redis_url=server.url, max_responses=2, response_ttl_s=7)
    threads = await open_threads(config, base, ("a", "b"))
    sessions = await open_sessions(config, base, {})
    assert (threads.max_sessions, threads.ttl_s, threads.max_per_tenant) == (4, 7, {"a": 2, "b": 2})
    for number in range(3):
        await threads.create(f"t{number}", tenant="a")
    assert (await threads.count("a"), await sessions.count()) == (2, 0)
    for store in (threads, sessions):
        await store.close()


async def test_the_gauge_follows_the_store_also_after_an_outage(store, server):
    gauge = Gauge("sessions", "-", registry=CollectorRegistry())
    keeper = SessionGauge(store, gauge, period_s=0.01)

    async def shows_all():
        return gauge._value.get() == await store.count()

    await store.create("a", tenant="")
    await until(shows_all)
    server.kill()
    with pytest.raises(Unavailable):
        await store.count()
    server.start()
    await store.create("b", tenant="")
    await until(shows_all)
    await keeper.stop()
