"""The campaign's accounts: what it has found is kept and added up, and growth is told from noise and from new processes."""

import json
import random
from types import SimpleNamespace

import pytest

from benchmarks.soak.agent import Agent
from benchmarks.soak.findings import TOLD, Findings
from benchmarks.soak.watching import SETTLES_S, Sample, growth
from prefillshare.kvshare.errors import NotFound


def test_findings_survive_a_file_and_are_added_up():
    one, other = Findings(turns=3, seconds=2.5), Findings(turns=4)
    one.count(one.refused, "Unavailable")
    one.tell("wrong", "a token")
    other.count(other.refused, "Unavailable")
    other.leaked["agents: blocks_used"] += 2
    total = Findings.summed(Findings.of(json.loads(json.dumps(part.as_dict()))) for part in (one, other))
    assert (total.turns, total.wrong, total.problems, total.seconds) == (7, 1, ["wrong: a token"], 2.5)
    assert (total.refused, total.leaked.total()) == ({"Unavailable": 2}, 2)


def test_of_many_problems_all_are_counted_and_some_are_told():
    found = Findings()
    for number in range(2 * TOLD):
        found.tell("lost", f"turn {number}")
    assert (found.lost, len(found.problems)) == (2 * TOLD, TOLD)


def sample(life: str, turns: int, rss: int, kind: str = "router", age_s: float = SETTLES_S + 1) -> Sample:
    return Sample(kind, life, turns, age_s, rss, 10)


def test_growth_is_that_within_lives_and_not_between_them():
    rng = random.Random(1)
    steady = [sample(life, turns, level + rng.randint(-50, 50)) for life, level in (("1", 1000), ("2", 9000))
              for turns in range(0, 1000, 10)]  # fmt: skip
    later = [sample("3", turns, 90_000) for turns in range(1000, 2000, 10)]
    assert abs(growth(steady + later, lambda one: one.rss)["router"]) < 0.1
    leaking = [sample(life, turns, level + 7 * turns) for life, level in (("1", 0), ("2", 5000)) for turns in range(0, 999, 9)]
    assert growth(leaking, lambda one: one.rss)["router"] == pytest.approx(7)


def test_young_processes_and_kinds_without_a_history_are_left_out():
    young = [sample("1", turns, 1000 * turns, age_s=SETTLES_S - 1) for turns in range(10)]
    assert growth([*young, sample("2", 5, 10, "engine")], lambda one: one.rss) == {}


@pytest.fixture
def agent(monkeypatch):
    """An agent of which a session can be looked at; no system runs."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    system = SimpleNamespace(http_url="http://127.0.0.1:1", grpc_address="127.0.0.1:1")
    truth = SimpleNamespace(problem=lambda decoder, prompt, tokens, *rest: "wrong" if 666 in tokens else "")
    agent = Agent(0, random.Random(0), system, truth, Findings(), lambda: False)
    yield agent
    agent.close()


SAMPLING = {"temperature": 0, "max_tokens": 2}


@pytest.mark.parametrize(
    ("there", "problems"),
    [
        ([1, 2], []),
        ([1, 2, 7, 8, 9], []),
        ([1, 2, 7, 8], ["wrong: a has 1 tokens, not 2 (its answer was lost)"]),
        ([1, 2, 7, 666, 9], ["wrong: wrong (committed, but its answer was lost)"]),
        ([1, 2, 7], ["wrong: s has 3 tokens, neither 2 nor a turn of a more"]),
        ([1], ["wrong: s has 1 tokens, neither 2 nor a turn of a more"]),
        ([1, 2, 7, 8, 9, 7, 8, 9], ["wrong: a has 5 tokens, not 2 (its answer was lost)"]),
    ],
)
def test_a_session_whose_turn_was_cut_off_is_as_it_was_or_has_the_whole_turn(agent, monkeypatch, there, problems):
    agent.contexts["s"] = [1, 2]
    monkeypatch.setattr(agent, "_context", lambda name: there)
    agent._settle("s", [1, 2], [7], None, "a", SAMPLING)
    assert agent._found.problems == problems
    assert agent.contexts["s"] == there


def answered(decoder: str, given: list[int], said: list[int]) -> tuple:
    usage = SimpleNamespace(own_layers="")
    return decoder, given, SimpleNamespace(token_ids=said, logprobs=None, usage=usage)


ONE, OTHER = answered("a", [7], [8, 9]), answered("b", [5], [3, 4])


@pytest.mark.parametrize(
    ("context", "turns", "uncertain", "is_right"),
    [
        ([1, 7, 8, 9], [ONE], [], True),
        ([1, 7, 8, 9, 5, 3, 4], [ONE, OTHER], [], True),
        ([1, 5, 3, 4, 7, 8, 9], [ONE, OTHER], [], True),
        ([1, 5, 3, 4], [ONE, OTHER], [], False),
        ([1], [ONE], [], False),
        ([1, 7, 8, 9, 7, 8, 9], [ONE], [], False),
        ([1, 7, 8, 9], [ONE], [("b", [5])], True),
        ([1, 7, 8, 9, 5, 3, 4], [ONE], [("b", [5])], True),
        ([1, 7, 8, 9, 5, 666, 4], [ONE], [("b", [5])], False),
        ([1, 7, 8, 9, 6, 3, 4], [ONE], [("b", [5])], False),
        ([1], [], [("b", [5])], True),
    ],
)
def test_of_two_turns_at_once_each_that_was_answered_is_there_once(agent, context, turns, uncertain, is_right):
    agent._account("s", [1], context, turns, uncertain, SAMPLING)
    assert (agent._found.problems == []) == is_right


def test_a_session_that_is_not_its_history_is_found_when_it_is_looked_at(agent, monkeypatch):
    agent.contexts["s"] = [1, 2]
    monkeypatch.setattr(agent, "_context", lambda name: [1, 2, 3])
    agent._look("s")
    assert agent._found.problems == ["wrong: s is not its history: 3 tokens, not 2"]


def test_an_error_that_nobody_may_get_is_a_lost_turn(agent, monkeypatch):
    steps = iter([True, False])
    agent._more = lambda: next(steps)

    def begin():
        raise NotFound("it is gone")

    monkeypatch.setattr(agent, "_begin", begin)
    agent.run()
    assert (agent._found.lost, agent._found.problems) == (1, ["lost: begin: NotFound: it is gone"])
