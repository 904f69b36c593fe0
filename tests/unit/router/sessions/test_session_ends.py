"""A session is found by what was said in it, in every store, for as long as it is there."""

import pytest
from session_stores import InMemory, InRedis

from prefillshare.kvshare.errors import NotFound
from prefillshare.router.sessions.base import Mark
from prefillshare.router.sessions.ends import MOST_ENDS, Ending
from prefillshare.router.sessions.transcript import Transcript


@pytest.fixture(params=["memory", "redis"])
def where(request):
    return InMemory() if request.param == "memory" else InRedis(request.getfixturevalue("redis_server").url)


@pytest.fixture
async def store(where):
    store = where.make(max_sessions=5, ttl_s=10, max_per_tenant={"": 2, "a:b": 2}, evicts=True)
    yield store
    await store.close()


def said(*texts: str) -> Transcript:
    return Transcript().with_messages([{"role": "user", "content": text} for text in texts])


async def ends(store, name: str, key: str, *texts: str, tenant: str = "") -> None:
    """A turn of the session ends where these have been said, and leaves a note of this key."""
    async with store.turn(name, tenant=tenant) as session:
        await store.commit(session, range(len(texts)), False, said(*texts), {key: f"note of {key}"}, end=key)


async def test_the_first_end_that_is_there_is_found_with_its_session_and_its_note(store):
    await store.create("s", tenant="")
    await ends(store, "s", "one", "a")
    await ends(store, "s", "two", "a", "b")
    assert await store.found([said("a", "b", "c"), said("a", "b"), said("a")], tenant="") == Ending("s", "two", "note of two")
    assert await store.found([said("a")], tenant="") == Ending("s", "one", "note of one")
    assert await store.found([said("b")], tenant="") is None
    assert await store.found([], tenant="") is None


async def test_no_tenant_finds_what_another_said(store):
    for tenant in ("", "a:b"):
        await store.create("s", tenant=tenant)
    await ends(store, "s", "one", "a", tenant="a:b")
    for tenant in ("", "a", "b"):
        assert await store.found([said("a")], tenant=tenant) is None
    assert (await store.found([said("a")], tenant="a:b")).session_id == "s"


async def test_an_end_goes_with_its_session(where, store):
    await store.create("s", tenant="")
    await ends(store, "s", "one", "a")
    await store.delete("s", tenant="")
    assert await store.found([said("a")], tenant="") is None
    for name in ("s", "t", "u"):  # the third takes the place of the first
        await store.create(name, tenant="")
        await ends(store, name, "key", name)
        await where.pass_time(1)
    assert await store.found([said("s")], tenant="") is None
    assert (await store.found([said("t")], tenant="")).session_id == "t"
    await where.pass_time(9)
    assert (await store.found([said("t")], tenant="")).session_id == "t", "finding it uses the session"
    await where.pass_time(9)
    assert (await store.get("t", tenant="")).turns == 1
    await where.pass_time(9)
    assert (await store.found([said("t")], tenant="")).session_id == "t", "an end lives as long as its session"
    await where.pass_time(11)
    assert await store.found([said("t")], tenant="") is None


async def test_an_end_without_its_note_is_passed_over(store):
    await store.create("s", tenant="")
    await ends(store, "s", "one", "a")
    await ends(store, "s", "two", "a", "b")
    await store.note("s", {"two": None}, tenant="")
    for _ in range(2):
        assert (await store.found([said("a", "b"), said("a")], tenant="")).key == "one"


async def test_each_session_has_so_many_ends_and_the_oldest_is_given_up(store):
    await store.create("s", tenant="")
    for number in range(MOST_ENDS + 1):
        await ends(store, "s", f"key {number}", str(number))
    assert await store.found([said("0")], tenant="") is None
    assert (await store.found([said("1")], tenant="")).key == "key 1"
    await ends(store, "s", "again", "1")
    await ends(store, "s", "new", "new")
    assert await store.found([said("2")], tenant="") is None
    assert (await store.found([said("1")], tenant="")).key == "again"


async def test_of_sessions_that_say_the_same_the_last_is_found_and_the_others_take_nothing_from_it(store):
    for name in ("s", "t"):
        await store.create(name, tenant="")
        await ends(store, name, name, "a")
    assert (await store.found([said("a")], tenant="")).session_id == "t"
    for number in range(MOST_ENDS):  # so many that "s" gives its end up
        await ends(store, "s", "more", str(number))
    await store.delete("s", tenant="")
    assert (await store.found([said("a")], tenant="")).session_id == "t"


async def test_a_fork_has_no_ends_of_its_own_yet(store):
    await store.create("s", tenant="")
    await ends(store, "s", "one", "a")
    await store.fork("s", "t", tenant="", at=Mark(1))
    assert (await store.found([said("a")], tenant="")).session_id == "s"
    await store.delete("t", tenant="")
    assert (await store.found([said("a")], tenant="")).session_id == "s"


async def test_a_turn_that_is_refused_has_not_ended_anywhere(store):
    await store.create("s", tenant="")
    async with store.turn("s", tenant="") as session:
        await store.delete("s", tenant="")
        with pytest.raises(Exception, match="deleted during the turn"):
            await store.commit(session, [1], False, said("a"), {"one": "note"}, end="one")
    assert await store.found([said("a")], tenant="") is None
    with pytest.raises(NotFound):
        await store.notes("s", tenant="")
