"""What a grant does while its turn runs: moves, grows, is given back by its engine, ends."""

import asyncio

import pytest
from admission_lab import BLOCK, Lab
from virtual_time import on_virtual_time, settle

from prefillshare.kvshare.errors import Internal, Unavailable
from prefillshare.router.admission.grant import TenantShare


def two_replicas():
    return Lab({"agents": {"d0": (100, 50), "d1": (100, 50)}})


@on_virtual_time
async def test_a_move_that_makes_room_starts_who_waits_for_it():
    lab = two_replicas()
    _, moves = await lab.ask(60), await lab.ask(30)
    lab.ask(90, "large")
    await settle()
    assert (moves.replica, lab.started) == ("d1", [None, None])
    moves.on("d0")
    await settle()
    assert lab.started == [None, None, "large"]


@on_virtual_time
async def test_tenants_pay_for_growth_when_they_wait():
    lab = Lab({"agents": {"d0": (1000, 2)}})
    grants = [await lab.ask(10, tenant=TenantShare("grows")), await lab.ask(10, tenant=TenantShare("does not"))]
    for name in ("grows", "does not"):
        for _ in range(10):
            lab.ask(10, name, tenant=TenantShare(name))
    await settle()
    grants[0].grow_to(100 * BLOCK)
    for _ in range(10):
        grants[0].release()
        await settle()
        grants = [it.result() for it in lab.asked if it.done() and not it.result().ended]
    # Its first turn was due before; then it has ten turns' worth of blocks behind it.
    assert lab.started[2:] == ["grows"] + ["does not"] * 9


@on_virtual_time
async def test_the_reservation_moves_to_the_replica_that_placement_picks():
    lab = two_replicas()
    with await lab.ask(60) as grant:
        assert (grant.replica, grant.fits("d0"), grant.fits("d1"), grant.fits("nobody")) == ("d0", True, True, False)
        grant.on("d1")
        assert dict(lab.admission.held("agents")) == {"d1": (60, 1)}
        other = await lab.ask(50)
        assert not grant.fits("d0")
        with pytest.raises(Unavailable, match="d0 has no room for 60 KV blocks"):
            grant.on("d0")
        other.release()
    lab.assert_nothing_is_left()


@on_virtual_time
async def test_a_turn_moves_away_from_a_replica_that_is_gone():
    lab = two_replicas()
    grant = await lab.ask(60)
    lab.set_replicas("agents", {"d1": (100, 8)})
    with pytest.raises(Unavailable, match="d0"):
        grant.on("d0")
    grant.on("d1")
    assert dict(lab.admission.held("agents")) == {"d1": (60, 1)}
    grant.release()
    lab.assert_nothing_is_left()


@on_virtual_time
async def test_growth_is_reserved_and_keeps_new_turns_out_until_there_is_room():
    lab = Lab({"agents": {"d0": (20, 8)}})
    grant = await lab.ask(10)
    grant.grow_to(BLOCK)
    assert grant.blocks == 10
    grant.grow_to(6 * BLOCK + 1)
    assert dict(lab.admission.held("agents")) == {"d0": (16, 1)}
    lab.ask(5, "waits")
    await settle()
    grant.grow_to(20 * BLOCK)
    assert lab.admission.room("agents")["d0"] == -9
    grant.release()
    await settle()
    assert lab.started == [None, "waits"]
    assert dict(lab.admission.held("agents")) == {"d0": (5, 1)}


@on_virtual_time
async def test_a_turn_given_back_waits_for_room_ahead_of_those_that_have_not_started():
    lab = Lab({"agents": {"d0": (100, 8)}})
    lost, other = await lab.ask(30, prefill_tokens=7), await lab.ask(60)
    lab.ask(15, "newcomer", priority=-100)
    await settle()
    again = asyncio.create_task(lost.readmit(output_tokens=20 * BLOCK))
    await settle()
    assert not again.done()  # it needs 29 + 20 blocks now; max_tokens is reached, so no more
    assert lab.admission.waiting("agents") == 2
    with pytest.raises(Internal):
        await lost.readmit(0)
    other.release()
    await settle()
    assert again.done()
    assert dict(lab.admission.held("agents")) == {"d0": (49 + 15, 2)}
    assert lab.metric("queue_seconds_count", pool="agents") == 3  # turns, not starts
    assert lab.admission.queued_prefill_tokens("prefill") == 7  # still under way, counted once
    lost.release()
    assert dict(lab.admission.held("agents")) == {"d0": (15, 1)}
    assert lab.admission.queued_prefill_tokens("prefill") == 0
