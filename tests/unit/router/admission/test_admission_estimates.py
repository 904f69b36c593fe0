"""When a turn would start, from measured rates; who is refused for it at once, and with which hint."""

import asyncio

import pytest
from admission_lab import Lab
from virtual_time import clock, on_virtual_time, settle

from prefillshare.kvshare.errors import Overloaded


async def busy_lab(turns_per_s=2.0, **router):
    """A pool of 10 turns of 10 blocks that for 30 s has ended and started `turns_per_s`, with turns waiting."""
    lab = Lab({"agents": {"d0": (100, 50)}}, **{"max_wait_s": 20} | router)
    grants = [await lab.ask(10) for _ in range(10)]
    for _ in range(int(30 * turns_per_s)):
        task = lab.ask(10)
        await asyncio.sleep(1 / turns_per_s)
        grants.pop(0).release()
        grants.append(await task)
    return lab, grants


def waiting_turns(lab, number, **demand):
    return [lab.ask(10, **demand) for _ in range(number)]


@on_virtual_time
async def test_before_anything_is_measured_turns_may_wait():
    lab = Lab()
    await lab.ask(100)
    waiting_turns(lab, 200)
    await settle()
    assert lab.admission.waiting("agents") == 200


@on_virtual_time
async def test_what_would_start_too_late_is_refused_at_once_with_a_hint():
    lab, _ = await busy_lab()
    turns = waiting_turns(lab, 40)  # 20 s of work for 2 per s
    await settle()
    assert lab.admission.waiting("agents") == pytest.approx(40, abs=2)
    turns += waiting_turns(lab, 10)
    await settle()
    began = clock()
    with pytest.raises(Overloaded, match=r"would start in about 2\d s and may wait 20 s \(router.max_wait_s") as raised:
        await lab.ask(10)
    assert clock() == began
    assert 1 <= raised.value.retry_after_s <= 2
    with pytest.raises(Overloaded) as raised:
        await lab.ask(100)  # ten times the blocks: five seconds later
    assert 4 <= raised.value.retry_after_s <= 6
    assert lab.refused("too_late") >= 10


@on_virtual_time
async def test_after_the_time_hinted_at_there_is_room_in_the_queue():
    lab, grants = await busy_lab()
    waiting = waiting_turns(lab, 50)
    await settle()
    with pytest.raises(Overloaded) as raised:
        await lab.ask(60)
    for _ in range(int(raised.value.retry_after_s * 2) + 1):
        await asyncio.sleep(0.5)
        grants.pop(0).release()
        await settle()
        grants = [it.result() for it in waiting if it.done() and not it.exception() and not it.result().ended] or grants
    task = lab.ask(60)
    await settle()
    assert not task.done()


@on_virtual_time
async def test_a_turn_needs_time_to_end_before_its_deadline_too():
    lab, _ = await busy_lab()  # turns take 5 s here
    waiting_turns(lab, 10)
    await settle()
    with pytest.raises(Overloaded, match="it would start in about"):
        await lab.ask(10, deadline_s=9)
    in_time = lab.ask(10, deadline_s=13)
    await settle()
    assert not in_time.done()


@on_virtual_time
async def test_prefill_work_ahead_counts():
    lab = Lab({"agents": {"d0": (10_000, 500)}}, max_queued_prefill_tokens=1000, max_wait_s=10)
    grant = await lab.ask(100, prefill_tokens=1000)
    for _ in range(20):
        task = lab.ask(100, prefill_tokens=1000)
        await asyncio.sleep(1)  # 1000 tokens per second
        grant.prefill_done()
        grant = await task
    turns = [lab.ask(100, prefill_tokens=1000) for _ in range(15)]
    await settle()
    assert 9 <= sum(not it.done() for it in turns) <= 12
    assert lab.refused("too_late") == sum(it.done() for it in turns)


@on_virtual_time
async def test_prefill_work_of_other_pools_counts_as_far_as_they_take_turns():
    lab = Lab({"agents": {"d0": (10_000, 500)}, "coder": {"e0": (10_000, 500)}}, max_queued_prefill_tokens=1000, max_wait_s=10)
    grant = await lab.ask(100, prefill_tokens=1000)
    for _ in range(20):
        task = lab.ask(100, prefill_tokens=1000)
        await asyncio.sleep(1)
        grant.prefill_done()
        grant = await task
    others = [lab.ask(100, pool="coder", prefill_tokens=1000) for _ in range(4)]
    turns = [lab.ask(100, prefill_tokens=1000) for _ in range(15)]
    await settle()
    assert not any(it.done() for it in others)
    assert 5 <= sum(not it.done() for it in turns) <= 8  # 4 fewer than in the test above


@on_virtual_time
async def test_sequences_ahead_count():
    lab = Lab({"agents": {"d0": (10_000, 10)}}, max_wait_s=20)
    grants = [await lab.ask(1) for _ in range(10)]
    for _ in range(60):
        task = lab.ask(1)
        await asyncio.sleep(0.5)
        grants.pop(0).release()
        grants.append(await task)
    turns = waiting_turns(lab, 60)
    await settle()
    assert sum(not it.done() for it in turns) == pytest.approx(40, abs=2)


@on_virtual_time
async def test_turns_that_failed_before_their_prefill_say_nothing_about_how_long_turns_take():
    lab, grants = await busy_lab()
    for _ in range(400):
        grants.pop().release()
        grants.append(await lab.ask(10, prefill_tokens=1))
    waiting_turns(lab, 10)
    await settle()
    with pytest.raises(Overloaded, match="it would start in about"):
        await lab.ask(10, deadline_s=9)


@on_virtual_time
async def test_a_time_without_replicas_says_nothing_about_how_fast_they_work():
    lab, grants = await busy_lab()
    lab.set_replicas("agents", {})
    lab.admission.refresh()
    for grant in grants:
        grant.release()
    waiting = waiting_turns(lab, 20)
    await asyncio.sleep(18)
    lab.set_replicas("agents", {"d1": (100, 50)})
    lab.admission.refresh()
    waiting += waiting_turns(lab, 15)  # 25 wait; 2 per s, as before
    await settle()
    assert lab.refused("too_late") == 0
    assert lab.admission.waiting("agents") == 25
