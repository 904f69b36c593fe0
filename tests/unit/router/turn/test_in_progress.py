"""Turns that run now: counted, and waited for."""

import asyncio
import time

from prefillshare.router.turn.in_progress import InProgress


async def test_the_end_of_the_named_decoders_turns_is_waited_for(metrics):
    turns = InProgress(metrics)
    with turns.turn("planner"):
        with turns.turn("coder"):
            waiting = asyncio.create_task(turns.ended(["coder"], 10))
            everything = asyncio.create_task(turns.ended(None, 10))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            assert metrics["turns_in_progress"]._value.get() == 2
        await asyncio.wait_for(waiting, 1)
        assert not everything.done()
    await asyncio.wait_for(everything, 1)
    assert metrics["turns_in_progress"]._value.get() == 0


async def test_a_turn_that_goes_on_is_waited_for_only_so_long(metrics, caplog):
    turns, began = InProgress(metrics), time.monotonic()
    with turns.turn("planner"):
        await turns.ended(["planner", "coder"], 0.05)
    assert time.monotonic() - began < 5
    assert "turns of planner still run" in caplog.text
