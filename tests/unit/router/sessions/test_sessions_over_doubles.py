"""Sessions whose turns go from decoder to decoder, with what is made ahead for the next turn; whatever fails meanwhile.

Engines are doubles (tests/double): their arithmetic shows whose KV was read.
"""

import asyncio
from contextlib import suppress

import pytest
from double.engines import LEASE_S
from double.system import nothing_held, session_system
from virtual_time import on_virtual_time

from prefillshare.kvshare.errors import Conflict, NotFound, PrefixLost, ResumeReason, SessionBusy, Unavailable

PROMPT = list(range(20, 57))
SHARING = ("a", "o", "b", "base", "s", "t")


def outcomes(metrics, name: str) -> dict[str, float]:
    samples = (sample for family in metrics[name].collect() for sample in family.samples)
    return {one.labels["outcome"]: one.value for one in samples if one.name.endswith("_total")}


@on_virtual_time
async def test_a_session_goes_from_decoder_to_decoder_and_each_finds_its_context_made():
    async with session_system() as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        context = list(PROMPT)
        for number in range(12):
            decoder, given = SHARING[number % len(SHARING)], [60 + number, 61]
            said = await running.take("s", decoder, given, tokens=20)
            assert said == running.expected(decoder, [*context, *given], 20)
            context += [*given, *said]
            assert await running.context("s") == context
            await asyncio.sleep(3)  # what is made ahead has time
        await nothing_held(running, leases_s=LEASE_S + 1)
        assert outcomes(running.metrics, "pull_backs_total").get("done", 0) >= 3
        assert outcomes(running.metrics, "eager_prefills_total")["done"] >= 6


@on_virtual_time
async def test_a_suffix_is_seen_and_not_kept():
    async with session_system() as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        said = await running.take("s", "a", [60], suffix=[70, 71, 72])
        assert said == running.expected("a", [*PROMPT, 60, 70, 71, 72])
        assert await running.context("s") == [*PROMPT, 60, *said]
        again = await running.take("s", "t", [62], suffix=[73])
        assert again == running.expected("t", [*PROMPT, 60, *said, 62, 73])
        await nothing_held(running, leases_s=LEASE_S + 1)


@on_virtual_time
async def test_a_second_turn_meanwhile_is_refused_and_changes_nothing():
    async with session_system() as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        first = asyncio.create_task(running.take("s", "a", [60]))
        await asyncio.sleep(0.3)
        with pytest.raises(Conflict, match="another turn runs"):
            await running.take("s", "b", [61])
        said = await first
        assert await running.context("s") == [*PROMPT, 60, *said]
        await nothing_held(running, leases_s=LEASE_S + 1)


@on_virtual_time
async def test_a_session_that_is_deleted_under_its_turn_stays_deleted():
    async with session_system() as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        turn = asyncio.create_task(running.take("s", "s", [60]))
        await asyncio.sleep(0.3)
        await running.turns.delete("s")
        with pytest.raises(Conflict):
            await turn
        with pytest.raises(NotFound):
            await running.context("s")
        await nothing_held(running, leases_s=LEASE_S + 1)


@pytest.mark.parametrize("decoder", ["a", "s"])
@on_virtual_time
async def test_a_client_that_leaves_changes_no_session_and_the_next_turn_is_as_if_it_had_not_been(decoder):
    async with session_system() as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        for number in range(40):
            turn = asyncio.create_task(running.take("s", decoder, [60, number], tokens=9))
            await asyncio.sleep(number * 0.02)
            turn.cancel()
            with suppress(asyncio.CancelledError):
                await turn
            assert await running.context("s") == PROMPT
        assert await running.take("s", decoder, [60]) == running.expected(decoder, [*PROMPT, 60])
        await nothing_held(running, leases_s=LEASE_S + 1)


FAILURES = (
    lambda pool, replica: Unavailable("no"),
    lambda pool, replica: asyncio.CancelledError(),
    lambda pool, replica: PrefixLost("no KV", reason=ResumeReason.KV_LOAD_FAILED),
    lambda pool, replica: (lambda: pool.kill(replica.name)),
)


@pytest.mark.parametrize("moment", ["prefill", "prefilled", "pull"])
@pytest.mark.parametrize("failure", range(len(FAILURES)))
@on_virtual_time
async def test_what_is_made_ahead_may_fail(moment, failure):
    """The next turn only takes longer."""
    async with session_system() as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        context = list(PROMPT)
        pool = running.cluster.pools["prefill"]
        for decoder in ("s", "a", "t", "b"):
            said = await running.take("s", decoder, [60], tokens=20)
            assert said == running.expected(decoder, [*context, 60], 20)
            context += [60, *said]
            for replica in tuple(pool.replicas.values()):
                if moment != "pull" or decoder in "st":
                    replica.planned[moment] = FAILURES[failure](pool, replica)
            await asyncio.sleep(8)
            for replica in pool.replicas.values():
                replica.planned.clear()
        assert await running.context("s") == context
        await nothing_held(running, leases_s=LEASE_S + 1)


@on_virtual_time
async def test_forks_go_their_own_ways():
    async with session_system() as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        said = await running.take("s", "s", [60])
        await running.sessions.fork("s", "f", tenant="")
        both = [*PROMPT, 60, *said]
        one, other = await asyncio.gather(running.take("s", "a", [61]), running.take("f", "t", [62]))
        assert (one, other) == (running.expected("a", [*both, 61]), running.expected("t", [*both, 62]))
        assert await running.context("f") == [*both, 62, *other]
        await nothing_held(running, leases_s=LEASE_S + 1)




@on_virtual_time
async def test_a_truncated_session_goes_on_exactly_whatever_was_made_ahead_and_so_does_its_fork():
    async with session_system() as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        for decoder in SHARING:
            first = await running.take("s", decoder, [60], tokens=20)
            length = len(await running.context("s"))
            await running.take("s", decoder, [61], tokens=20)
            await running.sessions.fork("s", "f", tenant="")
            changed = await running.turns.update("s", truncate_to=length)
            assert (changed.token_ids, changed.turns % 2) == ((*PROMPT, 60, *first), 0)
            for name, given in (("f", 62), ("s", 63)):
                context = await running.context(name)
                assert await running.take(name, decoder, [given]) == running.expected(decoder, [*context, given])
            await running.turns.delete("f")
            await running.turns.update("s", truncate_to=len(PROMPT))
            await running.take("s", decoder, [64])
            await running.turns.update("s", truncate_to=len(PROMPT))
        await nothing_held(running, leases_s=LEASE_S + 1)


@on_virtual_time
async def test_a_session_is_not_truncated_under_its_turn():
    async with session_system() as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        turn = asyncio.create_task(running.take("s", "a", [60]))
        await asyncio.sleep(0.3)
        with pytest.raises(SessionBusy):
            await running.turns.update("s", truncate_to=0)
        assert await running.context("s") == PROMPT
        said = await turn
        assert await running.context("s") == [*PROMPT, 60, *said]
        await nothing_held(running, leases_s=LEASE_S + 1)
