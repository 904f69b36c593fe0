"""The simulation's times and tokens are those one can work out by hand."""

from dataclasses import replace

import pytest

from benchmarks.agents.simulation import CHUNK, Costs, Simulation, Site
from benchmarks.agents.workload import Session, Turn
from prefillshare.kvshare.errors import ConfigError

#: A token a second to prefill, two seconds a step, ten tokens of KV a second, nothing else costs anything.
COSTS = Costs(0.0, 1.0, 0.0, 2.0, 0.0, 0.0, kv_bytes=1, link_bytes_per_s=10.0)
SITE = Site(prefill=1, decode=1, kv_tokens=10_000, block=1)
#: Two agents in turn: 101 tokens, 10 answered; then 20 new ones, 10 answered; ...
SESSION = Session(0, 100, (Turn(0, 1, 10), Turn(1, 20, 10, pause_s=1000.0), Turn(0, 20, 10, pause_s=1000.0)))


def play(mode, sessions=(SESSION,), site=SITE, costs=COSTS):
    return Simulation(mode, site, costs).run(list(sessions))


def test_a_turn_takes_prefill_transfer_and_its_steps():
    first = play("prefillshare")[0]
    assert first.asked_s == 0
    assert first.token_s[0] == pytest.approx(100 + 100 / 10 + 2)  # 100 of 101 tokens are handed over
    assert first.end_s == pytest.approx(100 + 10 + 10 * 2)
    assert (first.cost.cached_tokens, first.cost.computed_tokens, first.cost.kv_bytes) == (0, 100, 100)


@pytest.mark.parametrize(
    ("mode", "eager", "computed"),
    # Context: 101 + 10 = 111 tokens, then 131 + 10 = 141, then 161. Handed over: 100, 130, 160.
    [("prefillshare", False, [100, 30, 30]), ("prefillshare", True, [100, 20, 20]), ("icarus", True, [100, 20, 20]),
     ("none", True, [100, 130, 60])],
)  # fmt: skip
def test_what_a_turn_computes_is_what_its_mode_does_not_keep(mode, eager, computed):
    records = play(mode, site=replace(SITE, eager_prefill=eager))
    assert [record.cost.computed_tokens for record in records] == computed


def test_only_what_the_decode_side_lacks_is_moved():
    moved = [record.cost.kv_bytes for record in play("icarus")]
    assert moved == [100, 20, 20]  # all that was generated there is there
    moved = [record.cost.kv_bytes for record in play("prefillshare")]
    assert moved == [100, 30, 30]  # the prompt is, what was generated is not


def test_requests_of_a_batch_share_steps():
    costs = replace(COSTS, step_request_s=0.5, link_bytes_per_s=1e9, prefill_token_s=0.0)
    together = play("prefillshare", [Session(n, 100, (Turn(0, 1, 10),)) for n in range(3)], costs=costs)
    assert [record.end_s for record in together] == pytest.approx([10 * (2 + 3 * 0.5)] * 3, abs=1e-3)


def test_a_request_that_comes_later_slows_the_others_from_then_on():
    costs = replace(COSTS, step_s=0.0, step_request_s=1.0, link_bytes_per_s=1e9, prefill_token_s=0.0)
    early, late = play(
        "prefillshare", [Session(0, 9, (Turn(0, 1, 10),)), Session(1, 9, (Turn(0, 1, 10),), arrival_s=5.0)], costs=costs
    )
    assert early.end_s == pytest.approx(5 + 5 * 2, abs=1e-3)
    assert late.end_s == pytest.approx(5 + 5 * 2 + 5 * 1, abs=1e-3)


def test_a_cache_gives_up_what_was_not_asked_for_longest():
    site = replace(SITE, kv_tokens=250)
    first, again = Session(0, 100, (Turn(0, 1, 1), Turn(0, 1, 1, pause_s=5000.0))), Session(1, 120, (Turn(0, 1, 1),), 1000.0)
    assert [r.cost.computed_tokens for r in play("prefillshare", [first, again], site)] == [100, 1, 120]
    third = Session(2, 120, (Turn(0, 1, 1),), 2000.0)
    assert [r.cost.computed_tokens for r in play("prefillshare", [first, again, third], site)] == [100, 102, 120, 120]


def test_sessions_spread_over_replicas_and_stay_where_their_context_is():
    sessions = [Session(n, 100, (Turn(0, 1, 5), Turn(1, 1, 5, pause_s=50.0))) for n in range(4)]
    records = play("prefillshare", sessions, replace(SITE, prefill=4, decode=4))
    assert [r.ttft_s for r in records[::2]] == pytest.approx([112.0] * 4)  # side by side
    assert [r.cost.computed_tokens for r in records[1::2]] == [1] * 4


def test_a_request_waits_for_room():
    site = replace(SITE, kv_tokens=150, eager_prefill=False)
    one, other = play("prefillshare", [Session(n, 100, (Turn(0, 1, 10),)) for n in range(2)], site)
    assert one.end_s == pytest.approx(130.0)
    assert other.end_s == pytest.approx(130.0 + 130.0)


def test_own_layers_are_computed_at_the_decode_side():
    shared, own = (play(mode, costs=replace(COSTS, own_layers=0.25))[0].ttft_s for mode in ("prefillshare", "droidspeak"))
    assert own - shared == pytest.approx(0.25 * 100)


def test_large_pools_are_placed_by_the_products_shortlist():
    sessions = [Session(n, 64, (Turn(0, 1, 4), Turn(1, 8, 4)), arrival_s=0.1 * n) for n in range(200)]
    records = play("prefillshare", sessions, Site(prefill=50, decode=200, kv_tokens=4096))
    assert len(records) == 400
    assert all(record.cost.cached_tokens >= 64 for record in records[1::2])


def test_a_closed_loop_begins_a_session_when_another_has_ended():
    sessions = [Session(n, 100, (Turn(0, 1, 10),)) for n in range(3)]
    site = replace(SITE, prefill=3, decode=3, eager_prefill=False)
    records = Simulation("prefillshare", site, COSTS).run(sessions, at_once=1)
    assert [record.asked_s for record in records] == pytest.approx([0.0, 130.0, 260.0])


def test_a_turn_that_comes_at_once_waits_for_the_pull_of_the_response():
    records = play("icarus", [Session(0, 100, (Turn(0, 1, 10), Turn(1, 20, 10)))])
    assert records[1].cost.computed_tokens == 20
    assert records[1].ttft_s == pytest.approx(10 / 10 + 20 + 20 / 10 + 2)  # pull, prefill, transfer, step


ONE_ENGINE = replace(SITE, prefill=0)


def test_one_engine_computes_a_prompt_and_moves_nothing():
    first = play("prefillshare", site=ONE_ENGINE)[0]
    assert first.token_s[0] == pytest.approx(100 + 2)
    assert first.end_s == pytest.approx(100 + 10 * 2)
    assert (first.cost.cached_tokens, first.cost.computed_tokens, first.cost.kv_bytes) == (0, 100, 0)


@pytest.mark.parametrize(
    ("mode", "computed"), [("prefillshare", [100, 20, 20]), ("icarus", [100, 20, 20]), ("none", [100, 130, 50])]
)
def test_one_engine_computes_what_its_mode_does_not_keep(mode, computed):
    assert [record.cost.computed_tokens for record in play(mode, site=ONE_ENGINE)] == computed


def test_a_prompt_holds_up_the_responses_that_run_beside_it():
    sessions = [Session(0, 10, (Turn(0, 1, 10),)), Session(1, 50, (Turn(0, 1, 10),), arrival_s=11.0)]
    early, late = play("prefillshare", sessions, ONE_ENGINE)
    # 10 s of prompt, half a step, one of 52 s with the other prompt, then both run side by side.
    assert early.end_s == pytest.approx(10 + 1 + (50 + 2) + 8.5 * 2)
    assert late.token_s[0] == pytest.approx(10 + 1 + (50 + 2) + 2)


def test_long_prompts_are_computed_in_parts():
    sessions = [Session(0, 10, (Turn(0, 1, 10),)), Session(1, 3 * CHUNK, (Turn(0, 1, 1),), arrival_s=11.0)]
    early, _ = play("prefillshare", sessions, replace(ONE_ENGINE, eager_prefill=False))
    assert early.end_s == pytest.approx(10 + 1 + 3 * (CHUNK + 2) + 6.5 * 2)


def test_layers_of_ones_own_need_a_prefill_pool():
    with pytest.raises(ConfigError, match="droidspeak needs a prefill pool"):
        play("droidspeak", site=ONE_ENGINE)
