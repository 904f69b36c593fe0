"""Turns where no pool makes base KV but the decode engines themselves: the same tokens, no handoff, nothing held.

Engines are doubles (tests/double): their arithmetic shows whose KV was used.
"""

import asyncio
from contextlib import suppress

import pytest
from double.engines import BLOCK, LEASE_S
from double.system import nothing_held, session_system, system
from virtual_time import on_virtual_time

from prefillshare.kvshare.errors import DeadlineExceeded, PrefixLost, ResumeReason, Unavailable
from prefillshare.router.pools.cache_index import BlockKeys

PROMPT = list(range(20, 57))
DECODERS = ("a", "b", "o", "base", "s", "t", "c", "d")


@on_virtual_time
async def test_a_context_goes_from_decoder_to_decoder_and_nothing_is_lent():
    async with system(in_place=True) as running:
        context = list(PROMPT)
        for decoder in (*DECODERS, *DECODERS):
            said = await running.turn(decoder, context)
            assert said == running.expected(decoder, context)
            context += [*said, 50, 51]
        assert "prefill" not in running.fleet.pools
        await nothing_held(running)


@on_virtual_time
async def test_many_turns_at_once():
    async with system(in_place=True) as running:
        prompts = [(DECODERS[number % len(DECODERS)], [*PROMPT[: 3 + number], 99 - number]) for number in range(40)]
        said = await asyncio.gather(*(running.turn(decoder, prompt) for decoder, prompt in prompts))
        assert said == [running.expected(decoder, prompt) for decoder, prompt in prompts]
        await nothing_held(running)


@pytest.mark.parametrize("decoder", ["a", "s"])
@on_virtual_time
async def test_usage_says_what_was_found_and_computed_where(decoder):
    async with system(in_place=True) as running:
        await running.turn(decoder, PROMPT)
        turn = running.turn_of(decoder, PROMPT)
        async for _ in turn.chunks():
            pass
        usage, shared = turn.usage, len(PROMPT) - 1
        assert usage.cached_tokens == (shared - 1) // BLOCK * BLOCK
        assert (usage.cached_tokens + usage.computed_tokens, usage.predicted_tokens) == (shared, shared // BLOCK * BLOCK)
        assert usage.prefill_replica == usage.decode_replica != ""
        assert (usage.kv_bytes, usage.load_s) == (0, 0.0)
        assert 0 < usage.prefill_s <= usage.ttft_s


@on_virtual_time
async def test_turns_go_where_their_prefix_is():
    """With two replicas, each of two contexts stays where it was first made."""
    async with system(in_place=True) as running:
        places = {}
        for context in (PROMPT, PROMPT[::-1]):
            for decoder in ("a", "b", "a", "base"):
                turn = running.turn_of(decoder, context)
                async for _ in turn.chunks():
                    pass
                places.setdefault(context[0], set()).add(turn.usage.decode_replica)
        assert all(len(replicas) == 1 for replicas in places.values())
        assert len(set.union(*places.values())) == 2


@on_virtual_time
async def test_prompts_that_wait_to_be_computed_count_as_load_until_the_first_token():
    async with system(replicas=1, in_place=True) as running:
        (replica,) = running.fleet.pools["agents"].replicas.members.values()
        turn = asyncio.create_task(running.turn("a", PROMPT))
        await asyncio.sleep(0.02)
        assert replica.queued_tokens == len(PROMPT) - 1
        assert running.orchestrator.services.admission.queued_prefill_tokens("agents") == len(PROMPT) - 1
        await asyncio.sleep(0.3)
        assert (replica.queued_tokens, replica.active) == (0, 1)
        assert running.orchestrator.services.admission.queued_prefill_tokens("agents") == 0
        await turn
        await nothing_held(running)


MOMENTS = ("prefill", "prefilled", "decode", "token 1", "token 3", "token 6")
FAILURES = {
    "dies": lambda pool, replica: (lambda: pool.kill(replica.name)),
    "cannot": lambda pool, replica: Unavailable("no"),
    "drops the call": lambda pool, replica: asyncio.CancelledError(),
    "hangs": lambda pool, replica: replica.hang,
    "gives it back": lambda pool, replica: PrefixLost("preempted", reason=ResumeReason.PREEMPTED),
}


@pytest.mark.parametrize("decoder", ["a", "s"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("failure", FAILURES)
@on_virtual_time
async def test_a_replica_fails_the_turn(decoder, moment, failure):
    """At each moment and in each way: the client sees one stream."""
    async with system(in_place=True) as running:
        pool = running.pool_of(decoder)
        replica = next(iter(pool.replicas.values()))
        replica.planned[moment] = FAILURES[failure](pool, replica)
        for _ in range(4):  # whichever replica is chosen
            assert await running.turn(decoder, PROMPT) == running.expected(decoder, PROMPT)
            if moment not in replica.planned:
                break
        assert moment not in replica.planned
        replica.come_back()
        await nothing_held(running)


@pytest.mark.parametrize("decoder", ["a", "s"])
@on_virtual_time
async def test_a_client_leaves_at_any_moment(decoder):
    async with system(replicas=1, in_place=True) as running:
        for number in range(70):
            client = asyncio.create_task(running.turn(decoder, [*PROMPT, *divmod(number, 10)], tokens=80))
            await asyncio.sleep(number * 0.004)
            client.cancel()
            with suppress(asyncio.CancelledError):
                await client
            await nothing_held(running, within_s=0.5)


@on_virtual_time
async def test_a_long_prompt_is_not_taken_for_a_load_that_hangs():
    """The bound on a load (cluster.kv_load_timeout_s, 3 s here) does not bound what is computed."""
    async with system(replicas=1, in_place=True, wedged_after_s=60) as running:
        prompt = [20 + number % 50 for number in range(3_500)]
        assert await running.turn("a", prompt) == running.expected("a", prompt)
        await nothing_held(running)


@on_virtual_time
async def test_a_deadline_passes_while_the_prompt_is_computed():
    async with system(replicas=1, in_place=True) as running:
        for number in range(1, 40):
            with pytest.raises(DeadlineExceeded):
                await running.turn("a", PROMPT, tokens=8, deadline_s=number * 0.013)
            await nothing_held(running)


@on_virtual_time
async def test_a_session_finds_its_context_made_by_whatever_decoder_of_the_pool():
    async with session_system(in_place=True) as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        context = list(PROMPT)
        for number, decoder in enumerate(("a", "b", "base", "a", "s", "t", "base")):
            given = [60 + number, 61]
            said = await running.take("s", decoder, given, tokens=20)
            assert said == running.expected(decoder, [*context, *given], 20)
            context += [*given, *said]
            assert await running.context("s") == context
            await asyncio.sleep(3)  # what is made ahead has time
            if decoder in ("a", "b"):  # the response's base KV is made in the same pool
                engines = (replica.engine for replica in running.cluster.pools["agents"].replicas.values())
                keys = BlockKeys(context, BLOCK)
                assert max(engine.cache.tokens(keys) for engine in engines) == len(context) // BLOCK * BLOCK
        await nothing_held(running, leases_s=LEASE_S + 1)
