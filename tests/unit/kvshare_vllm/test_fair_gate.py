"""Who waits is let in tenant by tenant, and nobody's place is lost."""

import asyncio

import pytest

from prefillshare.kvshare.errors import Overloaded
from prefillshare.kvshare_vllm.fair_gate import FairGate


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


async def run(gate, order, *tenants):
    """One task per entry, started in this order; each notes when it is let in and waits for its own event."""
    events, tasks = [], []
    for number, tenant in enumerate(tenants):
        leave = asyncio.Event()

        async def inside(tenant=tenant, number=number, leave=leave):
            async with gate.enter(tenant):
                order.append((tenant, number))
                await leave.wait()

        events.append(leave)
        tasks.append(asyncio.create_task(inside()))
        await settled()
    return events, tasks


def test_tenants_take_turns_however_many_one_has_waiting():
    async def main():
        gate, order = FairGate("work", 1, 10), []
        events, tasks = await run(gate, order, "a", "a", "a", "a", "b", "b")
        for event in events:
            event.set()
        await asyncio.gather(*tasks)
        assert order == [("a", 0), ("a", 1), ("b", 4), ("a", 2), ("b", 5), ("a", 3)]

    asyncio.run(main())


def test_no_more_are_inside_than_it_is_wide():
    async def main():
        gate, order = FairGate("work", 2, 10), []
        events, tasks = await run(gate, order, "a", "b", "c")
        assert len(order) == 2
        events[1].set()
        await settled()
        assert order[2] == ("c", 2)
        for event in events:
            event.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_tenant_with_too_many_waiting_is_refused_and_others_are_not():
    async def main():
        gate, order = FairGate("work", 1, 2), []
        events, tasks = await run(gate, order, "a", "a", "a")
        with pytest.raises(Overloaded, match="2 requests of this tenant wait for work"):
            await gate.join("a")
        more_events, more = await run(gate, order, "b")
        for event in (*events, *more_events):
            event.set()
        await asyncio.gather(*tasks, *more)
        assert len(order) == 4

    asyncio.run(main())


def test_who_gives_up_leaves_no_hole_and_takes_no_place():
    async def main():
        gate, order = FairGate("work", 1, 10), []
        events, tasks = await run(gate, order, "a", "b", "c")
        tasks[1].cancel()
        await settled()
        events[0].set()
        await settled()
        assert order == [("a", 0), ("c", 2)]
        tasks[2].cancel()
        await settled()
        async with asyncio.timeout(1):
            await gate.join("d")

    asyncio.run(main())


def test_one_that_is_let_in_while_it_gives_up_passes_its_place_on():
    async def main():
        gate, order = FairGate("work", 1, 10), []
        events, tasks = await run(gate, order, "a", "b", "c")
        events[0].set()
        tasks[0].add_done_callback(lambda _: tasks[1].cancel())
        await settled()
        events[2].set()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(1):
            await gate.join("d")

    asyncio.run(main())
