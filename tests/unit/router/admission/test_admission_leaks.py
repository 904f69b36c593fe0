"""However turns end, nothing of them is left; and a long queue costs little more per event than a short one."""

import asyncio
import random
import sys
from contextlib import suppress

import pytest
from admission_lab import BLOCK, Lab
from virtual_time import on_virtual_time, run, settle

from prefillshare.kvshare.errors import Overloaded, Unavailable
from prefillshare.router.admission.grant import Demand, TenantShare

pytestmark = pytest.mark.slow


@on_virtual_time
async def test_a_cancelled_waiter_leaves_even_in_the_moment_it_would_start():
    lab = Lab()
    held = await lab.ask(100)
    leaves, next_one = lab.ask(10), lab.ask(10, "next")
    await settle()
    leaves.cancel()
    held.release()  # would start it, before it has noticed that it is cancelled
    await settle()
    assert leaves.cancelled()
    (await next_one).release()
    lab.assert_nothing_is_left()


@on_virtual_time
@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_nothing_leaks_and_reservations_keep_to_capacity(seed):
    rng, growth = random.Random(seed), seed % 2
    replicas = {"d0": (60, 5), "d1": (60, 5), "d2": (60, 5)}
    lab = Lab(
        {"agents": replicas, "coder": {"e0": (60, 5)}}, max_queued_prefill_tokens=400, max_wait_s=4, max_queued=40
    )

    async def turn():
        pool = rng.choice(["agents", "coder"])
        tenant = TenantShare(rng.choice("abc"), weight=rng.choice([1, 3]), max_in_progress=25)
        demand = Demand(pool, rng.randrange(1, 700), rng.randrange(0, 300), rng.choice([None, 1, 64]), tenant,
                        rng.choice([0, 0, 1]), rng.choice([None, 1.0, 10.0]))
        with suppress(Overloaded, Unavailable), await lab.admission.admit(demand) as grant:
            if rng.random() < 0.1:
                return
            await asyncio.sleep(rng.random())
            grant.prefill_done()
            for replica in lab.capacity[pool]:
                if grant.fits(replica) and rng.random() < 0.5:
                    grant.on(replica)
            await asyncio.sleep(rng.random() * 3)
            if growth and rng.random() < 0.2:
                grant.grow_to(rng.randrange(600))
            if rng.random() < 0.2:
                await grant.readmit(rng.randrange(100))
                await asyncio.sleep(rng.random())

    tasks = []
    for _ in range(400):
        tasks.append(asyncio.create_task(turn()))
        await asyncio.sleep(rng.expovariate(8))
        if not growth:
            lab.assert_no_reservation_exceeds_capacity("agents")
            lab.assert_no_reservation_exceeds_capacity("coder")
        if rng.random() < 0.2:
            rng.choice(tasks).cancel()
        if rng.random() < 0.1:
            lab.set_replicas("agents", {name: has for name, has in replicas.items() if rng.random() < 0.7})
            lab.admission.refresh()
    lab.set_replicas("agents", replicas)
    lab.admission.refresh()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(it) for it in results} <= {type(None), asyncio.CancelledError}
    lab.assert_nothing_is_left()
    assert lab.admission._by_tenant == {}


def test_ten_thousand_waiting_turns_cost_no_more_per_event_than_a_hundred():
    def calls_with(waiting):
        count = 0

        def profile(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        async def main():
            lab = Lab({"agents": {"d0": (100, 50)}}, max_queued=20_000)
            held = [await lab.ask(1) for _ in range(50)]
            tasks = [lab.ask(1, tenant=TenantShare(f"t{n % 100}")) for n in range(waiting)]
            await settle()
            sys.setprofile(profile)
            try:
                for grant in held:
                    tasks.append(lab.ask(1, tenant=TenantShare("new")))
                    grant.grow_to(4 * BLOCK)
                    grant.release()
                    tasks[len(tasks) // 2].cancel()
                    await asyncio.sleep(0)
            finally:
                sys.setprofile(None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return count

        return run(main())

    assert calls_with(10_000) < 1.5 * calls_with(100)
