"""A call that never returns is not waited for."""

import threading

import pytest

from prefillshare.within import within


def test_what_a_call_returns_or_raises_is_passed_on():
    assert within(5, lambda: 3) == 3
    with pytest.raises(KeyError, match="x"):
        within(5, lambda: {}["x"])


def test_one_that_hangs_is_given_up():
    hangs = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(0.05, lambda: hangs.wait(10))
    hangs.set()
