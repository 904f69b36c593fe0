"""The log of recent turns: bounded, by tenant, with sessions and chains of calls as lanes."""

import pytest

from prefillshare.kvshare.usage import TurnUsage
from prefillshare.router.telemetry.recent_turns import (
    IN_ALL,
    LEAST,
    MOST,
    NAME_CHARS,
    RecentTurn,
    RecentTurns,
    kept_per_tenant,
)


def turn(request: str = "r", session: str = "", decoder: str = "a") -> RecentTurn:
    return RecentTurn(decoder, "agents", request, session, TurnUsage(prompt_tokens=10))


def test_a_turn_is_told_when_it_begins_while_it_runs_and_once_when_it_has_ended():
    recent = RecentTurns()
    ended = recent.began("", told := turn(), range(10))
    first = recent.since("", 0)
    assert (first.turns, first.revision, first.oldest) == ([told], 1, 1)
    told.usage.completion_tokens = 3
    assert recent.since("", 1).turns == [told]
    assert recent.since("", 1).turns[0].usage.completion_tokens == 3
    ended("ok", 0.5)
    last = recent.since("", 1)
    assert ([one.outcome for one in last.turns], last.revision) == (["ok"], 2)
    assert recent.since("", 2).turns == []


def test_a_reader_of_an_earlier_run_of_the_router_is_told_everything():
    recent = RecentTurns()
    recent.began("", turn(), range(10))("ok", 0.1)
    assert len(recent.since("", 999).turns) == 1
    assert RecentTurns().router != recent.router


def test_no_tenant_is_told_of_anothers_turns_or_of_their_number():
    recent = RecentTurns()
    for number in range(5):
        recent.began("research", turn(session=f"s{number}"), range(10))("ok", 0.1)
    recent.began("support", mine := turn(session="s0"), range(10))
    told = recent.since("support", 0)
    assert (told.turns, told.revision, told.oldest, mine.number) == ([mine], 1, 1, 1)
    assert recent.since("nobody", 0).turns == []


def test_only_the_last_turns_are_kept_and_a_busy_tenant_takes_nobodys_room():
    recent = RecentTurns(kept=3)
    recent.began("quiet", turn("q"), range(10))
    for number in range(5):
        recent.began("busy", turn(f"r{number}"), range(10))
    told = recent.since("busy", 0)
    assert [(one.number, one.request_id) for one in told.turns] == [(3, "r2"), (4, "r3"), (5, "r4")]
    assert told.oldest == 3
    assert [one.request_id for one in recent.since("quiet", 0).turns] == ["q"]


def test_a_turn_that_ends_when_it_is_no_longer_kept_is_not_told():
    recent = RecentTurns(kept=1)
    ended = recent.began("", turn("old"), range(10))
    recent.began("", turn("new"), range(10))
    ended("ok", 9.0)
    assert [one.request_id for one in recent.since("", 0).turns] == ["new"]


@pytest.mark.parametrize(("tenants", "kept"), [(0, MOST), (1, MOST), (64, MOST), (128, 128), (100_000, LEAST)])
def test_many_tenants_share_the_room(tenants, kept):
    assert kept_per_tenant(tenants) == kept
    assert kept * tenants <= IN_ALL or kept == LEAST


def test_with_nothing_kept_nothing_is_told_and_no_prompt_is_looked_at():
    recent = RecentTurns(kept=0)
    recent.began("", turn(), None)("ok", 0.1)
    assert recent.since("", 0).turns == []


def test_names_that_clients_choose_are_cut():
    recent = RecentTurns()
    recent.began("", long := turn("r" * 9_999, "s" * 9_999), range(10))
    assert (len(long.request_id), len(long.session)) == (NAME_CHARS, NAME_CHARS)


def test_sessions_are_lanes_and_calls_without_one_are_on_the_lane_of_the_call_that_they_continue():
    recent, prompt = RecentTurns(), list(range(40))
    made = [turn(session="s"), turn(), turn(), turn(), turn(session="s")]
    for one, seen in zip(made, (prompt, prompt, [*prompt, 7, 8], [9, *prompt], [1]), strict=True):
        recent.began("", one, seen)
    assert [one.lane for one in made] == ["session s", "calls 1", "calls 1", "calls 2", "session s"]


def test_a_prompt_of_a_few_tokens_is_continued_by_nobody():
    recent = RecentTurns()
    made = [turn() for _ in range(5)]
    for one, seen in zip(made, ([1], [1], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]), strict=True):
        recent.began("", one, seen)
    assert [one.lane for one in made] == [f"calls {number}" for number in (1, 2, 3, 4, 4)]
