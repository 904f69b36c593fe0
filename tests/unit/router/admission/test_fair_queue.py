"""The order of waiting turns: priority, tenants' shares, arrival; and that a long queue costs little more than a short one."""

import random
import sys
from collections import Counter

import pytest

from prefillshare.router.admission.fair_queue import FairQueue, Ticket, Work
from prefillshare.router.admission.lazy_heap import LazyHeap


def ticket(tenant="t", cost=100, weight=1.0, priority=0, item=None):
    return Ticket(tenant, weight, priority, Work(1, 1, cost, cost), item)


def fill(queue, *tickets):
    for it in tickets:
        queue.add(it)
    return tickets


def start(queue):
    first = queue.first()
    queue.remove(first, started=True)
    return first


def started(queue, number):
    return [start(queue).tenant for _ in range(number)]


def test_a_tenants_turns_start_in_the_order_they_came_whatever_they_cost():
    queue = FairQueue()
    tickets = fill(queue, ticket(cost=9000), ticket(cost=1), ticket(cost=500))
    assert [start(queue) for _ in tickets] == list(tickets)
    assert (len(queue), queue.work, queue.first(), queue.last()) == (0, Work(), None, None)


def test_lower_priority_numbers_go_first_across_tenants():
    queue = FairQueue()
    fill(queue, ticket("b", priority=1), ticket("a", priority=0), ticket("c", priority=-1), ticket("a", priority=-1))
    assert started(queue, 4) == ["c", "a", "a", "b"]


def test_shares_follow_weights_by_cost_and_not_by_count():
    queue, got = FairQueue(), Counter()
    fill(queue, *(ticket("short", cost=10, weight=1) for _ in range(900)))
    fill(queue, *(ticket("long", cost=90, weight=3) for _ in range(300)))
    while got["long"] < 9000:
        it = start(queue)
        got[it.tenant] += it.work.cost
    assert got["long"] / got["short"] == pytest.approx(3, rel=0.05)


def test_a_flood_does_not_delay_another_tenants_first_turn():
    queue = FairQueue()
    fill(queue, *(ticket("flood") for _ in range(50)))
    started(queue, 10)
    fill(queue, ticket("small"))
    assert "small" in started(queue, 2)


def test_a_tenant_that_was_away_has_saved_nothing():
    queue = FairQueue()
    fill(queue, *(ticket("busy") for _ in range(100)))
    started(queue, 50)
    fill(queue, *(ticket("back") for _ in range(50)))
    assert Counter(started(queue, 20)) == {"busy": 10, "back": 10}


def test_a_tenant_that_comes_back_at_once_is_still_charged_for_what_it_got():
    queue = FairQueue()
    fill(queue, *(ticket("steady") for _ in range(100)))
    fill(queue, ticket("greedy", cost=1000))
    assert "greedy" in started(queue, 2)
    fill(queue, ticket("greedy"))
    assert started(queue, 9).count("greedy") == 0
    assert "greedy" in started(queue, 3)


def test_turns_that_leave_have_cost_their_tenant_nothing():
    queue = FairQueue()
    fill(queue, *(ticket("other") for _ in range(20)))
    left = fill(queue, *(ticket("fickle") for _ in range(1000)))
    for it in random.Random(1).sample(left, 1000):
        queue.remove(it, started=False)
    fill(queue, ticket("fickle"))
    assert "fickle" in started(queue, 2)


def test_growth_is_charged_to_its_tenant():
    queue = FairQueue()
    fill(queue, *(ticket("grows") for _ in range(20)), *(ticket("does not") for _ in range(20)))
    started(queue, 2)
    queue.charge("grows", 1.0, 0, 500)
    assert Counter(started(queue, 9)) == {"grows": 2, "does not": 7}
    queue.charge("nobody waits at this priority", 1.0, 7, 500)


def test_the_turn_after_the_first_is_of_the_same_tenant_another_or_the_next_priority():
    queue = FairQueue()
    a1, a2, b1, low = fill(queue, ticket("a", cost=10), ticket("a"), ticket("b", weight=0.5), ticket("c", priority=1))
    assert queue.first() is a1
    assert queue.first(besides=a1) is b1  # its tag is 0 as well, a2's is 10
    queue.remove(b1, started=True)
    assert queue.first(besides=a1) is a2
    queue.remove(a2, started=True)  # goes past a1, which keeps its place
    assert queue.first() is a1
    assert queue.first(besides=a1) is low
    queue.remove(low, started=False)
    assert queue.first(besides=a1) is None


def test_last_is_the_end_of_the_longest_flow_of_the_lowest_priority():
    queue = FairQueue()
    flood = fill(queue, *(ticket("flood") for _ in range(5)))
    fill(queue, ticket("small"), ticket("small"))
    assert queue.last() is flood[-1]
    queue.remove(flood[-1], started=False)
    assert queue.last() is flood[-2]
    (low,) = fill(queue, ticket("small", priority=3))
    assert queue.last() is low


def test_work_ahead_is_the_own_tenants_and_the_others_share():
    queue = FairQueue()
    fill(queue, *(ticket("other", weight=2) for _ in range(10)), *(ticket("urgent", priority=-1) for _ in range(3)))
    first, second = fill(queue, ticket("mine"), ticket("mine"))
    assert queue.ahead_of(second).turns == 3 + 1 + 2  # the others get twice the work of the turn before it
    queue.remove(second, started=False)
    assert queue.ahead_of(first).turns == 3
    assert queue.ahead_of(fill(queue, ticket("other", weight=2))[0]).turns == 3 + 10 + 1


def test_nothing_is_left_of_random_changes_and_tenants_stay_in_order():
    rng, queue, waiting, number = random.Random(5), FairQueue(), [], 0
    last_started = {}
    for _ in range(20_000):
        what = rng.random()
        if what < 0.5:
            number += 1
            it = ticket(f"t{rng.randrange(30)}", rng.randrange(1, 50), rng.choice([1, 2]), rng.randrange(3), number)
            waiting += fill(queue, it)
        elif waiting and what < 0.8:
            it = start(queue)
            waiting.remove(it)
            assert it.priority == min([it.priority, *(other.priority for other in waiting)])
            assert last_started.get((it.tenant, it.priority), 0) < it.item
            last_started[it.tenant, it.priority] = it.item
        elif waiting:
            it = waiting.pop(rng.randrange(len(waiting)))
            queue.remove(it, started=False)
        assert len(queue) == len(waiting)
    for it in waiting:
        queue.remove(it, started=False)
    assert queue.work == Work()
    assert (queue._levels, queue._priorities) == ({}, [])


def test_tenants_that_went_away_are_forgotten_while_others_wait():
    queue = FairQueue()
    fill(queue, *(ticket("stays") for _ in range(3000)))
    for number in range(2000):
        fill(queue, ticket(f"once {number}"))
        started(queue, 2)
    assert len(queue._levels[0].away) < 200


def calls(action) -> int:
    """Python and C functions called: the work done, without a clock."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_ten_thousand_waiting_turns_cost_no_more_per_event_than_a_hundred():
    def cost(size, tenants):
        queue, rng = FairQueue(), random.Random(1)
        waiting = list(fill(queue, *(ticket(f"t{n % tenants}") for n in range(size))))

        def events():
            for _ in range(50):
                (it,) = fill(queue, ticket(f"t{rng.randrange(tenants)}"))
                queue.ahead_of(it), queue.last(), queue.first(besides=queue.first())
                queue.remove(waiting.pop(rng.randrange(len(waiting))), started=False)
                waiting.remove(queue.first())
                waiting.append(it)
                start(queue)

        return calls(events)

    assert cost(10_000, 1000) < 1.5 * cost(100, 10)
    assert cost(10_000, 1) < 1.5 * cost(100, 1)


def test_a_heap_of_moving_keys_finds_the_first_two_and_stays_small():
    rng, heap, ranks = random.Random(2), LazyHeap(), {}
    for _ in range(5000):
        key = rng.randrange(40)
        if rng.random() < 0.3:
            heap.discard(key)
            ranks.pop(key, None)
        else:
            ranks[key] = rng.random()
            heap.put(key, ranks[key])
        first, second, *_ = [*sorted(ranks, key=ranks.get), None, None]
        assert heap.first() == first
        assert first is None or heap.first(besides=first) == second
        assert len(heap._heap) <= 2 * 40 + 65
