"""Admission by prefill tokens and decode blocks: what starts, and in which order."""

import asyncio

from admission_lab import Lab
from virtual_time import on_virtual_time, settle

from prefillshare.router.admission.decode_line import MAX_PASSED
from prefillshare.router.admission.grant import Demand, TenantShare


def two_replicas(**router):
    return Lab({"agents": {"d0": (100, 50), "d1": (100, 50)}}, **router)


@on_virtual_time
async def test_with_room_a_turn_starts_at_once_and_reserves_what_it_needs():
    lab = Lab(expected_output_tokens=256)
    grant = await lab.admission.admit(Demand("agents", prompt_tokens=1000, cached_tokens=400))
    assert (grant.blocks, grant.replica, grant.waited_s) == (79, "d0", 0)  # ceil((1000 + 256) / 16)
    assert dict(lab.admission.held("agents")) == {"d0": (79, 1)}
    assert dict(lab.admission.room("agents")) == {"d0": 21}
    assert lab.admission.queued_prefill_tokens("prefill") == 600
    grant.prefill_done()
    grant.prefill_done()
    assert lab.admission.queued_prefill_tokens("prefill") == 0
    grant.release()
    grant.release()
    lab.assert_nothing_is_left()
    assert lab.metric("queue_seconds_count", pool="agents") == 1


@on_virtual_time
async def test_a_turn_is_not_expected_to_generate_more_than_it_may():
    lab = Lab(expected_output_tokens=256)
    with await lab.admission.admit(Demand("agents", prompt_tokens=1000, max_tokens=8)) as grant:
        assert grant.blocks == 63
    lab.assert_nothing_is_left()


@on_virtual_time
async def test_turns_wait_for_blocks_and_start_in_the_order_they_came():
    lab = Lab()
    first = await lab.ask(60)
    waiting = [lab.ask(40, "b"), lab.ask(40, "c"), lab.ask(1, "d")]
    await settle()
    assert lab.started == [None, "b"]
    assert (lab.admission.waiting("agents"), lab.metric("turns_waiting", pool="agents")) == (2, 2)
    await asyncio.sleep(3)
    first.release()
    await settle()
    assert lab.started == [None, "b", "c", "d"]
    grants = [await it for it in waiting]
    assert [it.waited_s for it in grants] == [0, 3, 3]
    lab.assert_no_reservation_exceeds_capacity()
    for grant in grants:
        grant.release()
    lab.assert_nothing_is_left()


@on_virtual_time
async def test_turns_wait_for_a_sequence():
    lab = Lab({"agents": {"d0": (100, 2)}})
    grants = [await lab.ask(1), await lab.ask(1)]
    lab.ask(1, "third")
    await settle()
    assert "third" not in lab.started
    grants[0].release()
    await settle()
    assert "third" in lab.started


@on_virtual_time
async def test_turns_wait_while_queued_prefill_tokens_are_at_their_bound():
    lab = Lab(max_queued_prefill_tokens=500)
    large = await lab.ask(50, prefill_tokens=700)  # larger than the bound itself, and still it starts
    lab.ask(2, "waits", prefill_tokens=1)
    lab.ask(2, "cached", pool="agents", priority=-1)  # nothing to prefill: not held up
    await settle()
    assert lab.started == [None, "cached"]
    large.prefill_done()
    await settle()
    assert lab.started == [None, "cached", "waits"]


@on_virtual_time
async def test_the_prefill_bound_grows_with_the_replicas_there_are():
    lab = Lab(max_queued_prefill_tokens=500)
    await lab.ask(50, prefill_tokens=500)
    lab.ask(2, "waits", prefill_tokens=1)
    await settle()
    assert lab.started == [None]
    lab.prefill_replicas = 2
    lab.admission.refresh()
    await settle()
    assert lab.started == [None, "waits"]


@on_virtual_time
async def test_high_priority_goes_first_and_tenants_take_turns():
    lab = Lab({"agents": {"d0": (100, 1)}})
    grant = await lab.ask(30)
    turns = [lab.ask(30, name, tenant=TenantShare("a")) for name in ("a1", "a2", "a3")]
    turns.append(lab.ask(30, "late", tenant=TenantShare("c"), priority=1))
    await settle()
    turns += [lab.ask(30, "b1", tenant=TenantShare("b")), lab.ask(30, "urgent", tenant=TenantShare("a"), priority=-1)]
    await settle()
    for n in range(6):
        grant.release()
        await settle()
        grant = next(it.result() for it in turns if it.done() and not it.result().ended)
        assert len(lab.started) == n + 2
    assert lab.started == [None, "urgent", "a1", "b1", "a2", "a3", "late"]


@on_virtual_time
async def test_a_large_turn_keeps_the_emptiest_replica_and_small_ones_use_the_other():
    lab = two_replicas()
    on_d0, on_d1 = [await lab.ask(60), await lab.ask(20)], [await lab.ask(70)]
    assert [it.replica for it in (*on_d0, *on_d1)] == ["d0", "d1", "d1"]
    lab.ask(90, "large")
    lab.ask(15, "too large for d1")
    await settle()
    assert lab.started == [None] * 3  # d0 has 40 free: kept
    small = lab.ask(5, "small", priority=-1)
    await settle()
    assert (await small).replica == "d0"  # it is before the large one, so it may go anywhere
    on_d1[0].release()
    await settle()
    assert lab.started[-1] == "too large for d1"
    on_d0[1].release()
    on_d0[0].release()
    await settle()
    assert lab.started[-1] == "large"


@on_virtual_time
async def test_small_turns_go_past_a_large_one_only_so_often():
    lab = two_replicas(max_wait_s=1e6)
    blockers = [await lab.ask(20), await lab.ask(10), await lab.ask(20)]
    lab.ask(95, "large", deadline_s=1e6)
    await settle()
    for n in range(MAX_PASSED + 5):
        task = lab.ask(10, n, deadline_s=1e6)
        await settle()
        if task.done():
            (await task).release()
    assert lab.started[3:] == list(range(MAX_PASSED))
    for blocker in blockers:
        blocker.release()
    await settle()
    assert lab.started[3 + MAX_PASSED] == "large"
    assert len(lab.started) == 3 + MAX_PASSED + 1 + 5


@on_virtual_time
async def test_on_one_replica_small_turns_cannot_starve_a_large_one():
    lab = Lab({"agents": {"d0": (100, 50)}})
    running = [await lab.ask(20) for _ in range(5)]
    lab.ask(90, "large")
    for n in range(10):
        lab.ask(20, n)
    for grant in running:
        await settle()
        assert lab.started == [None] * 5
        grant.release()
    await settle()
    assert lab.started == [None] * 5 + ["large"]


@on_virtual_time
async def test_a_full_pool_holds_up_no_other_pool():
    lab = Lab({"agents": {"d0": (100, 8)}, "coder": {"e0": (100, 8)}})
    await lab.ask(100, prefill_tokens=10)
    for _ in range(20):
        lab.ask(50, "agents", prefill_tokens=10)
    await settle()
    await lab.ask(50, "coder", pool="coder", prefill_tokens=10)
    assert lab.started == [None, "coder"]


@on_virtual_time
async def test_pools_on_one_prefill_pool_take_turns_there():
    lab = Lab({"agents": {"d0": (1000, 80)}, "coder": {"e0": (1000, 80)}}, max_queued_prefill_tokens=10)
    grant = await lab.ask(2, "first", prefill_tokens=10)
    waiting = [lab.ask(2, "agents", prefill_tokens=10) for _ in range(10)]
    await settle()
    waiting += [lab.ask(2, "coder", pool="coder", prefill_tokens=10) for _ in range(3)]
    await settle()
    for _ in range(6):
        grant.prefill_done()
        await settle()
        grant = next(it.result() for it in waiting if it.done() and it.result().prefill_tokens)
    assert lab.started == ["first"] + ["coder", "agents"] * 3


@on_virtual_time
async def test_priority_counts_between_pools_on_one_prefill_pool():
    lab = Lab({"agents": {"d0": (1000, 80)}, "coder": {"e0": (1000, 80)}}, max_queued_prefill_tokens=10)
    grant = await lab.ask(2, pool="coder", prefill_tokens=10)
    lab.ask(2, "agents", prefill_tokens=10)
    lab.ask(2, "urgent", pool="coder", prefill_tokens=10, priority=-1)
    await settle()
    grant.prefill_done()
    await settle()
    assert lab.started == [None, "urgent"]


@on_virtual_time
async def test_a_new_replica_is_used_as_soon_as_it_is_known():
    lab = Lab()
    await lab.ask(100)
    waits = lab.ask(50, "waits")
    await settle()
    lab.set_replicas("agents", {"d0": (100, 8), "d1": (100, 8)})
    lab.admission.refresh()
    assert (await waits).replica == "d1"
