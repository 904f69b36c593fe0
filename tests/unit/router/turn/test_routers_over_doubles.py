"""Several routers on one session store and the same engines, and what changes while turns run. Engines are doubles
(tests/double)."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from double.engines import LEASE_S
from double.system import deployment, nothing_held, session_system
from virtual_time import on_virtual_time

from prefillshare.kvshare.errors import Conflict, NotFound, Unavailable

PROMPT = list(range(20, 57))


async def two_routers(within: AsyncExitStack):
    """On one cluster and one store."""
    one = await within.enter_async_context(session_system())
    other = await within.enter_async_context(session_system(cluster=one.cluster))
    other.sessions = other.turns.sessions = one.sessions
    return one, other


@on_virtual_time
async def test_turns_of_one_session_go_over_either_router():
    async with AsyncExitStack() as within:
        routers = await two_routers(within)
        await routers[0].turns.create("s", ("token_ids", PROMPT))
        context = list(PROMPT)
        for number, decoder in enumerate(("a", "s", "b", "t", "a", "c")):
            said = await routers[number % 2].take("s", decoder, [60 + number])
            assert said == routers[0].expected(decoder, [*context, 60 + number])
            context += [60 + number, *said]
        assert await routers[1].context("s") == context
        for router in routers:
            await nothing_held(router, leases_s=LEASE_S + 1)


@on_virtual_time
async def test_one_session_takes_one_turn_at_a_time_whichever_router_is_asked():
    async with AsyncExitStack() as within:
        one, other = await two_routers(within)
        await one.turns.create("s", ("token_ids", PROMPT))
        turns = await asyncio.gather(
            *(router.take("s", "a", [60]) for router in (one, other, one, other)), return_exceptions=True
        )
        refused = [turn for turn in turns if isinstance(turn, Conflict)]
        (said,) = [turn for turn in turns if isinstance(turn, list)]
        assert len(refused) == 3
        assert await other.context("s") == [*PROMPT, 60, *said]


@on_virtual_time
async def test_a_replica_that_dies_is_passed_by_both_routers():
    async with AsyncExitStack() as within:
        routers = await two_routers(within)
        pool = routers[0].pool_of("a")
        first, _ = pool.replicas.values()
        first.planned["token 3"] = lambda: pool.kill(first.name)
        prompts = [[*PROMPT, number] for number in range(8)]
        said = await asyncio.gather(*(routers[number % 2].turn("a", prompt) for number, prompt in enumerate(prompts)))
        assert said == [routers[0].expected("a", prompt) for prompt in prompts]
        for router in routers:
            await nothing_held(router, leases_s=LEASE_S + 1)


@on_virtual_time
async def test_a_decoder_that_goes_lets_its_turns_end_and_takes_no_more():
    async with session_system() as running:
        turn = asyncio.create_task(running.turn("a", PROMPT, tokens=30))
        await asyncio.sleep(0.5)
        orchestrator = running.orchestrator
        left = {name: decoder for name, decoder in orchestrator.decoders.items() if name != "a"}
        orchestrator.serve(left, orchestrator.routes, deployment(2).router)
        with pytest.raises(NotFound, match="unknown decoder 'a'"):
            await running.turn("a", PROMPT)
        assert await turn == running.expected_of("a", "agents", PROMPT, 30)
        await nothing_held(running, leases_s=LEASE_S + 1)


@on_virtual_time
async def test_a_router_that_stops_ends_its_turns_first():
    async with session_system() as running:
        turn = asyncio.create_task(running.turn("a", PROMPT, tokens=30))
        await asyncio.sleep(0.5)
        stopping = asyncio.create_task(running.orchestrator.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="is stopping"):
            await running.turn("b", PROMPT)
        assert not stopping.done()
        assert await turn == running.expected("a", PROMPT, 30)
        await stopping
