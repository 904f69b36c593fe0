"""A turn that ends while its decode call is on its way: what the prefill leased for it is given up where that call goes."""

import asyncio

import pytest
from double.system import system
from virtual_time import on_virtual_time, settle

from prefillshare.kvshare.errors import DeadlineExceeded

PROMPT = list(range(20, 57))
#: Until a decode call is under way, and less than until its first token.
SOON_S = 0.1


def silent(running):
    """The decode replica takes calls and says nothing."""
    (replica,) = running.pool_of("a").replicas.values()
    replica.planned["decode"] = replica.hang


def is_given_up(running) -> bool:
    """The last call of all, to the pool that was to decode, by the name of the turn's first attempt."""
    *before, last = running.cluster.calls("prefill", "decode", "give_up", "release")
    assert [call.method for call in before] == ["prefill", "decode"]
    assert before[-1].is_cancelled
    return (last.pool, last.method, last.args[1]) == ("agents", "give_up", "r0-0")


@on_virtual_time
async def test_a_client_that_leaves_before_the_first_token():
    async with system(replicas=1) as running:
        silent(running)
        client = asyncio.create_task(running.turn("a", PROMPT))
        await asyncio.sleep(SOON_S)
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        await settle()
        assert is_given_up(running)


@on_virtual_time
async def test_a_deadline_that_passes_before_the_first_token():
    async with system(replicas=1) as running:
        silent(running)
        with pytest.raises(DeadlineExceeded):
            await running.turn("a", PROMPT, deadline_s=SOON_S)
        await settle()
        assert is_given_up(running)


@on_virtual_time
async def test_a_call_that_has_generated_ends_its_lease_itself():
    async with system(replicas=1) as running:
        chunks = running.run("a", PROMPT, 6)
        assert (await anext(chunks)).token_ids == running.expected("a", PROMPT)[:1]
        await chunks.aclose()
        await settle()
        calls = running.cluster.calls("prefill", "decode", "give_up", "release")
        assert [call.method for call in calls] == ["prefill", "decode"]
        assert calls[-1].is_cancelled
