"""What every session store does: bounded, forgotten in time, one turn at once, changed only by turns that end well."""

import pytest
from session_stores import InMemory, InRedis

from prefillshare.kvshare.errors import Conflict, InvalidInput, NotFound, Overloaded
from prefillshare.router.sessions.base import Mark
from prefillshare.router.sessions.transcript import Transcript


@pytest.fixture(params=["memory", "redis"])
def where(request):
    return InMemory() if request.param == "memory" else InRedis(request.getfixturevalue("redis_server").url)


@pytest.fixture
async def store(where):
    store = where.make(max_sessions=2, ttl_s=10)
    yield store
    await store.close()


async def take(store, session_id, token_ids, open_response=False, tenant=""):
    async with store.turn(session_id, tenant=tenant) as session:
        await store.commit(session, token_ids, open_response)


async def test_a_turn_extends_the_context_and_counts(store):
    await store.create("s", [1, 2], tenant="")
    async with store.turn("s", tenant="") as session:
        assert session.busy
        await store.commit(session, [1, 2, 3], open_response=True)
        assert (session.token_ids, session.turns, session.open_response) == ((1, 2, 3), 1, True)
    session = await store.get("s", tenant="")
    assert (session.token_ids, session.turns, session.open_response, session.busy) == ((1, 2, 3), 1, True, False)


async def test_turns_follow_each_other_and_one_may_commit_more_than_once(store):
    await store.create("s", tenant="")
    async with store.turn("s", tenant="") as session:
        await store.commit(session, [1], open_response=True)
        await store.commit(session, [1, 2], open_response=False)
    await take(store, "s", [1, 2, 3])
    session = await store.get("s", tenant="")
    assert (session.token_ids, session.turns, session.open_response) == ((1, 2, 3), 3, False)


async def test_a_second_turn_meanwhile_is_a_conflict_and_the_first_goes_on(store):
    await store.create("s", tenant="")
    async with store.turn("s", tenant="") as session:
        with pytest.raises(Conflict, match="another turn runs on session 's'"):
            await take(store, "s", [9])
        assert (await store.get("s", tenant="")).busy
        await store.commit(session, [1], open_response=False)
    await take(store, "s", [1, 2])
    assert (await store.get("s", tenant="")).token_ids == (1, 2)


async def test_a_turn_that_fails_leaves_the_session_free_and_unchanged(store):
    await store.create("s", [1], tenant="")

    async def fail():
        async with store.turn("s", tenant="") as session:
            session.replicas["prefill"] = "r1"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    session = await store.get("s", tenant="")
    assert (session.token_ids, session.busy, session.replicas) == ((1,), False, {})


async def test_only_the_turn_that_holds_a_session_may_commit(store):
    never = await store.create("s", [1], tenant="")
    async with store.turn("s", tenant="") as ended:
        pass
    async with store.turn("s", tenant=""):
        for session in (never, ended):
            with pytest.raises(Conflict, match="the turn no longer holds session 's'"):
                await store.commit(session, [1, 2], open_response=False)
    assert (await store.get("s", tenant="")).token_ids == (1,)


async def test_a_session_deleted_during_its_turn_is_not_brought_back(store):
    await store.create("s", tenant="")
    async with store.turn("s", tenant="") as session:
        await store.delete("s", tenant="")
        with pytest.raises(Conflict, match="deleted during the turn"):
            await store.commit(session, [1], open_response=False)
    with pytest.raises(NotFound):
        await store.get("s", tenant="")
    assert await store.count() == 0


async def test_a_turn_does_not_commit_to_a_new_session_of_the_same_name(store):
    await store.create("s", tenant="")
    async with store.turn("s", tenant="") as old:
        await store.delete("s", tenant="")
        await store.create("s", [7], tenant="")
        async with store.turn("s", tenant="") as new:
            with pytest.raises(Conflict):
                await store.commit(old, [1], open_response=False)
            await store.commit(new, [7, 8], open_response=False)
    assert (await store.get("s", tenant="")).token_ids == (7, 8)


async def test_a_fork_has_the_context_and_then_goes_its_own_way(store):
    await store.create("s", [1, 2], tenant="", cache_domain="d")
    async with store.turn("s", tenant="") as session:
        session.replicas["prefill"] = "r1"
        await store.commit(session, [1, 2, 3], open_response=True)
        fork = await store.fork("s", "t", tenant="")
    kept = (fork.token_ids, fork.turns, fork.open_response, fork.replicas, fork.cache_domain, fork.busy)
    assert kept == ((1, 2, 3), 1, True, {"prefill": "r1"}, "d", False)
    async with store.turn("t", tenant="") as session:
        session.replicas["prefill"] = "r2"
        await store.commit(session, [1, 2, 3, 9], open_response=False)
    await take(store, "s", [1, 2, 3, 4])
    old, new = await store.get("s", tenant=""), await store.get("t", tenant="")
    assert (old.token_ids, old.replicas) == ((1, 2, 3, 4), {"prefill": "r1"})
    assert (new.token_ids, new.replicas) == ((1, 2, 3, 9), {"prefill": "r2"})


async def test_a_fork_needs_a_session_a_free_name_and_room(store):
    with pytest.raises(NotFound, match="no session 's'"):
        await store.fork("s", "t", tenant="")
    await store.create("s", tenant="")
    with pytest.raises(Conflict, match="session 's' exists already"):
        await store.fork("s", "s", tenant="")
    assert len((await store.fork("s", tenant="")).session_id) == 32
    with pytest.raises(Overloaded):
        await store.fork("s", tenant="")


async def test_what_callers_hold_is_not_what_is_stored(store):
    session = await store.create("s", [1], tenant="")
    session.replicas["prefill"] = "r1"
    session.token_ids = (9,)
    session = await store.get("s", tenant="")
    assert (session.token_ids, session.replicas) == ((1,), {})


async def test_sessions_are_forgotten_after_their_time_but_not_while_busy(store, where):
    await store.create("idle", tenant="")
    await store.create("busy", tenant="")
    async with store.turn("busy", tenant=""):
        await where.pass_time(11)
        assert await store.count() == 1
        with pytest.raises(NotFound, match="unused for 10 s"):
            await store.get("idle", tenant="")
        await store.create("idle", [5], tenant="")
    assert 5 < await store.expires_in_s(await store.get("busy", tenant="")) <= 10


async def test_a_turns_end_renews_its_session(store, where):
    session = await store.create("long", tenant="")
    async with store.turn("long", tenant=""):
        await where.pass_time(11)
    assert 5 < await store.expires_in_s(session) <= 10
    await where.pass_time(11)
    assert (await store.count(), await store.expires_in_s(session)) == (0, 0)


async def test_use_renews_a_session_and_its_fork(store, where):
    await store.create("s", tenant="")
    for _ in range(3):
        await where.pass_time(6)
        await store.get("s", tenant="")
    await where.pass_time(6)
    await store.fork("s", "t", tenant="")
    await where.pass_time(6)
    assert await store.count() == 2


async def test_a_full_store_refuses_with_a_retry_hint_and_a_taken_name_is_a_conflict(store, where):
    await store.create("a", tenant="")
    with pytest.raises(Conflict, match="exists already"):
        await store.create("a", tenant="")
    await store.create("b", tenant="other")
    with pytest.raises(Overloaded, match="2 sessions are held") as raised:
        await store.create("c", tenant="")
    assert (raised.value.retry_after_s, raised.value.field) == (10, "router.max_sessions")
    await store.delete("a", tenant="")
    await store.create("c", tenant="")
    await where.pass_time(11)
    for name in ("d", "e"):
        await store.create(name, tenant="")
    assert await store.count() == 2


async def test_a_tenant_that_holds_its_most_is_refused_and_takes_no_room_from_others(where):
    store = where.make(max_sessions=5, ttl_s=10, max_per_tenant={"a": 2, "b": 1})

    async def full(tenant, name=""):
        """What refuses this tenant one more session, and one more fork."""
        fields = set()
        for make in (store.create(tenant=tenant), store.fork(name, tenant=tenant)):
            with pytest.raises(Overloaded) as raised:
                await make
            fields.add(raised.value.field)
        return fields, str(raised.value)

    await store.create("s", tenant="a")
    await store.fork("s", "t", tenant="a")
    fields, text = await full("a", "s")
    assert fields == {"tenants.a.max_sessions"}
    assert "tenant 'a' holds 2 sessions, which is its most" in text
    with pytest.raises(Conflict):  # a name that is taken is still said to be
        await store.create("t", tenant="a")
    await store.create("s", tenant="b")
    assert (await full("b", "s"))[0] == {"tenants.b.max_sessions"}
    for name in ("s", "t"):
        await store.create(name, tenant="not named")
    assert (await full("not named", "s"))[0] == {"router.max_sessions"}
    await store.delete("t", tenant="a")
    await store.create("u", tenant="a")  # room comes back with what is deleted
    assert (await full("a", "s"))[0] == {"tenants.a.max_sessions"}
    async with store.turn("s", tenant="a"):
        await where.pass_time(11)  # ... and with what is forgotten, but for the session that a turn holds
        await store.create("v", tenant="a")
        assert (await full("a", "s"))[0] == {"tenants.a.max_sessions"}
        await store.create("w", tenant="b")
    assert [await store.count(tenant) for tenant in ("a", "b", "not named", None)] == [2, 1, 0, 3]
    await store.close()


async def test_names_have_a_limit_and_are_made_up_where_none_is_given(store):
    with pytest.raises(InvalidInput, match="129 characters"):
        await store.create("x" * 129, tenant="")
    with pytest.raises(NotFound):
        await store.get("x" * 129, tenant="")
    assert len((await store.create(tenant="")).session_id) == 32


async def test_tenants_neither_see_nor_hinder_each_other(store):
    # Each pair would be one name if tenant and session were only put together.
    for (tenant, name), (other, same) in ((("a", "s"), ("b", "s")), (("a:1", "ü"), ("a", "1:ü")), (("", "1::x"), ("x", "1:"))):
        mine = await store.create(name, [1], tenant=tenant, cache_domain=tenant)
        for use in (store.get(name, tenant=other), store.fork(name, tenant=other), store.delete(name, tenant=other)):
            with pytest.raises(NotFound):
                await use
        with pytest.raises(NotFound):
            await take(store, name, [3], tenant=other)
        await store.create(same, [2], tenant=other)
        await take(store, same, [2, 3], tenant=other)
        assert (mine.tenant, await store.get(name, tenant=tenant)) == (tenant, mine)
        assert [await store.count(t) for t in (tenant, other, "c", None)] == [1, 1, 0, 2]
        await store.delete(name, tenant=tenant)
        await store.delete(same, tenant=other)


async def test_long_contexts_and_every_token_id_come_back_as_they_were(store):
    context = (*range(20_000), 2**31 - 1, 0)
    assert (await store.create("s", context, tenant="")).token_ids == context
    await take(store, "s", (*context, 7))
    assert (await store.get("s", tenant="")).token_ids == (*context, 7)


async def test_a_context_that_does_not_begin_with_the_old_one_takes_its_place(store):
    await store.create("s", [1, 2, 3], tenant="")
    for context in ([1, 2], [4, 2, 9], []):
        await take(store, "s", context)
        assert (await store.get("s", tenant="")).token_ids == tuple(context)


async def test_a_fork_may_begin_where_an_earlier_turn_ended(store):
    said = Transcript().with_messages([{"role": "user", "content": "hi"}])
    await store.create("s", tenant="")
    async with store.turn("s", tenant="") as session:
        await store.commit(session, [1, 2, 3], True, said)
    mark = (await store.get("s", tenant="")).mark
    assert mark == Mark(3, True, said)
    await take(store, "s", [1, 2, 3, 4, 5])
    fork = await store.fork("s", "f", tenant="", at=mark)
    for session in (fork, await store.get("f", tenant="")):
        assert (session.token_ids, session.mark) == ((1, 2, 3), mark)
    assert (await store.get("s", tenant="")).token_ids == (1, 2, 3, 4, 5)


async def test_no_fork_begins_behind_the_end(store):
    await store.create("s", [1, 2], tenant="")
    with pytest.raises(Conflict, match="shorter than 3 tokens"):
        await store.fork("s", "f", tenant="", at=Mark(3))
    assert await store.count() == 1


async def test_notes_live_with_their_session_and_are_not_forked(store, where):
    await store.create("s", tenant="")
    async with store.turn("s", tenant="") as session:
        await store.commit(session, [1], False, None, {"a": "one", "b": "zwei ü"})
    await store.note("s", {"b": None, "c": "", "d": "+"}, tenant="")
    assert await store.notes("s", tenant="") == {"a": "one", "c": "", "d": "+"}
    assert await store.notes("s", tenant="", keys=["d", "b", "a"]) == {"d": "+", "a": "one"}
    await store.fork("s", "f", tenant="")
    assert await store.notes("f", tenant="") == {}
    await store.delete("s", tenant="")
    await store.create("s", tenant="")
    assert await store.notes("s", tenant="") == {}
    await store.note("s", {"a": "one"}, tenant="")
    await where.pass_time(9)
    assert await store.notes("s", tenant="") == {"a": "one"}
    await where.pass_time(9)
    assert await store.notes("s", tenant="") == {"a": "one"}, "asking for them uses the session"
    await where.pass_time(11)
    with pytest.raises(NotFound):
        await store.notes("s", tenant="")
    with pytest.raises(NotFound):
        await store.note("s", {}, tenant="")


async def test_a_commit_that_is_refused_adds_no_note(store):
    await store.create("s", tenant="")
    async with store.turn("s", tenant="") as session:
        await store.commit(session, [1], False)
        session.version += 1
        with pytest.raises(Conflict):
            await store.commit(session, [1, 2], False, None, {"a": "one"})
    assert await store.notes("s", tenant="") == {}


async def test_a_store_that_evicts_gives_up_what_its_tenant_left_unused_for_longest(where):
    store = where.make(max_sessions=5, ttl_s=100, max_per_tenant={"a": 2, "b": 2}, evicts=True)
    await store.create("other", tenant="b")
    for name in ("one", "two"):
        await store.create(name, tenant="a")
        await store.note(name, {"k": name}, tenant="a")
        await where.pass_time(1)
    await store.get("one", tenant="a")
    await store.create("three", tenant="a")
    with pytest.raises(NotFound):
        await store.get("two", tenant="a")
    assert (await store.get("other", tenant="b")).token_ids == ()
    async with store.turn("one", tenant="a"):
        await where.pass_time(1)
        await store.create("four", tenant="a")
        assert await store.count("a") == 2
        with pytest.raises(NotFound):
            await store.get("three", tenant="a")
        async with store.turn("four", tenant="a"):
            with pytest.raises(Overloaded):
                await store.create("five", tenant="a")
    await store.fork("four", "five", tenant="a")
    with pytest.raises(NotFound):
        await store.get("one", tenant="a")
    await store.close()
