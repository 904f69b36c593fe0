"""Who is refused whatever the estimate says: by limits, by size, by time, by a full queue."""

import asyncio

import pytest
from admission_lab import Lab
from virtual_time import clock, on_virtual_time, settle

from prefillshare.kvshare.errors import InvalidInput, Overloaded, Unavailable
from prefillshare.kvshare.metrics import DEFINITIONS
from prefillshare.router.admission.grant import TenantShare
from prefillshare.router.admission.refusals import Refusal


def waiting_turns(lab, number, **demand):
    return [lab.ask(10, **demand) for _ in range(number)]


@on_virtual_time
@pytest.mark.parametrize("limits", [{"max_wait_s": 5.0}, {"deadline_s": 5.0}])
async def test_who_has_waited_too_long_is_refused_then(limits):
    lab = Lab(**{name: limits[name] for name in limits if name == "max_wait_s"})
    held = await lab.ask(100)
    with pytest.raises(Overloaded, match=r"no room in pool 'agents' within 5.0 s"):
        await lab.ask(10, **{name: limits[name] for name in limits if name == "deadline_s"})
    assert (clock(), lab.refused("waited_too_long")) == (5.0, 1)
    held.release()
    lab.assert_nothing_is_left()


@on_virtual_time
async def test_a_large_turn_that_gives_up_lets_those_behind_it_start():
    lab = Lab(max_wait_s=5)
    held = await lab.ask(50)
    large = lab.ask(90, "large")
    await asyncio.sleep(4)
    small = lab.ask(50, "small")
    await settle()
    assert not small.done()
    await asyncio.sleep(1)
    with pytest.raises(Overloaded):
        await large
    (await small).release()
    held.release()
    lab.assert_nothing_is_left()


@on_virtual_time
async def test_in_a_full_queue_the_last_in_order_is_refused_and_not_the_newcomer():
    lab = Lab(max_queued=5)
    held = await lab.ask(100, tenant=TenantShare("flood"))
    flood = waiting_turns(lab, 4, tenant=TenantShare("flood"))
    await settle()
    with pytest.raises(Overloaded, match=r"5 turns are in progress or waiting \(router.max_queued\)"):
        await lab.ask(10, tenant=TenantShare("flood"))
    small = lab.ask(10, "small", tenant=TenantShare("small"))
    urgent = lab.ask(10, "urgent", tenant=TenantShare("flood"), priority=-1)
    await settle()
    assert [it.done() for it in flood] == [False, False, True, True]
    assert isinstance(flood[3].exception(), Overloaded)
    assert lab.refused("queue_full") == 3
    held.release()
    await settle()
    assert (small.done(), urgent.done(), lab.started[:2]) == (True, True, [None, "urgent"])


@on_virtual_time
async def test_a_pool_that_fills_the_queue_keeps_no_other_pool_out():
    lab = Lab({"agents": {"d0": (100, 8)}, "coder": {"e0": (100, 8)}}, max_queued=5)
    await lab.ask(100)
    agents = waiting_turns(lab, 4)
    await settle()
    await lab.ask(10, pool="coder")
    await settle()
    assert [it.done() for it in agents] == [False, False, False, True]


@on_virtual_time
async def test_with_nobody_waiting_a_turn_beyond_the_limit_is_refused_and_never_starts():
    lab = Lab(max_queued=2)
    grants = [await lab.ask(10), await lab.ask(10)]
    with pytest.raises(Overloaded, match="max_queued"):
        await lab.ask(10)
    assert (dict(lab.admission.held("agents")), lab.metric("queue_seconds_count", pool="agents")) == ({"d0": (20, 2)}, 2)
    for grant in grants:
        grant.release()
    lab.assert_nothing_is_left()


@on_virtual_time
async def test_a_tenant_at_its_limit_is_refused_whatever_room_there_is():
    lab, acme = Lab(), TenantShare("acme", max_in_progress=2)
    grants = [await lab.ask(1, tenant=acme), await lab.ask(1, tenant=acme)]
    with pytest.raises(Overloaded, match="tenant 'acme' has 2 turns in progress or waiting"):
        await lab.ask(1, tenant=acme)
    await lab.ask(1, tenant=TenantShare("other"))
    grants[0].release()
    await lab.ask(1, tenant=acme)
    assert lab.refused("tenant_limit") == 1


@on_virtual_time
async def test_what_can_never_fit_is_wrong_input_and_names_the_fix():
    lab = Lab({"agents": {"d0": (100, 8), "d1": (120, 8)}})
    (await lab.ask(120)).release()
    with pytest.raises(InvalidInput, match="needs 121 KV blocks, a replica of pool 'agents' has 120") as raised:
        await lab.ask(121)
    assert "kv_cache_gib" in raised.value.fix
    held = [await lab.ask(120), await lab.ask(100)]
    waits = lab.ask(110)
    await settle()
    lab.set_replicas("agents", {"d0": (100, 8)})
    lab.admission.refresh()
    with pytest.raises(InvalidInput, match="needs 110"):
        await waits
    for grant in held:
        grant.release()
    lab.assert_nothing_is_left()


@on_virtual_time
async def test_turns_wait_for_a_replica_and_are_told_if_none_came():
    lab = Lab()
    held, waits = await lab.ask(100), lab.ask(50)
    await settle()
    lab.set_replicas("agents", {})
    with pytest.raises(Unavailable, match="no replica of agents is ready"):
        await lab.ask(1, deadline_s=5)
    held.release()
    await settle()
    assert not waits.done()
    lab.set_replicas("agents", {"d9": (100, 8)})
    lab.admission.refresh()
    assert (await waits).replica == "d9"


@on_virtual_time
async def test_a_priority_out_of_range_is_wrong_input():
    with pytest.raises(InvalidInput, match="priority: 101 is out of range"):
        await Lab().ask(1, priority=101)


def test_every_reason_is_named_where_the_metric_is_defined():
    metric = DEFINITIONS["prefillshare_turns_refused_total"]
    assert f"({', '.join(Refusal)})" in metric.help


@on_virtual_time
async def test_a_request_of_more_turns_than_can_ever_be_in_progress_is_not_told_to_try_again():
    lab = Lab(max_queued=5)
    lab.admission.check_turns(5, TenantShare("a"))
    with pytest.raises(InvalidInput, match=r"asks for 6 responses at once, at most 5 .*\(router\.max_queued\)") as caught:
        lab.admission.check_turns(6, TenantShare("a"))
    assert caught.value.field == "n"
    with pytest.raises(InvalidInput, match=r"at most 2 .*max_in_progress of tenant 'b'"):
        lab.admission.check_turns(3, TenantShare("b", max_in_progress=2))
    lab.admission.check_turns(3, TenantShare("c", max_in_progress=20))
    with pytest.raises(InvalidInput, match=r"at most 4 can be begun \(turns_per_minute of tenant 'd'\)"):
        lab.admission.check_turns(5, TenantShare("d", max_in_progress=5, turns_per_minute=4))


@on_virtual_time
async def test_an_estimate_that_says_nothing_is_not_told_to_the_second():
    lab = Lab(max_wait_s=30)
    held = await lab.ask(100)
    line = lab.admission._lines["agents"]
    line.wait_s = lambda ticket: 1529135429.0
    with pytest.raises(Overloaded, match=r"it would start in more than 600 s and may wait 30 s"):
        await lab.ask(10)
    line.wait_s = lambda ticket: 45.2
    with pytest.raises(Overloaded, match=r"it would start in about 45 s and may wait 30 s"):
        await lab.ask(10)
    held.release()
    lab.assert_nothing_is_left()
