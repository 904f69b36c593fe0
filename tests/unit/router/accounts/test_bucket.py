"""A limit per minute: what may be taken, when more may be, and what its owner is told."""

import pytest

from prefillshare.kvshare.rate_limits import TOKENS, Allowance
from prefillshare.router.accounts.bucket import Bucket


def test_a_minutes_allowance_may_be_used_at_once_and_comes_back_evenly():
    bucket = Bucket(600, now=0)
    assert bucket.missing_s(600, 0) == 0
    bucket.take(600, 0)
    assert bucket.missing_s(100, 0) == pytest.approx(10)
    assert bucket.missing_s(100, 9.5) == pytest.approx(0.5)
    assert bucket.missing_s(100, 10) == 0
    assert bucket.allowance(TOKENS, 30) == Allowance(TOKENS, 600, 300, 30)


def test_it_never_holds_more_than_a_minutes_allowance():
    bucket = Bucket(600, now=0)
    bucket.take(-1000, 1)
    assert bucket.allowance(TOKENS, 10_000) == Allowance(TOKENS, 600, 600, 0)


def test_what_needs_more_than_a_minute_starts_when_all_is_there_and_uses_the_minutes_to_come():
    bucket = Bucket(600, now=0)
    bucket.take(1, 0)
    assert bucket.missing_s(1500, 0) == pytest.approx(0.1)
    assert bucket.missing_s(1500, 0.1) == 0
    bucket.take(1500, 0.1)
    assert bucket.allowance(TOKENS, 0.1).remaining == 0
    assert bucket.missing_s(1, 0.1) == pytest.approx(90.1)
    assert bucket.missing_s(600, 0.1) == pytest.approx(150)


def test_waiting_exactly_as_long_as_told_is_enough():
    bucket = Bucket(7, now=0.1)
    bucket.take(7, 0.1)
    for _ in range(1000):
        now = bucket._at + bucket.missing_s(1, bucket._at)
        assert bucket.missing_s(1, now) == 0
        bucket.take(1, now)
