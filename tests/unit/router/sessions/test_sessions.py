"""What every session store does: bounded, forgotten in time, one turn at once, changed only by turns that end well."""

import base64
import json

import pytest
from session_stores import InMemory, InRedis

from prefillshare.kvshare.errors import AlreadyExists, Conflict, InvalidInput, NotFound, Overloaded
from prefillshare.router.sessions.base import Mark
from prefillshare.router.sessions.listing import Place
from prefillshare.router.sessions.marks import MOST_MARKS
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
    with pytest.raises(AlreadyExists, match="session 's' exists already"):
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
    with pytest.raises(AlreadyExists, match="exists already"):
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
    for name in ("two\nlines", "a\x1b[31mred", "\u202ereversed"):
        with pytest.raises(InvalidInput, match="session_id: it has line breaks or other control characters"):
            await store.create(name, tenant="")
    await store.create("Überfahrt nach Sylt ⛴", tenant="")
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


async def test_a_commit_sets_and_takes_out_notes_in_one_step(store):
    await store.create("s", tenant="")
    await store.note("s", {"a": "one", "b": "two"}, tenant="")
    async with store.turn("s", tenant="") as session:
        await store.commit(session, [1], False, None, {"a": None, "b": "", "c": "+three"})
    assert await store.notes("s", tenant="") == {"b": "", "c": "+three"}


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


async def names(store, most, tenant=""):
    """The names on each page."""
    pages, after = [], Place()
    while after is not None:
        page = await store.listed(most, Place.of(after.token()), tenant=tenant)
        pages.append([one.session_id for one in page.sessions])
        after = page.next
    return pages


async def test_a_tenants_sessions_are_listed_page_by_page_those_that_are_forgotten_first_first(where):
    store = where.make(max_sessions=9, ttl_s=10)
    for name in ("c", "a", "b:ü"):
        await store.create(name, [1, 2], tenant="t", cache_domain="d")
        await where.pass_time(1)
    await store.create("not mine", tenant="u")
    assert await names(store, 2, "t") == [["c", "a"], ["b:ü"]]
    assert await names(store, 3, "t") == [["c", "a", "b:ü"]]
    await take(store, "c", [1, 2, 3], tenant="t")
    assert await names(store, 1, "t") == [["a"], ["b:ü"], ["c"]]
    async with store.turn("a", tenant="t"):
        found = {one.session_id: one for one in (await store.listed(9, Place(), tenant="t")).sessions}
    one, held = found["c"], found["a"]
    assert (one.tokens, one.turns, one.ttl_s, one.cache_domain, one.busy) == (3, 1, 10, "d", False)
    assert (held.tokens, held.turns, held.busy) == (2, 0, True)
    assert 9 < one.expires_in_s <= 10
    assert await names(store, 9, "nobody") == [[]]
    await store.close()


async def test_sessions_that_end_at_the_same_moment_are_all_listed_once(where):
    store = where.make(max_sessions=99, ttl_s=10)
    made = {(await store.create(tenant="")).session_id for _ in range(40)}
    for most in (1, 7, 40, 41):
        listed = [name for page in await names(store, most) for name in page]
        assert (len(listed), set(listed)) == (40, made)
    await store.close()


async def test_being_listed_renews_nothing_and_what_is_forgotten_is_not_listed(store, where):
    await store.create("s", tenant="")
    await where.pass_time(6)
    assert await names(store, 5) == [["s"]]
    await where.pass_time(5)
    assert await names(store, 5) == [[]]


def test_a_page_that_never_was_is_refused():
    for token in ("x", "WzFd", "ü", Place("1", "x").token()[:-4], f" {Place('1', 'x').token()}\n", "[" * 10**5):
        with pytest.raises(InvalidInput) as raised:
            Place.of(token)
        assert raised.value.field == "page_token"


UNWRITTEN = ["nan", "inf", "-Infinity", "1_000", " 5 ", "+5", "5.", "05", "1e3", "٥", "5\n", "0x5", 5, None, []]


@pytest.mark.parametrize("expires", UNWRITTEN)
def test_a_moment_that_no_store_has_written_is_refused_before_a_store_is_asked(expires):
    with pytest.raises(InvalidInput) as raised:
        Place.of(base64.urlsafe_b64encode(json.dumps([expires, "x"]).encode()).decode())
    assert raised.value.field == "page_token"


@pytest.mark.parametrize("name", ["\ud800", "x\udfff", 5, None, ["x"]])
def test_a_name_that_no_session_can_have_begins_no_page(name):
    with pytest.raises(InvalidInput) as raised:
        Place.of(base64.urlsafe_b64encode(json.dumps(["5", name]).encode()).decode())
    assert raised.value.field == "page_token"


@pytest.mark.parametrize("expires", ["0", "1796000000123", "0.0", "12.25", "1e-05", "1e+16"])
@pytest.mark.parametrize("name", ["s", "b:ü", "\U0001f600", "\x00", '"'])
def test_what_stores_write_begins_a_page(expires, name):
    assert Place.of(Place(expires, name).token()) == Place(expires, name)


async def test_a_session_may_have_a_time_to_live_of_its_own_and_so_have_its_forks(store, where):
    session = await store.create("s", tenant="", ttl_s=3)
    assert 2 < await store.expires_in_s(session) <= 3
    changed = await store.set_ttl("s", 25, tenant="")
    assert changed.ttl_s == 25
    await where.pass_time(15)
    assert (await store.fork("s", "f", tenant="")).ttl_s == 25
    async with store.turn("s", tenant="") as held:
        await store.set_ttl("s", 40, tenant="")
        await store.commit(held, [1], open_response=False)
    assert (await store.get("s", tenant="")).ttl_s == 40
    await where.pass_time(20)
    assert await names(store, 5) == [["f", "s"]]
    await where.pass_time(10)
    assert await names(store, 5) == [["s"]]
    assert 5 < await store.expires_in_s(await store.set_ttl("s", None, tenant="")) <= 10
    await where.pass_time(11)
    with pytest.raises(NotFound):
        await store.set_ttl("s", 5, tenant="")


async def test_a_session_with_a_short_time_goes_before_one_that_was_used_earlier(store, where):
    await store.create("long", tenant="")
    await store.create("short", tenant="", ttl_s=2)
    await where.pass_time(3)
    assert await names(store, 5) == [["long"]]
    await store.create("room again", tenant="")


async def test_to_truncate_is_no_turn_and_leaves_a_fork_alone(store):
    hi, more = ({"role": "user", "content": text} for text in ("hi", "more"))
    begun = Transcript().with_messages([hi])
    first = begun.with_messages([more])
    await store.create("s", [1, 2], tenant="", transcript=begun)
    for context, said in (([1, 2, 3, 4], first), ([1, 2, 3, 4, 5, 6], first.with_messages([hi]))):
        async with store.turn("s", tenant="") as session:
            await store.commit(session, context, True, said)
    await store.fork("s", "f", tenant="")
    async with store.turn("s", tenant="") as session:
        found = [await store.said_at(session, tokens) for tokens in range(7)]
        assert found == [Transcript(), None, begun, None, first, None, session.transcript]
        await store.commit(session, [1, 2, 3, 4], True, found[4], is_turn=False)
        assert (session.turns, session.version) == (2, 3)
    kept = await store.get("s", tenant="")
    assert (kept.token_ids, kept.turns, kept.transcript, kept.open_response) == ((1, 2, 3, 4), 2, first, True)
    fork = await store.get("f", tenant="")
    assert (fork.token_ids, fork.turns) == ((1, 2, 3, 4, 5, 6), 2)
    async with store.turn("f", tenant="") as session:
        assert await store.said_at(session, 4) == first
        await store.commit(session, [*session.token_ids, 7], False)
    async with store.turn("s", tenant="") as session:
        await store.commit(session, [1, 2, 3, 4, 9, 9], False)
        assert await store.said_at(session, 6) is None, "these are other tokens than those that ended there"


async def test_the_last_turns_ends_are_known_and_older_ones_are_not(store):
    await store.create("s", tenant="")
    said, context = Transcript(), []
    for _ in range(MOST_MARKS + 5):
        said, context = said.with_messages([{"role": "user", "content": "x"}]), [*context, 1]
        async with store.turn("s", tenant="") as session:
            await store.commit(session, context, False, said)
    async with store.turn("s", tenant="") as session:
        known = [tokens for tokens in range(1, len(context) + 1) if await store.said_at(session, tokens)]
    assert known == list(range(6, MOST_MARKS + 6))


async def test_which_calls_wait_for_a_result_is_kept_with_the_context(store):
    assert (await store.create("s", tenant="", unanswered=["a"])).unanswered == ("a",)
    async with store.turn("s", tenant="") as session:
        assert session.unanswered == ("a",)
        await store.commit(session, [1, 2], False, unanswered=["a", "b"])
        assert session.unanswered == ("a", "b")
    assert (await store.get("s", tenant="")).unanswered == ("a", "b")
    assert (await store.fork("s", "f", tenant="")).unanswered == ("a", "b")
    await store.delete("f", tenant="")
    assert (await store.fork("s", "f", tenant="", at=Mark(1))).unanswered is None
    await take(store, "s", [1, 2, 3])
    assert (await store.get("s", tenant="")).unanswered is None
