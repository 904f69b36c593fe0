"""The protocol, explored whole at small size: nothing that may never be so can be reached, and each rule is needed for that."""

from functools import partial

import pytest
from protocol import handoffs, holds
from protocol.explorer import Violation, explore

MODELS = {"handoffs": handoffs, "holds": holds}


def explored(model, rules=None):
    steps = partial(model.steps, rules=rules) if rules else model.steps
    return explore(model.World(), steps, model.problem, model.is_at_rest, model.is_fault)


def test_kv_is_right_tokens_come_once_and_nothing_stays_held_whatever_happens_to_two_attempts_of_a_turn():
    found = explored(handoffs)
    assert found.states > 5_000
    ordinary = {"asks", "made", "loads", "read", "token", "last-token", "last-token-lends", "cached", "gives-up", "given-up"}
    assert ordinary | {"late", "released", "token-unheard"} | set(handoffs.FAULTS) == found.happened


@pytest.mark.slow
def test_the_same_with_three_attempts(monkeypatch):
    monkeypatch.setattr(handoffs, "ATTEMPTS", 3)
    assert explored(handoffs).states > 100_000


def test_a_session_takes_each_turn_once_from_the_context_that_it_has_seen_and_is_free_in_the_end():
    found = explored(holds)
    assert found.happened == {
        "begins", "refused", "renews", "commits", "again", "is-too-late", "is-left", "ends", "dies", "hold-ends",
    }  # fmt: skip


#: What goes wrong without each rule.
NEEDED = {
    ("handoffs", "late_reads_are_discarded"): "not the base's",
    ("handoffs", "leased_places_are_kept"): "overwritten under its lease",
    ("handoffs", "leases_end_by_themselves"): "nothing can happen any more",
    ("handoffs", "orphans_are_not_heard"): "more tokens than the response has",
    ("handoffs", "resumes_replay"): "more tokens than the response has",
    ("holds", "a_held_session_is_refused"): "taken away",
    ("holds", "only_the_holder_commits"): "taken away",
    ("holds", "commits_are_marked"): "committed twice",
    ("holds", "holds_end_by_themselves"): "nothing can happen any more",
}


@pytest.mark.parametrize(("model", "rule"), NEEDED, ids=lambda one: one)
def test_without_a_rule_something_goes_wrong(model, rule):
    rules = MODELS[model].Rules(**{rule: False})
    with pytest.raises(Violation, match=NEEDED[model, rule]):
        explored(MODELS[model], rules)


def test_every_rule_is_dropped_once():
    assert {(name, rule) for name, model in MODELS.items() for rule in model.Rules.__dataclass_fields__} == NEEDED.keys()
