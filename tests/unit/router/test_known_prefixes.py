"""A prompt finds the longest known prefix that it begins with: whoever asks finds only its own, and memory is bounded."""

import array

from prefillshare.router.known_prefixes import KnownPrefixes

PROMPT = list(range(100, 200))


def known(*prefixes: list[int], limit: int = 8) -> KnownPrefixes:
    """Each prefix's value is its number, from 0 on."""
    made = KnownPrefixes(limit)
    for number, prefix in enumerate(prefixes):
        made.note(prefix, number)
    return made


def test_a_prompt_finds_a_prefix_if_it_begins_with_all_of_it():
    prefixes = known(PROMPT)
    assert [prefixes.longest(prompt) for prompt in (PROMPT, [*PROMPT, 1, 2], [*PROMPT, 3])] == [0, 0, 0]
    assert prefixes.longest(PROMPT[:-1]) is None, "a shorter prompt"
    assert prefixes.longest([*PROMPT[:50], 0, *PROMPT[51:], 4]) is None, "its middle is another"
    assert prefixes.longest([]) is None


def test_of_several_the_longest_counts_and_the_last_value_noted():
    prefixes = known([9, 8, 7, 6], [1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 4])
    assert [prefixes.longest([9, 8, 7, 6, *rest]) for rest in ([], [5], [5, 4], [5, 4, 3])] == [0, 0, 2, 2]
    prefixes.note([9, 8, 7, 6, 5, 4], 3)
    assert prefixes.longest([9, 8, 7, 6, 5, 4, 3]) == 3


def test_whoever_asks_finds_and_looks_through_only_its_own():
    prefixes = known(PROMPT)
    prefixes.note(PROMPT[:5], 1, whose=("other", None))
    assert prefixes.longest(PROMPT, whose=("other", None)) == 1
    assert prefixes.longest(PROMPT, whose=("other", "salt")) is None
    assert {whose: list(lengths) for whose, lengths in prefixes._lengths.items()} == {(): [100], ("other", None): [5]}


def test_only_the_last_are_known_and_those_that_are_found_stay():
    prefixes, first = known([1, 2, 3, 4], limit=3), [1, 2, 3, 4]
    for number in range(10):
        assert prefixes.longest([*first, number]) == 0
        prefixes.note([50 + number] * (5 + number), number, whose=(number,))
    assert len(prefixes._values) == sum(lengths.total() for lengths in prefixes._lengths.values()) == 3
    assert set(prefixes._lengths) == {(), (8,), (9,)}


def test_nothing_of_a_prompt_can_be_read_from_what_is_kept():
    (_, length, first), (_, _, second) = (next(iter(known(PROMPT)._values)) for _ in range(2))
    assert length == len(PROMPT)
    assert first != second, "the digest is keyed"
    assert array.array("Q", PROMPT[:2]).tobytes() not in first
