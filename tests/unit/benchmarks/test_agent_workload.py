"""What benchmarks.agents plays: the same for the same seed, within its bounds, and as its pattern says."""

import random
import re
import statistics
from itertools import pairwise

import pytest

from benchmarks.agents import workload
from benchmarks.agents.workload import Lengths, Scale, Session, Turn
from prefillshare.kvshare.errors import ConfigError

SCALE = Scale.named("small")


@pytest.mark.parametrize("pattern", workload.PATTERNS)
def test_the_same_seed_draws_the_same_sessions(pattern):
    drawn = [workload.sessions(pattern, 20, 4, seed, SCALE) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][:5] == workload.sessions(pattern, 5, 4, 1, SCALE)


@pytest.mark.parametrize("pattern", workload.PATTERNS)
@pytest.mark.parametrize("scale", workload.SCALES)
def test_sessions_stay_within_their_bounds(pattern, scale):
    bounds = Scale.named(scale)
    for session in workload.sessions(pattern, 100, 3, 5, bounds):
        assert session.tokens <= bounds.longest
        assert bounds.context.low <= session.context_tokens <= bounds.context.high
        for turn in session.turns:
            assert 0 <= turn.agent < 3
            assert turn.given_tokens >= 1
            assert 1 <= turn.answer_tokens <= max(bounds.thought.high, bounds.call.high)


def test_react_goes_round_the_agents_and_every_act_is_observed():
    for session in workload.sessions("react", 30, 3, 7, SCALE):
        agents = [turn.agent for turn in session.turns]
        assert all((a + 1) % 3 == b for a, b in pairwise(agents))
        thoughts, acts = session.turns[::2], session.turns[1::2]
        assert all(turn.given_tokens >= SCALE.observation.low for turn in thoughts)
        assert all(turn.given_tokens == 1 for turn in acts)
        assert all(turn.pause_s > 0 for turn in thoughts[1:])


def test_reflexion_tries_again_until_it_is_good_enough():
    longer = [len(s.turns) for s in workload.sessions("reflexion", 200, 3, 7, SCALE)]
    once = [len(s.turns) for s in workload.sessions("react", 200, 3, 7, SCALE)]
    assert statistics.mean(longer) > 1.4 * statistics.mean(once)


def test_unbalanced_use_prefers_the_first_agents():
    agents = [turn.agent for s in workload.sessions("unbalanced", 200, 4, 3, SCALE) for turn in s.turns]
    shares = [agents.count(agent) / len(agents) for agent in range(4)]
    assert shares == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25], abs=0.04)


def test_low_sharing_has_one_turn_per_session():
    assert {len(s.turns) for s in workload.sessions("low-sharing", 50, 4, 3, SCALE)} == {1}


def test_the_text_is_the_sessions_own():
    one, other = workload.sessions("react", 2, 2, 1, SCALE)
    context, given = one.given(100, seed=3)
    assert (context, given) == one.given(100, seed=3)
    assert len(context) == one.context_tokens
    assert [len(ids) for ids in given] == [turn.given_tokens for turn in one.turns]
    assert context[:50] != other.given(100, seed=3)[0][:50]


def test_lengths_have_the_median_they_say():
    rng = random.Random(1)
    drawn = [Lengths(64, 0.7, 8, 256).tokens(rng) for _ in range(4000)]
    assert statistics.median(drawn) == pytest.approx(64, rel=0.08)
    assert min(drawn) == 8
    assert max(drawn) == 256


@pytest.mark.parametrize("arrivals", [workload.poisson, workload.bursts])
def test_arrivals_have_the_rate_asked_for(arrivals):
    times = [session.arrival_s for session in arrivals([Session(n, 1, ()) for n in range(20_000)], 5.0, seed=4)]
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(5.0, rel=0.04)


def test_bursts_are_bursts():
    def spread(times):
        counts = [sum(s <= t < s + 5 for t in times) for s in range(0, int(times[-1]), 5)]
        return statistics.pvariance(counts) / statistics.mean(counts)

    drawn = workload.sessions("low-sharing", 1500, 2, 1, SCALE)
    steady, bursty = ([s.arrival_s for s in of(drawn, 5.0, seed=4)] for of in (workload.poisson, workload.bursts))
    assert spread(bursty) > 4 * spread(steady)


def test_a_trace_is_read_as_it_was_written(tmp_path):
    played = workload.poisson(workload.sessions("react", 10, 3, 1, SCALE), 2.0, seed=1)
    workload.write_trace(played[::-1], tmp_path / "trace.jsonl")
    assert workload.read_trace(tmp_path / "trace.jsonl", agents=3) == played  # in order of arrival


@pytest.mark.parametrize(
    ("line", "says"),
    [("{", "line 2"), ('{"turns": []}', "line 2: KeyError('context_tokens')"),
     ('{"context_tokens": 5, "turns": [{"agent": 0}]}', "line 2"),
     ('{"context_tokens": 5, "turns": [{"agent": "x", "given_tokens": 1, "answer_tokens": 1}]}', "line 2"),
     ('{"context_tokens": 5, "turns": [{"agent": -1, "given_tokens": 1, "answer_tokens": 1}]}', "agent -1 of 3"),
     ('{"context_tokens": 5, "turns": [{"agent": 0, "given_tokens": 1, "answer_tokens": 1, "pause_s": -1}]}', "below zero"),
     ('{"context_tokens": 5, "turns": []}', "at least one token"),
     ('{"context_tokens": 5, "turns": [{"agent": 3, "given_tokens": 1, "answer_tokens": 1}]}', "agent 3 of 3")],
)  # fmt: skip
def test_a_trace_that_is_none_is_refused_with_its_line(tmp_path, line, says):
    workload.write_trace([Session(0, 9, (Turn(0, 1, 1),))], tmp_path / "trace.jsonl")
    with (tmp_path / "trace.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ConfigError, match=re.escape(says)):
        workload.read_trace(tmp_path / "trace.jsonl", agents=3)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="react, reflexion"):
        workload.sessions("another", 1, 1, 1, SCALE)
    with pytest.raises(ConfigError, match="small, papers"):
        Scale.named("another")
