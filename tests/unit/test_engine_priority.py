"""A turn's priority goes with it to both engines, and a turn that is taken up again goes first there, too."""

import pytest
from turn_pools import Stream, begin

from kvshare.errors import PrefixLost, ResumeReason
from kvshare.handoff import TokenChunk
from kvshare.priority import PRIORITIES, RESUMED


async def calls_of_a_turn(priority: int, preemptions: int = 0) -> list[tuple[str, int]]:
    calls, left = [], [preemptions]

    async def chunks():
        left[0] -= 1
        if left[0] >= 0:
            raise PrefixLost("preempted", reason=ResumeReason.PREEMPTED)
        yield TokenChunk([5], finish_reason="length")

    turn = begin(calls, lambda: Stream(chunks), priority=priority)
    assert [chunk.token_ids async for chunk in turn] == [[5]]
    return [(pool, asked["priority"]) for pool, _, asked in calls]


@pytest.mark.parametrize("priority", [PRIORITIES[0], 0, 7, PRIORITIES[-1]])
async def test_prefill_and_decode_run_at_the_turns_priority(priority):
    assert await calls_of_a_turn(priority) == [("prefill", priority), ("agents", priority)]


async def test_a_turn_that_is_taken_up_again_goes_before_all_others():
    first, again = [("prefill", 7), ("agents", 7)], [("prefill", RESUMED), ("agents", RESUMED)]
    assert await calls_of_a_turn(7, preemptions=2) == [*first, *again, *again]
