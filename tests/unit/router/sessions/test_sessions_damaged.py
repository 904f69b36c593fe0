"""Whatever stands in Redis in a session's place: a typed error that names the session, and a name that can be used again."""

import random
import uuid

import pytest
from redis.asyncio import Redis

from prefillshare.kvshare.errors import Conflict, NotFound, SessionDamaged, Unavailable
from prefillshare.router.redis_calls import RedisCalls
from prefillshare.router.sessions import RedisSessions

CONTEXT = (1, 2, 3)
#: What the session's own words may not be, in any error.
INTERNALS = ("redis", "lua", "json", "utf", "codec", "wrongtype", "script", "traceback", "object")


@pytest.fixture
async def redis(redis_server):
    async with Redis.from_url(redis_server.url) as client:
        yield client


@pytest.fixture
async def store(redis_server):
    store = RedisSessions(RedisCalls(redis_server.url, "session store", prefix=uuid.uuid4().hex), 10, 60)
    yield store
    await store.close()


def field(name: str, value: bytes | str | None):
    async def change(redis, session, tokens):
        await (redis.hdel(session, name) if value is None else redis.hset(session, name, value))

    return change


def key(which: int, *commands):
    """Instead of the session's hash (0) or its tokens (1), what these commands make."""

    async def change(redis, *keys):
        await redis.delete(keys[which])
        for command, *arguments in commands:
            await redis.execute_command(command, keys[which], *arguments)

    return change


async def truncated(redis, session, tokens):
    await redis.set(tokens, (await redis.get(tokens))[:-1])


async def longer(redis, session, tokens):
    await redis.append(tokens, b"\0" * 4)


async def token_beyond_int32(redis, session, tokens):
    await redis.setrange(tokens, 4, b"\xff\xff\xff\xff")


NUMBERS = ("tokens", "turns", "version", "open")
DAMAGE = {
    **{f"{name} {value!r}": field(name, value) for name in NUMBERS for value in (None, "", "x", "-1", "1.5", "1e3", "9" * 40)},
    **{f"ttl {value!r}": field("ttl", value) for value in ("", "x", "-1", "1.5", "9" * 40)},
    "held until nobody knows when": field("turn", "x"),
    "held until no time": lambda redis, session, _: redis.hset(session, mapping={"turn": "x", "until": "soon"}),
    **{
        f"prefilled {str(value)[:20]!r}": field("prefilled", value)
        for value in (None, "", "{", "[]", "1", "null", '{"a": 1}', b'{"a": "\xff"}', "[" * 60_000, '"' + "x" * 70_000 + '"')
    },
    **{f"domain {str(value)[:20]!r}": field("domain", value) for value in (None, b"\xff\xfe", "x" * 70_000)},
    "a list for the hash": key(0, ("RPUSH", "a")),
    "a string for the hash": key(0, ("SET", "a")),
    "an empty hash of other fields": key(0, ("HSET", "a", "b")),
    "a set for the tokens": key(1, ("SADD", "a")),
    "a hash for the tokens": key(1, ("HSET", "a", "b")),
    "truncated": truncated,
    "longer": longer,
    "a token beyond int32": token_beyond_int32,
}


async def damaged(store, redis, change) -> None:
    await store.create("mine", CONTEXT, tenant="t", cache_domain="d")
    await change(redis, *(store._keys("t", "mine")[0][:2]))


async def turn(store):
    async with store.turn("mine", tenant="t"):
        pytest.fail("a turn began on it")


USES = {
    "get": lambda store: store.get("mine", tenant="t"),
    "fork": lambda store: store.fork("mine", "other", tenant="t"),
    "turn": turn,
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
async def test_a_damaged_session_is_named_and_deleting_it_frees_its_name(store, redis, change):
    await damaged(store, redis, change)
    for use in USES.values():
        with pytest.raises(SessionDamaged, match="session 'mine' is damaged in the session store") as raised:
            await use(store)
        assert "fix: delete it" in str(raised.value)
        assert not any(word in str(raised.value).lower() for word in INTERNALS)
    with pytest.raises(NotFound):
        await store.get("other", tenant="t")
    with pytest.raises(Conflict, match="session 'mine' exists already"):
        await store.create("mine", tenant="t")
    await store.delete("mine", tenant="t")
    assert await store.count() == 0
    with pytest.raises(NotFound):
        await store.get("mine", tenant="t")
    assert (await store.create("mine", [7], tenant="t")).token_ids == (7,)
    assert (await store.get("mine", tenant="t")).token_ids == (7,)


@pytest.mark.parametrize("change", [truncated, DAMAGE["a string for the hash"], field("version", "x")])
async def test_a_session_damaged_during_its_turn_takes_no_commit(store, redis, change):
    await store.create("mine", CONTEXT, tenant="t")
    async with store.turn("mine", tenant="t") as session:
        await change(redis, *(store._keys("t", "mine")[0][:2]))
        with pytest.raises(SessionDamaged):
            await store.commit(session, (*CONTEXT, 4), open_response=False)


async def test_bytes_changed_anywhere_raise_nothing_but_typed_errors(store, redis):
    """What is read is either the session or refused; a number or name that was changed into another right one is not seen."""
    chance = random.Random(20)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        await store.create("mine", CONTEXT, tenant="t", cache_domain="domain")
        session, tokens = store._keys("t", "mine")[0][:2]
        name = chance.choice(["tokens", "turns", "version", "open", "prefilled", "domain", "made", "the tokens"])
        old = await (redis.get(tokens) if name == "the tokens" else redis.hget(session, name))
        new = bytearray(old)
        match chance.choice(["change", "cut", "add"]):
            case "change":
                new[chance.randrange(len(new))] = chance.randrange(256)
            case "cut":
                del new[chance.randrange(len(new)) :]
            case "add":
                new[chance.randrange(len(new)) : 0] = chance.randbytes(chance.randrange(1, 9))
        await (redis.set(tokens, bytes(new)) if name == "the tokens" else redis.hset(session, name, bytes(new)))
        try:
            async with store.turn("mine", tenant="t") as read:
                await store.commit(read, (*read.token_ids, 9), open_response=True)
            outcomes["read"] += 1
        except (SessionDamaged, Conflict):
            outcomes["refused"] += 1
        await store.delete("mine", tenant="t")
    assert min(outcomes.values()) > 30
    assert await store.count() == 0


async def test_what_is_no_session_at_all_but_takes_the_stores_own_place_is_unavailable_without_internals(store, redis):
    await store.create("mine", CONTEXT, tenant="t")
    names = store._keys("t", "mine")[0][2]
    await redis.delete(names)
    await redis.set(names, "x")
    with pytest.raises(Unavailable, match="the session store: it answers with an error") as raised:
        await store.create("two", tenant="t")
    assert not any(word in str(raised.value).lower() for word in INTERNALS)
    assert "WRONGTYPE" in store.trouble
