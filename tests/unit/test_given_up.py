"""A turn that ends while its decode call is on its way: what the prefill leased for it is given up where that call goes."""

import asyncio

import pytest
from polling import until
from turn_pools import Stream, begin

from kvshare.errors import DeadlineExceeded
from kvshare.handoff import TokenChunk


async def silent():
    await asyncio.Event().wait()
    yield


async def speaking():
    yield TokenChunk([5])
    await asyncio.Event().wait()


@pytest.fixture
def streams():
    return []


def turn_of(chunks, streams, **context):
    """(calls that are made, an iterator over the turn)"""
    calls = []

    def decoding():
        streams.append(Stream(chunks))
        return streams[-1]

    return calls, begin(calls, decoding, **context)


async def given_up(calls) -> None:
    async def told():
        return calls[-1] == ("agents", "give up", "r-0")

    await until(told)


async def decoding(calls) -> None:
    async def begun():
        return len(calls) == 2

    await until(begun)


async def test_a_client_that_leaves_before_the_first_token(streams):
    calls, turn = turn_of(silent, streams)
    client = asyncio.create_task(anext(turn))
    await decoding(calls)
    client.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client
    assert streams[0].cancelled
    await given_up(calls)


async def test_a_deadline_that_passes_before_the_first_token(streams):
    calls, turn = turn_of(silent, streams, deadline_s=0.05)
    with pytest.raises(DeadlineExceeded):
        await anext(turn)
    await given_up(calls)


async def test_a_call_that_has_generated_ends_its_lease_itself(streams):
    calls, turn = turn_of(speaking, streams)
    assert (await anext(turn)).token_ids == [5]
    await turn.aclose()
    await asyncio.sleep(0.01)
    assert [method for _, method, _ in calls] == ["prefill", "decode"]
    assert streams[0].cancelled
