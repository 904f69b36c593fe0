"""Sessions are played as they were drawn, and the figures are those one can work out by hand."""

import threading
import time

import pytest

from benchmarks.agents import driver, measures
from benchmarks.agents.driver import Conversation, Cost, TurnRecord
from benchmarks.agents.measures import Objective
from benchmarks.agents.workload import Session, Turn
from prefillshare.kvshare.errors import Unavailable

TURNS = (Turn(0, 3, 4), Turn(1, 2, 5, pause_s=0.01))


class World:
    """A system that answers at once, all tokens in two pieces."""

    def __init__(self, fails_at: int | None = None):
        self.asked, self.ended, self.at_once, self.most = [], 0, 0, 0
        self._fails_at, self._lock = fails_at, threading.Lock()

    def converse(self, context):
        world = self
        with world._lock:
            world.at_once += 1
            world.most = max(world.most, world.at_once)

        class Talk(Conversation):
            def turn(self, agent, given, answer_tokens, arrived):
                world.asked.append((len(context), agent, len(given), answer_tokens))
                if len(world.asked) == world._fails_at:
                    raise Unavailable("gone")
                arrived(1)
                time.sleep(0.005)
                arrived(answer_tokens - 1)
                return Cost(cached_tokens=len(context), computed_tokens=len(given))

            def end(self):
                with world._lock:
                    world.at_once -= 1
                    world.ended += 1

        return Talk()


def test_a_closed_loop_keeps_so_many_sessions_under_way():
    world = World()
    records = driver.closed([Session(n, 7, TURNS) for n in range(6)], world.converse, 2, seed=1)
    assert sorted(world.asked) == sorted([(7, 0, 3, 4), (7, 1, 2, 5)] * 6)
    assert world.most == 2
    assert world.ended == 6
    assert [(r.session, r.turn, r.agent, len(r.token_s)) for r in records[:2]] == [(0, 0, 0, 4), (0, 1, 1, 5)]
    assert all(r.asked_s <= r.token_s[0] <= r.token_s[-1] <= r.end_s for r in records)


def test_an_open_loop_begins_sessions_when_they_arrive():
    world = World()
    records = driver.opened([Session(n, 7, TURNS[:1], arrival_s=0.1 * n) for n in range(3)], world.converse, seed=1)
    begun = [record.asked_s - records[0].asked_s for record in records]
    assert begun == pytest.approx([0.0, 0.1, 0.2], abs=1e-6)  # when it was due, not when a thread was free
    assert all(record.token_s[0] >= record.asked_s for record in records)  # and not before


def test_a_failed_turn_ends_its_session_and_is_told():
    world = World(fails_at=1)
    records = driver.closed([Session(0, 7, TURNS), Session(1, 7, TURNS)], world.converse, 1, seed=1)
    assert [(r.session, r.error) for r in records] == [(0, "Unavailable"), (1, ""), (1, "")]
    assert world.ended == 2


def record(session, turn, asked, first, end, cached=0, computed=1, tokens=3, error=""):
    times = [first + (end - first) * n / (tokens - 1) for n in range(tokens)]
    return TurnRecord(session, turn, 0, asked, times, end, Cost(cached, computed, kv_bytes=8), error)


def test_the_figures_are_those_of_the_records():
    records = [record(0, 0, 0.0, 1.0, 2.0), record(0, 1, 5.0, 5.5, 6.0, cached=9), record(1, 0, 2.0, 6.0, 10.0)]
    found = measures.summary([records], Objective(ttft_s=1.0, inter_token_s=1.0))
    assert found["turns_per_s"]["value"] == 0.3
    assert found["tokens_per_s"]["value"] == 0.9
    assert found["session_s_p99"]["value"] == pytest.approx(8.0, abs=0.2)
    assert found["session_s_p50"]["value"] == 5.5  # of 3 and 8 seconds: what lies between the turns is not counted
    assert found["ttft_s_p50"]["value"] == 1.0
    assert found["hit_ratio"]["value"] == 0.75
    assert found["computed_tokens_per_turn"]["value"] == 1.0
    assert found["good_sessions_per_s"]["value"] == 0.1
    assert (found["sessions"], found["turns"], found["failed_turns"], found["seconds"]) == (2, 3, 0, 10.0)


def test_of_repeats_rates_are_over_the_time_of_all_and_their_interval_is_the_range():
    repeats = [[record(0, 0, 0.0, 1.0, 2.0)], [record(0, 0, 50.0, 51.0, 58.0)]]
    found = measures.summary(repeats, Objective(ttft_s=1.0, inter_token_s=1.0))
    assert found["turns_per_s"] == {"value": 0.2, "low": 0.125, "high": 0.5}
    assert (found["sessions"], found["seconds"]) == (2, 10.0)
    assert measures.summary(repeats[:1], Objective(1.0, 1.0))["turns_per_s"]["low"] is None


def test_failed_turns_count_as_such_and_make_no_session_good():
    records = [record(0, 0, 0.0, 0.5, 1.0), record(0, 1, 1.0, 1.5, 2.0, error="Unavailable")]
    found = measures.summary([records], Objective(ttft_s=1.0, inter_token_s=1.0))
    assert found["failed_turns"] == 1
    assert found["turns_per_s"]["value"] == 0.5
    assert found["good_sessions_per_s"]["value"] == 0.0


def test_intervals_hold_the_value_and_shrink_with_more_sessions():
    def width(count):
        records = [record(n, 0, float(n), n + 0.1 + 0.05 * (n % 7), n + 1.0) for n in range(count)]
        ttft = measures.summary([records], Objective(1.0, 1.0))["ttft_s_p50"]
        assert ttft["low"] <= ttft["value"] <= ttft["high"]
        return ttft["high"] - ttft["low"]

    assert width(400) < width(20)


def test_where_every_turn_failed_there_are_no_latencies():
    found = measures.summary([[record(0, 0, 0.0, 0.5, 1.0, error="Unavailable")]], Objective(1.0, 1.0))
    assert found["ttft_s_p50"] == {"value": None, "low": None, "high": None}
    assert found["turns_per_s"]["value"] == 0.0
