"""Filter -> Score -> Pick: where a prompt goes, and why."""

import pytest

from prefillshare.kvshare.config.placement import Placement
from prefillshare.kvshare.errors import Unavailable
from prefillshare.router.pools.placement import POLICIES, SCORERS, Call, Candidate, place, reason, score, weights, with_room

PREFILL, DECODE = POLICIES["prefix_aware"]


def chosen(candidates, call, weights=PREFILL):
    return place(candidates, call, weights, "prefill").replica


def test_the_replica_with_the_longest_cached_prefix_is_taken():
    assert chosen([Candidate("a", 32), Candidate("b", 96), Candidate("c")], Call(100)) == "b"


def test_a_busy_replica_keeps_a_prompt_while_its_queue_costs_less_than_the_prefix_saves():
    idle = Candidate("idle")
    assert chosen([Candidate("holder", 800, queued_tokens=700), idle], Call(1000)) == "holder"
    assert chosen([Candidate("holder", 800, queued_tokens=1500), idle], Call(1000)) == "idle"


def test_a_prefix_wanted_by_many_at_once_spreads_over_idle_replicas():
    overlap = {"a": 1000, "b": 0, "c": 0}
    queued = dict.fromkeys(overlap, 0)
    counts = dict.fromkeys(overlap, 0)
    for _ in range(60):  # nothing finishes meanwhile; each brings 200 tokens of its own
        name = chosen([Candidate(n, overlap[n], queued_tokens=queued[n]) for n in overlap], Call(1200))
        queued[name] += 1200 - overlap[name]
        overlap[name] = 1000
        counts[name] += 1
    assert min(counts.values()) >= 15


def test_contexts_nobody_holds_spread_over_the_pools_caches():
    filled = {"a": 5000.0, "b": 100.0, "c": 3000.0}
    assert chosen([Candidate(n, filled_tokens=f) for n, f in filled.items()], Call(500)) == "b"


def test_decode_prefers_base_blocks_among_replicas_equally_busy_but_not_over_an_idle_one():
    busy = [Candidate("holder", 512, active=5), Candidate("other", 0, active=4)]
    assert chosen(busy, Call(512), DECODE) == "holder"
    assert chosen([*busy, Candidate("idle", 0, active=0)], Call(512), DECODE) == "idle"


def test_replicas_without_room_are_passed_over_unless_none_has_any():
    tight, roomy = Candidate("tight", 512, fits=False), Candidate("roomy", 0, active=3)
    assert chosen([tight, roomy], Call(512), DECODE) == "roomy"
    assert with_room([tight]) == [tight]


def test_comparison_policies_do_what_their_names_say():
    prefill = {name: pair[0] for name, pair in POLICIES.items()}
    a, b = Candidate("a", 500, queued_tokens=900), Candidate("b", 0)
    assert chosen([a, b], Call(1000), prefill["least_loaded"]) == "b"
    assert chosen([a, b], Call(1000, last_replica="a"), prefill["session_sticky"]) == "a"
    assert [chosen([a, b], Call(1000, next_replica=n), prefill["round_robin"]) for n in "abab"] == ["a", "b", "a", "b"]


def test_a_session_whose_replica_is_gone_goes_to_the_least_loaded_one():
    sticky = POLICIES["session_sticky"][0]
    assert chosen([Candidate("b", queued_tokens=9), Candidate("c")], Call(10, last_replica="a"), sticky) == "c"


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_is_between_0_and_1_and_1_for_the_best_there_can_be(name):
    best = Candidate("best", 100, 0, 0, 0.0)
    worse = Candidate("worse", 10, 5000, 40, 9000.0)
    values = SCORERS[name]([best, worse], Call(100, last_replica="best", next_replica="best"))
    assert values[0] == 1.0
    assert 0.0 <= values[1] < 1.0
    call = Call(100, last_replica="best", next_replica="best")
    assert score([best, worse], call, {name: 3.0}) == pytest.approx(list(values))


def test_routers_that_see_the_same_choose_the_same_whatever_the_order():
    same = [Candidate("b"), Candidate("a"), Candidate("c")]
    assert chosen(same, Call(10)) == chosen(same[::-1], Call(10)) == "a"


def test_ones_own_weights_replace_the_policys():
    own = Placement(policy="round_robin", decode_weights={"balance": 2.0})
    assert weights(own) == (POLICIES["round_robin"][0], {"balance": 2.0})


def test_no_replica_is_unavailable():
    with pytest.raises(Unavailable, match="no replica of prefill is ready"):
        chosen([], Call(10))


@pytest.mark.parametrize(
    ("overlaps", "weights", "why"),
    [
        ({"a": 64}, PREFILL, "only"),
        ({"a": 64, "b": 32}, PREFILL, "prefix"),
        ({"a": 32, "b": 64}, PREFILL, "load"),
        ({"a": 0, "b": 0}, PREFILL, "spread"),
        ({"a": 32, "b": 64}, POLICIES["round_robin"][0], "policy"),
    ],
)
def test_why_a_replica_was_chosen_is_told(overlaps, weights, why):
    candidates = [Candidate(name, tokens) for name, tokens in overlaps.items()]
    assert reason(candidates[0], candidates, weights) == why
