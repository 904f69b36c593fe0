"""Both clients try again what may be tried again, as often and as late as their policy says, and take no turn twice."""

import asyncio
import time

import pytest
from ports import free_port
from scripted_router import Dies, ScriptedRouter, client_of, serving

from prefillshare.client import Retries
from prefillshare.client.retries import Tries
from prefillshare.kvshare.errors import (
    AlreadyExists,
    AnswerLost,
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    Internal,
    InvalidInput,
    NotFound,
    Overloaded,
    SessionBusy,
    Unavailable,
)
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

QUICK = Retries(most=3, first_pause_s=0.001, longest_pause_s=0.01)
FULL = Overloaded("full", retry_after_s=0.002)
BOTH = pytest.mark.parametrize("kind", ["sync", "async"])
pytestmark = BOTH


@pytest.fixture
async def router():
    scripted = ScriptedRouter()
    async with serving(scripted) as (_, scripted.port):
        yield scripted


@pytest.fixture
async def client(kind, router):
    async with client_of(kind, router.port, retries=QUICK, timeout_s=20) as client:
        yield client


async def test_what_was_refused_for_lack_of_room_is_asked_again_whatever_it_is(router, client):
    for call in (lambda: client.create_session("mine"), lambda: client.session("mine").update(truncate_to=0),
                 lambda: client.session("mine").turn("planner", text="x"), client.decoders):  # fmt: skip
        router.plan, router.asked = [FULL, FULL], []
        await call()
        assert len(router.asked) >= 3
    assert router.turns == {"mine": 1}


async def test_it_gives_up_after_its_tries(router, client):
    router.plan = [FULL] * 9
    with pytest.raises(Overloaded):
        await client.decoders()
    assert len(router.asked) == 1 + QUICK.most


@pytest.mark.parametrize("error", [InvalidInput("x"), NotFound("x"), Conflict("x"), DeadlineExceeded("x"), Internal("x")])
async def test_what_would_fail_again_is_not_asked_again(router, client, error):
    router.plan = [error]
    with pytest.raises(type(error)):
        await client.decoders()
    assert len(router.asked) == 1


@pytest.mark.parametrize("after", [False, True])
async def test_calls_that_lead_to_the_same_are_repeated_when_the_connection_broke(router, client, after):
    calls = (client.decoders, client.not_ready_because, lambda: client.create_session(),
             lambda: client.session("s").get(), lambda: client.session("s").fork(), lambda: client.session("s").update(ttl_s=5),
             lambda: client.session("s").delete(), lambda: client.let_go("prompt:1"))  # fmt: skip
    router.turns["s"], router.kept = 3, {"prompt:1"}
    for call in calls:
        router.plan = [Dies(after), Dies(after=False)]
        await call()
    assert sorted(router.turns.values()) == [0, 3], "a new session and a fork, once each; the old one is deleted"
    assert router.kept == set()


async def test_a_name_of_the_callers_own_and_a_truncation_are_not_repeated_if_they_may_have_happened(router, client):
    router.turns["s"] = 0
    for call in (lambda: client.create_session("mine"), lambda: client.session("s").fork("fork"),
                 lambda: client.session("s").update(truncate_to=3)):  # fmt: skip
        router.plan, router.asked = [Dies(after=True)], []
        with pytest.raises(ConnectionLost):
            await call()
        assert len(router.asked) == 1
    with pytest.raises(AlreadyExists):
        await client.create_session("mine")


async def test_a_turn_whose_router_died_is_taken_again(router, client):
    session = await client.create_session("s")
    router.plan = [Dies()]
    turn = await session.turn("planner", text="hi")
    assert (turn.text, turn.token_ids, turn.turns, router.turns["s"]) == ("Paris.", [1, 2], 1, 1)
    again = [request for request in router.asked if hasattr(request, "decoder")]
    assert [request.HasField("expected_turns") for request in again] == [False, True]
    assert again[1].expected_turns == 0


async def test_a_turn_that_was_committed_is_not_taken_twice(router, client):
    session = await client.create_session("s")
    await session.turn("planner", text="hi")
    router.plan = [Dies(after=True)]
    with pytest.raises(AnswerLost, match="has had 2 turns, not 1"):
        await session.turn("planner", text="more")
    assert (router.turns["s"], router.count("Generate")) == (2, 2)
    assert (await session.turn("planner", text="on")).turns == 3


async def test_a_turn_that_is_committed_after_the_client_has_looked_is_not_taken_twice(router, client):
    """The server refuses a try that expects another number of turns."""
    session = await client.create_session("s")
    get = router._session

    def committed_now(name):
        seen = get(name)
        router.turns[name] += 1
        return seen

    router._session, router.plan = committed_now, [Dies()]
    with pytest.raises(AnswerLost, match="it has had 1 turns"):
        await session.turn("planner", text="hi")
    assert router.turns["s"] == 1


async def test_a_session_that_the_lost_turn_still_holds_is_waited_for(router, client):
    session = await client.create_session("s")
    router.plan = [Dies(), None, *[SessionBusy("held", field="session_id")] * 1]
    # The look at the session is the second call; then come more refusals than the policy has tries.
    for _ in range(2 * QUICK.most):
        router.plan += [None, SessionBusy("held", field="session_id")]
    assert (await session.turn("planner", text="hi")).turns == 1


async def test_a_session_that_another_turn_holds_is_not_waited_for(router, client):
    session = await client.create_session("s")
    router.plan = [SessionBusy("held", field="session_id")]
    with pytest.raises(SessionBusy):
        await session.turn("planner", text="hi")
    assert router.count("Generate") == 1


async def test_a_session_that_died_with_its_router_is_said_to_be_gone(router, client):
    session = await client.create_session("s")
    router.plan = [Dies()]
    router.turns.clear()
    with pytest.raises(NotFound):
        await session.turn("planner", text="hi")


async def test_how_many_turns_there_were_is_asked_where_it_is_not_known(router, client):
    router.turns["s"] = 7
    router.plan = [None, Dies()]
    assert (await client.session("s").turn("planner", text="hi")).turns == 8


async def test_several_responses_keep_nothing_and_are_asked_for_again(router, client):
    session = await client.create_session("s")
    router.plan = [Dies(after=True)]
    choices = await session.choices("planner", text="hi", n=3, temperature=1)
    assert [(choice.index, choice.text) for choice in choices] == [(0, "Paris."), (1, "Paris."), (2, "Paris.")]
    assert (router.turns["s"], router.count("Generate")) == (0, 2)


async def test_a_stream_is_not_begun_anew_once_a_piece_has_come(router, client):
    session, seen = await client.create_session("s"), []

    async def streamed():
        async for piece in session.stream("planner", text="hi"):
            seen.append(piece.text)

    router.plan = [Dies()]
    with pytest.raises(ConnectionLost):
        await streamed()
    assert (seen, router.count("Generate")) == (["Par", "is."], 1)
    router.pieces, router.plan = [], [Dies()]
    assert [piece.done.turns async for piece in session.stream("planner", text="hi")] == [1]
    assert router.count("Generate") == 3


async def test_without_retries_nothing_is_asked_again_and_nothing_besides(kind, router):
    async with client_of(kind, router.port, retries=None) as client:
        router.turns["s"], router.plan = 0, [FULL]
        with pytest.raises(Overloaded):
            await client.session("s").turn("planner", text="hi")
        router.plan = [Dies()]
        with pytest.raises(ConnectionLost):
            await client.session("s").turn("planner", text="hi")
        assert [type(request).__name__ for request in router.asked] == ["GenerateRequest"] * 2


async def test_the_hint_is_kept_to_and_what_would_outlast_the_deadline_fails_at_once(kind, router):
    async with client_of(kind, router.port, timeout_s=0.5, retries=Retries(first_pause_s=0.001)) as client:
        router.plan, began = [Overloaded("full", retry_after_s=0.1)], time.monotonic()
        await client.decoders()
        assert time.monotonic() - began >= 0.1
        for hint_s in (0.6, 100):
            router.plan, router.asked = [Overloaded("full", retry_after_s=hint_s)], []
            with pytest.raises(Overloaded) as raised:
                await client.decoders()
            assert (raised.value.retry_after_s, len(router.asked)) == (pytest.approx(hint_s), 1)


async def test_a_router_that_is_not_there_yet_is_waited_for_even_with_what_may_not_be_repeated(kind):
    port = free_port()
    async with client_of(kind, port, retries=Retries(most=40, first_pause_s=0.05, longest_pause_s=0.2), timeout_s=30) as client:
        making = asyncio.create_task(client.create_session("mine"))
        _, waiting = await asyncio.wait([making], timeout=0.2)
        assert waiting == {making}
        router = ScriptedRouter()
        async with serving(router, port):
            assert (await making).session_id == "mine"
            assert router.turns == {"mine": 0}


async def test_a_router_that_is_killed_while_a_turn_streams_is_followed_by_its_successor(kind):
    """The sessions are kept elsewhere, as in Redis."""
    router, port = ScriptedRouter(), free_port()
    gate = asyncio.Event()

    class Stuck(ScriptedRouter):
        async def Generate(self, request, context):
            yield pb.GenerateResponse(text="Par", token_ids=[1])
            gate.set()
            await asyncio.sleep(60)

    stuck = Stuck()
    stuck.turns = router.turns
    options = {"retries": Retries(most=40, first_pause_s=0.05, longest_pause_s=0.2), "timeout_s": 30}
    async with client_of(kind, port, **options) as client:
        async with serving(stuck, port) as (server, _):
            session = await client.create_session("s")
            turn = asyncio.create_task(session.turn("planner", text="hi"))
            await asyncio.wait_for(gate.wait(), 20)
            await server.stop(None)
        async with serving(router, port):
            assert (await turn).text == "Paris."
            assert router.turns == {"s": 1}


async def test_pauses_grow_up_to_a_bound_and_differ(kind):
    policy = Retries(most=12, first_pause_s=0.1, longest_pause_s=1)
    drawn = [[policy.pause_s(number) for number in range(12)] for _ in range(50)]
    for pauses in drawn:
        for number, pause_s in enumerate(pauses):
            most_s = min(1, 0.1 * 2**number)
            assert most_s / 2 <= pause_s <= most_s
    assert len({pauses[5] for pauses in drawn}) > 40
    assert policy.pause_s(12) is None
    assert all(0.7 <= policy.pause_s(0, 0.7) <= 0.875 for _ in range(50))
    assert policy.pause_s(0, 1.1) is None


async def test_a_try_that_may_not_be_repeated_raises_what_it_was_given(kind):
    tries, error = Tries(QUICK, 9), Unavailable("gone")
    with pytest.raises(Unavailable) as raised:
        tries.pause_s(error, repeatable=False)
    assert raised.value is error
