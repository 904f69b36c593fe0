"""A conversation without a session is found again by its tokens: by its own tenant, in its own domain, and as long as it is
among the latest."""

from prefillshare.kvshare.caller import Caller
from prefillshare.router.sessions.open_contexts import OpenContexts

BLOCK = 4
ME, OTHER = Caller("me", "me"), Caller("other", "other")


def ids(n: int) -> list[int]:
    return list(range(1, n + 1))


def contexts(limit: int = 10) -> OpenContexts:
    return OpenContexts(BLOCK, limit)


def test_a_call_that_begins_with_it_goes_on_with_it():
    known, salt = contexts(), None
    first = known.of(ids(6), ME, salt)
    known.went_on(first, ids(10), ME, salt)
    assert known.of(ids(14), ME, salt) is first
    assert known.of(ids(8), ME, salt) is first
    assert known.of([*ids(7), 99, 100], ME, salt) is not first, "its second block is another"


def test_the_longest_beginning_counts():
    known = contexts()
    short, long = known.of(ids(4), ME, None), known.of(ids(4), ME, None)
    known.went_on(short, ids(4), ME, None)
    known.went_on(long, ids(8), ME, None)
    assert known.of(ids(9), ME, None) is long
    assert known.of([*ids(4), 50, 51, 52, 53], ME, None) is short


def test_nobody_else_finds_it():
    known = contexts()
    mine = known.of(ids(8), ME, None)
    known.went_on(mine, ids(8), ME, None)
    for caller, salt in ((OTHER, None), (Caller("me", "shared"), None), (ME, "salt")):
        assert known.of(ids(9), caller, salt) is not mine


def test_less_than_a_block_is_not_noted_and_the_oldest_is_forgotten():
    known = contexts(limit=2)
    for number in range(3):
        known.went_on(known.of([number] * 8, ME, None), [number] * 8, ME, None)
        known.went_on(known.of([number], ME, None), [number], ME, None)
    names = [known.of([number] * 9, ME, None) for number in range(3)]
    assert [name is known.of([number] * 10, ME, None) for number, name in enumerate(names)] == [False, True, True]
