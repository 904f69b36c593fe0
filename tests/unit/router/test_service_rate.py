"""Measured rates and usual times: what they say before, during and long after they are fed."""

import pytest

from prefillshare.router.service_rate import LEAST_BACKLOG_S, MEMORY_S, DrainRate, MeanRatio, UsualTime


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def drain(rate, clock, seconds, per_s, step=0.5):
    for _ in range(int(seconds / step)):
        clock.now += step
        rate.done(per_s * step)


def test_a_mean_weighs_what_is_old_less(clock):
    mean = MeanRatio(clock)
    assert mean.value is None
    mean.add(10, 1)
    assert mean.value == 10
    clock.now += MEMORY_S
    mean.add(20, 1)
    assert mean.value == pytest.approx((10 / 2.71828 + 20) / (1 / 2.71828 + 1), rel=1e-4)


def test_a_rate_is_measured_only_while_turns_wait(clock):
    rate = DrainRate(clock)
    drain(rate, clock, 100, per_s=1)  # quiet: nobody waits
    assert rate.per_s is None
    assert rate.seconds_for(1000) == 0
    rate.backlog(True)
    drain(rate, clock, 10, per_s=50)
    assert rate.per_s == pytest.approx(50)
    assert rate.seconds_for(1000) == pytest.approx(20)
    assert rate.seconds_for(-5) == 0
    rate.backlog(False)
    drain(rate, clock, 5, per_s=1)
    assert rate.per_s == pytest.approx(50)


def test_a_rate_follows_a_change_within_its_memory(clock):
    rate = DrainRate(clock)
    rate.backlog(True)
    drain(rate, clock, 60, per_s=100)
    drain(rate, clock, MEMORY_S, per_s=10)
    assert rate.per_s == pytest.approx(10 + 90 / 2.71828, rel=0.05)
    drain(rate, clock, 5 * MEMORY_S, per_s=10)
    assert rate.per_s == pytest.approx(10, rel=0.1)


def test_engines_that_finish_nothing_are_seen_while_turns_wait(clock):
    rate = DrainRate(clock)
    rate.backlog(True)
    drain(rate, clock, 60, per_s=100)
    clock.now += 3 * MEMORY_S
    assert rate.per_s < 7


def test_a_rate_needs_some_backlog_to_be_believed_and_is_forgotten_after_a_minute_without(clock):
    rate = DrainRate(clock)
    rate.backlog(True)
    drain(rate, clock, LEAST_BACKLOG_S / 2, per_s=1)
    assert rate.per_s is None
    drain(rate, clock, 60, per_s=1)
    rate.backlog(False)
    clock.now += 30
    assert rate.per_s == pytest.approx(1)
    clock.now += 30
    assert rate.per_s is None


def test_usual_time_is_what_most_take(clock):
    usual = UsualTime(clock)
    assert usual.value == 0
    for value in range(1, 101):
        usual.add(value / 10)
    assert usual.value == pytest.approx(5.05 + 1.3 * 2.887, rel=1e-3)
    assert 0.85 < sum(value / 10 <= usual.value for value in range(1, 101)) / 100 < 0.95
