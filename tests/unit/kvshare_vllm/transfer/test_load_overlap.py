"""When beginning early is worth the step that it costs."""

from __future__ import annotations

import pytest

from prefillshare.kvshare_vllm.transfer.load_overlap import LoadOverlap


def overlap(step_s: float = 0.05, bytes_per_s: float = 1e9, begin: str = "pays") -> LoadOverlap:
    made = LoadOverlap(begin)
    made.stepped({"a": 512}, 0.0)
    made.stepped({"a": 1}, step_s)
    made.loaded(int(bytes_per_s), 1.0)
    return made


def test_a_load_longer_than_two_steps_is_worth_it():
    assert overlap().begins(101_000_000)
    assert not overlap().begins(99_000_000)


def test_it_may_be_settled_beforehand():
    assert not overlap(begin="never").begins(10**12)
    assert LoadOverlap("always").begins(1)
    with pytest.raises(ValueError, match="'maybe'; use pays, always or never"):
        LoadOverlap("maybe")


def test_nothing_pays_while_steps_or_loads_are_unknown():
    unknown = LoadOverlap()
    unknown.loaded(1000, 1.0)
    assert not unknown.begins(10**12)
    unknown = LoadOverlap()
    unknown.stepped({"a": 1}, 0.0)
    unknown.stepped({"a": 1}, 1.0)
    assert not unknown.begins(10**12)


def test_only_steps_that_decode_and_follow_one_of_the_same_requests_are_timed():
    seen = overlap(step_s=0.05)
    seen.stepped({"a": 512}, 100.0)  # a prompt
    seen.stepped({"b": 1}, 200.0)  # the engine was idle before
    seen.stepped({}, 300.0)
    assert seen.begins(101_000_000)
    assert not seen.begins(99_000_000)
    seen.stepped({"a": 1}, 400.0)
    seen.stepped({"a": 1}, 450.0)
    assert not seen.begins(101_000_000)


def test_the_best_rate_counts_until_it_is_long_ago():
    seen = overlap(bytes_per_s=1e9)
    seen.loaded(1_000_000, 1.0)  # timed by a long step
    assert not seen.begins(95_000_000)
    for _ in range(200):
        seen.loaded(1_000_000, 1.0)
    assert seen.begins(95_000_000)


def test_what_was_empty_says_nothing_of_the_rate():
    seen = overlap(bytes_per_s=1e9)
    for _ in range(200):
        seen.loaded(0, 1.0)
    assert not seen.begins(99_000_000)
