"""Sessions in memory: bounded, forgotten in time, one turn at once, changed only by turns that end well."""

import pytest

from kvshare.errors import Conflict, InvalidInput, NotFound, Overloaded
from router.sessions import SessionStore


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    return SessionStore(max_sessions=2, ttl_s=10, clock=clock)


def test_a_turn_extends_the_context_and_counts(store):
    store.create("s", [1, 2])
    with store.turn("s") as session:
        store.commit(session, [1, 2, 3], open_response=True)
    session = store.get("s")
    assert (session.token_ids, session.turns, session.open_response, session.busy) == ((1, 2, 3), 1, True, False)


def test_a_second_turn_meanwhile_is_a_conflict_and_the_first_goes_on(store):
    store.create("s")
    with store.turn("s"):
        with pytest.raises(Conflict, match="another turn runs on session 's'"), store.turn("s"):
            pass
        assert store.get("s").busy
    with store.turn("s"):
        pass


def test_a_turn_that_fails_leaves_the_session_free_and_unchanged(store):
    store.create("s", [1])
    with pytest.raises(RuntimeError), store.turn("s"):
        raise RuntimeError
    assert (store.get("s").token_ids, store.get("s").busy) == ((1,), False)


def test_a_session_deleted_during_its_turn_is_not_brought_back(store):
    store.create("s")
    with store.turn("s") as session:
        store.delete("s")
        with pytest.raises(Conflict, match="deleted during the turn"):
            store.commit(session, [1], open_response=False)
    with pytest.raises(NotFound):
        store.get("s")


def test_a_fork_shares_the_context_and_then_goes_its_own_way(store):
    old = store.create("s", [1, 2])
    old.prefilled_on["prefill"] = "r1"
    new = store.fork("s", "t")
    store.commit(new, [1, 2, 9], open_response=False)
    assert (old.token_ids, new.token_ids, new.prefilled_on) == ((1, 2), (1, 2, 9), {"prefill": "r1"})
    assert new.prefilled_on is not old.prefilled_on


def test_sessions_are_forgotten_after_their_time_but_not_while_busy(store, clock):
    store.create("idle")
    store.create("busy")
    with store.turn("busy"):
        clock.now = 10.5
        assert len(store) == 1
        with pytest.raises(NotFound, match="unused for 10 s"):
            store.get("idle")
    assert store.expires_in_s(store.get("busy")) == 10


def test_a_long_turn_holds_up_nobody_elses_expiry_and_renews_its_own(store, clock):
    store.create("long")
    with store.turn("long"):
        store.create("idle")
        clock.now = 30.0
        assert len(store) == 1
    assert store.expires_in_s(store.get("long")) == 10


def test_use_renews_a_session(store, clock):
    store.create("s")
    for clock.now in (6.0, 12.0, 18.0):
        store.get("s")
    assert len(store) == 1


def test_a_full_store_refuses_with_a_retry_hint_and_a_taken_name_is_a_conflict(store):
    store.create("a")
    with pytest.raises(Conflict, match="exists already"):
        store.create("a")
    store.create("b")
    with pytest.raises(Overloaded) as raised:
        store.create("c")
    assert raised.value.retry_after_s == 10


def test_names_have_a_limit_and_are_made_up_where_none_is_given(store):
    with pytest.raises(InvalidInput, match="129 characters"):
        store.create("x" * 129)
    assert len(store.create().session_id) == 32
