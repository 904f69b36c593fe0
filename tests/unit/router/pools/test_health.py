"""Ejection of replicas that keep failing, and proof before they return."""

import pytest

from prefillshare.kvshare.errors import ResumeReason
from prefillshare.router.pools.health import Health


@pytest.fixture
def clock():
    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    return Clock()


def eject(health):
    while health.usable:
        health.failed(ResumeReason.UNAVAILABLE)


def test_a_replica_is_ejected_at_the_third_failure_in_a_row(clock):
    health = Health(clock)
    assert [health.failed(ResumeReason.UNAVAILABLE) for _ in range(3)] == [False, False, True]
    assert not health.usable


def test_a_turn_that_succeeds_forgives_earlier_failures(clock):
    health = Health(clock)
    for _ in range(5):
        health.failed(ResumeReason.KV_LOAD_FAILED)
        health.failed(ResumeReason.KV_LOAD_FAILED)
        health.succeeded()
    assert health.usable


def test_a_wedged_replica_is_ejected_at_once(clock):
    health = Health(clock)
    assert health.failed(ResumeReason.WEDGED)
    assert health.reason is ResumeReason.WEDGED


def test_a_replica_whose_engine_is_dead_is_ejected_at_once(clock):
    health = Health(clock)
    assert health.failed(ResumeReason.GONE, for_good=True)
    assert not health.usable


def test_only_a_probe_lets_it_back_in(clock):
    health = Health(clock)
    eject(health)
    clock.now += 3600
    health.succeeded()  # a turn that was still running there
    assert not health.usable
    assert health.probe_due
    health.probed(True)
    assert health.usable


def test_the_pause_doubles_with_every_probe_that_fails_up_to_a_bound(clock):
    health, pauses = Health(clock), []
    eject(health)
    for _ in range(8):
        began = clock.now
        while not health.probe_due:
            clock.now += 0.5
        pauses.append(clock.now - began)
        health.probed(False)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_replica_that_fails_again_after_a_probe_waits_longer(clock):
    health = Health(clock)
    eject(health)
    clock.now += 1
    health.probed(True)
    eject(health)
    clock.now += 1.5
    assert not health.probe_due
    clock.now += 0.5
    assert health.probe_due
