"""Simple placement: the session's replica, else the least busy one."""

import pytest

from kvshare.errors import Unavailable
from router.placement import place


def test_a_session_stays_with_its_replica_however_busy():
    assert place("prefill", ["a", "b"], {"a": 9}, sticky="a") == "a"


def test_without_a_session_the_least_busy_replica_is_taken():
    assert place("prefill", ["a", "b", "c"], {"a": 2, "b": 1, "c": 1}) == "b"


def test_a_lost_replica_is_replaced():
    assert place("prefill", ["b"], {}, sticky="a") == "b"


def test_no_replica_is_unavailable():
    with pytest.raises(Unavailable, match="no replica of prefill is ready"):
        place("prefill", [], {})
