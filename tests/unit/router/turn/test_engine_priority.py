"""A turn's priority goes with it to both engines, and a turn that is taken up again goes first there, too."""

import pytest
from double.system import system
from virtual_time import run

from prefillshare.kvshare.caller import Caller
from prefillshare.kvshare.errors import PrefixLost, ResumeReason
from prefillshare.kvshare.priority import PRIORITIES, RESUMED

PROMPT = list(range(20, 57))


def calls_of_a_turn(priority: int, preemptions: int = 0) -> list[tuple[str, int]]:
    async def taken():
        async with system(replicas=1) as running:
            (replica,) = running.pool_of("a").replicas.values()
            for moment in ("decode", "loaded")[:preemptions]:
                replica.planned[moment] = PrefixLost("preempted", reason=ResumeReason.PREEMPTED)
            assert await running.turn("a", PROMPT, caller=Caller(priority=priority)) == running.expected("a", PROMPT)
            made = running.cluster.calls("prefill", "decode")
        return [(one.pool, one.args[0].priority if one.method == "decode" else one.kwargs["priority"]) for one in made]

    return run(taken())


@pytest.mark.parametrize("priority", [PRIORITIES[0], 0, 7, PRIORITIES[-1]])
def test_prefill_and_decode_run_at_the_turns_priority(priority):
    assert calls_of_a_turn(priority) == [("prefill", priority), ("agents", priority)]


def test_a_turn_that_is_taken_up_again_goes_before_all_others():
    first, again = [("prefill", 7), ("agents", 7)], [("prefill", RESUMED), ("agents", RESUMED)]
    assert calls_of_a_turn(7, preemptions=2) == [*first, *again, *again]
