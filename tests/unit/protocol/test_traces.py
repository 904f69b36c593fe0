"""What the router does in a turn with its engines, whatever fails, is what the model of handoffs does. Engines are doubles."""

import asyncio
from contextlib import suppress

import pytest
from double.cluster import KNOWN_S, START_S
from double.system import session_system, system
from protocol import handoffs, traces
from virtual_time import on_virtual_time

from prefillshare.kvshare.errors import PrefillShareError, PrefixLost, ResumeReason, Unavailable

PROMPT = list(range(20, 57))
FAILURES = {
    "nothing": lambda pool, replica: (lambda: None),
    "dies": lambda pool, replica: (lambda: pool.kill(replica.name)),
    "cannot": lambda pool, replica: Unavailable("no"),
    "drops the call": lambda pool, replica: asyncio.CancelledError(),
    "hangs": lambda pool, replica: replica.hang,
    "gives it back": lambda pool, replica: PrefixLost("preempted", reason=ResumeReason.PREEMPTED),
    "cannot load": lambda pool, replica: PrefixLost("no KV", reason=ResumeReason.KV_LOAD_FAILED),
}
MOMENTS = ("prefill", "prefilled", "decode", "loaded", "token 1", "token 2")


@pytest.fixture(autouse=True)
def as_many_attempts(monkeypatch):
    monkeypatch.setattr(handoffs, "ATTEMPTS", 3)


@pytest.mark.parametrize("decoder", ["a", "o", "s", "c"])
@pytest.mark.parametrize(("moment", "failure"), [(moment, how) for moment in MOMENTS for how in FAILURES])
@on_virtual_time
async def test_a_turn_that_fails_once_goes_a_way_of_the_model(decoder, moment, failure):
    async with system() as running:
        pool = running.prefill_of(decoder) if moment.startswith("prefill") else running.pool_of(decoder)
        first = next(iter(pool.replicas.values()))
        for replica in pool.replicas.values():
            replica.planned[moment] = FAILURES[failure](pool, replica) if replica is first else (lambda: None)
        with traces.recorded("r") as steps:
            assert await running.turn(decoder, PROMPT, handoffs.TOKENS) == running.expected(decoder, PROMPT, handoffs.TOKENS)
            first.come_back()
            await asyncio.sleep(KNOWN_S + START_S)
        assert traces.problem(steps) == "", steps
        assert steps[-1].startswith("last-token")


@on_virtual_time
async def test_leases_that_end_before_they_are_read_do_so_in_the_model():
    async with system() as running:
        for replica in running.pool_of("a").replicas.values():
            replica.planned["loaded"] = running.cluster.leases.end_all
        with traces.recorded("r") as steps, suppress(PrefillShareError):
            await running.turn("a", PROMPT, handoffs.TOKENS)
        assert traces.problem(steps) == "", steps
        assert "late attempt 0" in steps


@on_virtual_time
async def test_the_loan_of_a_response_is_read_once_and_is_one_of_the_model():
    async with session_system() as running:
        await running.turns.create("s", ("token_ids", PROMPT))
        with traces.recorded("r") as steps:
            await running.take("s", "s", [7, 8], handoffs.TOKENS)
            await asyncio.sleep(5)
        assert traces.problem(steps) == "", steps
        assert steps[-2:] == ["loads loan", "read loan"]


@pytest.mark.parametrize(
    "steps",
    [
        ["made attempt 0"],
        ["asks", "made attempt 0", "read attempt 0"],
        ["asks", "made attempt 0", "loads attempt 0", "token attempt 0"],
        ["asks", "made attempt 0", "loads attempt 0", "read attempt 0", "read attempt 0"],
        ["asks", "made attempt 0", "loads attempt 0", "late attempt 0", "token attempt 0"],
        ["asks", "made attempt 0", "loads attempt 0", "read attempt 0", "made attempt 0"],
        ["asks", "made attempt 0", "loads attempt 0", "loads loan"],
    ],
)
def test_what_may_never_happen_is_no_way_of_the_model(steps):
    assert traces.problem(steps) == f"step {len(steps) - 1}: {steps[-1]}"
