"""Admission beyond capacity, simulated on virtual time: what is admitted ends in time, and everyone gets a fair part."""

import asyncio
import random
from collections import Counter

import pytest
from admission_lab import Lab
from virtual_time import clock, run

from prefillshare.router.admission.grant import Demand, TenantShare

pytestmark = pytest.mark.slow

SECONDS = 150
#: With these sizes and speeds, decode blocks are what runs out, at just under 3 turns per second.
POOL = {"agents": {"d0": (600, 32), "d1": (600, 32)}}
KNEE_PER_S = 2.7
DEADLINE_S = 20.0


async def offer(lab, per_s, seed=1, output=(64, 448), tell_deadline=True):
    rng, turns = random.Random(seed), []
    while clock() < SECONDS:
        await asyncio.sleep(rng.expovariate(per_s))
        prompt = rng.randint(200, 1800)
        demand = Demand("agents", prompt, prompt // 2, deadline_s=DEADLINE_S if tell_deadline else 1e9)
        output_tokens = rng.randint(output[0] // 32, output[1] // 32) * 32
        turns.append(asyncio.create_task(lab.turn(demand, output_tokens, DEADLINE_S)))
    await asyncio.gather(*turns)
    lab.assert_nothing_is_left()
    return len(turns)


def outcome(per_s, **how):
    settings = {name: how.pop(name) for name in ("max_wait_s", "max_queued", "expected_output_tokens") if name in how}

    async def main():
        lab = Lab(POOL, **{"max_queued": 1000} | settings)
        return await offer(lab, per_s, **how), lab

    return run(main())


@pytest.mark.parametrize("seed", [1, 2])
def test_goodput_at_twice_the_knee_stays_what_it_is_at_the_knee(seed):
    offered, at_knee = outcome(KNEE_PER_S, seed=seed)
    assert at_knee.ended["good"] == offered  # still all of it, so this is at or below the knee
    offered, beyond = outcome(2 * KNEE_PER_S, seed=seed)
    assert beyond.ended["good"] < 0.7 * offered  # and this is far above it
    assert beyond.ended["good"] >= 0.9 * at_knee.ended["good"]
    # Who is admitted ends in time, and who is not is told at once.
    assert beyond.ended["late"] <= 0.05 * beyond.ended["good"]
    assert beyond.refused("too_late") >= 0.85 * beyond.ended["refused"]
    # Half of the turns generate more than was expected of them; still hardly one is given back for want of blocks.
    assert beyond.resumes <= 0.02 * offered


def test_with_no_limit_to_waiting_the_same_load_ends_late():
    """The test above has power: this is the same load, engines and order, without refusals."""
    offered, patient = outcome(2 * KNEE_PER_S, tell_deadline=False, max_wait_s=1e9, max_queued=1_000_000)
    assert patient.ended["refused"] == 0
    assert patient.ended["good"] < 0.25 * offered


def test_turns_that_keep_to_their_expectation_are_never_given_back():
    _, lab = outcome(2 * KNEE_PER_S, output=(64, 256))
    assert lab.resumes == 0


def test_turns_that_outgrow_far_too_low_an_expectation_are_given_back_and_do_not_thrash():
    _, at_knee = outcome(KNEE_PER_S, expected_output_tokens=64)
    offered, beyond = outcome(2 * KNEE_PER_S, expected_output_tokens=64)
    assert beyond.ended["good"] >= 0.9 * at_knee.ended["good"]
    assert 0 < beyond.resumes < 0.2 * offered  # who is given back waits for room instead of pushing out the next


def backlogged(tenants, seconds=120, waiting_each=20, **router):
    """Work started per tenant while all of them always have turns waiting."""

    async def main():
        lab, rng = Lab(POOL, max_wait_s=1e6, **router), random.Random(3)
        started: Counter[str] = Counter()

        async def client(tenant):
            while clock() < seconds:
                prompt = rng.randint(200, 1800)
                demand = Demand("agents", prompt, prompt // 2, tenant=tenant, deadline_s=1e6)
                with await lab.admission.admit(demand) as grant:
                    lab.assert_no_reservation_exceeds_capacity()
                    if clock() < seconds:
                        started[tenant.name] += prompt - prompt // 2 + 256
                    grant.prefill_done()
                    await asyncio.sleep(rng.uniform(1, 9))

        async with asyncio.TaskGroup() as group:
            for tenant in tenants * (waiting_each + 20):
                group.create_task(client(tenant))
        lab.assert_nothing_is_left()
        return started

    return run(main())


def test_weights_1_to_3_share_a_backlogged_pool_1_to_3():
    started = backlogged([TenantShare("one", weight=1), TenantShare("three", weight=3)])
    assert started["three"] / started["one"] == pytest.approx(3, rel=0.1)


def test_equal_weights_share_equally_whoever_has_more_waiting():
    started = backlogged([TenantShare("few"), TenantShare("many"), TenantShare("many"), TenantShare("many")])
    assert started["many"] / started["few"] == pytest.approx(1, rel=0.1)


def test_a_small_tenant_hardly_waits_beside_a_flooding_one():
    async def main():
        lab, waits = Lab(POOL, max_queued=200), []

        async def small():
            while clock() < SECONDS:
                began = clock()
                with await lab.admission.admit(Demand("agents", 1000, 500, tenant=TenantShare("small"))) as grant:
                    waits.append(clock() - began)
                    grant.prefill_done()
                    await asyncio.sleep(5)

        async def flood():
            turns, rng = [], random.Random(4)
            while clock() < SECONDS:
                await asyncio.sleep(0.05)  # seven times what the pool can take
                demand = Demand("agents", 1000, 500, tenant=TenantShare("flood"), deadline_s=1000)
                turns.append(asyncio.create_task(lab.turn(demand, rng.randint(2, 8) * 32, 1000)))
            await asyncio.gather(*turns)

        async with asyncio.TaskGroup() as group:
            group.create_task(flood())
            group.create_task(small())  # would raise if it were refused
        lab.assert_nothing_is_left()
        assert lab.ended["refused"] > lab.ended["good"]
        return waits

    waits = run(main())
    assert len(waits) > 20
    assert max(waits) < 3.0  # the flood's own turns wait up to max_wait_s, 30 s
