"""Hundreds of turns on two routers while everything fails that can: nothing is lost, wrong, hanging or left behind."""

import logging

import pytest
from double.soak import soak

SYSTEMS = {"with a prefill pool": {}, "in place": {"in_place": True}, "either way": {"local_prefill": "auto"}}


@pytest.fixture(autouse=True)
def _nothing_is_logged():
    """What is logged of an error is kept until a test ends, and with it all that the error knows."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("system", SYSTEMS)
def test_nothing_is_lost_wrong_hanging_or_left_behind(system):
    found = soak(seed=1, turns=600, **SYSTEMS[system])
    assert found.problems == []
    assert found.is_clean, found
    assert len(found.faults) == 9
    assert found.refused < found.turns / 100


def test_the_same_seed_is_the_same_campaign():
    assert soak(7, 20, warm=20) == soak(7, 20, warm=20)


def test_what_is_wrong_is_found(monkeypatch):
    """One token of another decoder's is enough."""
    from double import system

    right = system.System.expected_of

    def wrong(self, decoder, *more):
        return right(self, "b" if decoder == "a" else decoder, *more)

    monkeypatch.setattr(system.System, "expected_of", wrong)
    found = soak(1, 20, warm=20)
    assert found.wrong
    assert not found.is_clean
