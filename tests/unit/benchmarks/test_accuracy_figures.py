"""Figures of answers: shares and differences, of one training and of several that differ by seed."""

import random

import pytest

from benchmarks.accuracy.figures import apart, apart_of_seeds, shares, shares_of_seeds

RIGHT, WRONG = [True, True, False, True], [False, True, False, False]


def test_one_seed_is_what_it_is_without_seeds():
    assert shares_of_seeds([RIGHT]) == shares(RIGHT)
    assert apart_of_seeds([RIGHT], [WRONG]) == apart(RIGHT, WRONG)


def test_seeds_are_compared_one_by_one():
    first, second = [RIGHT, WRONG], [WRONG, WRONG]
    assert shares_of_seeds(first)["accuracy"] == 0.5
    assert shares_of_seeds(first)["seeds"] == [0.75, 0.25]
    gap = apart_of_seeds(first, second)
    assert (gap["mean"], gap["seeds"]) == (0.25, [0.5, 0.0])


def test_a_mean_and_its_interval_by_hand():
    # Question means 1, 0.5 (variance 1/8, of 2), seed means 1, 0.5 (1/8, of 2): a standard error of sqrt(1/8).
    found = shares_of_seeds([[True, True], [True, False]])
    assert found["accuracy"] == 0.75
    assert found["high"] - 0.75 == pytest.approx(1.96 * 0.125**0.5)


def test_the_interval_covers_what_differs_between_seeds():
    """Trainings whose shares differ by seed, with a standard deviation of 5 points: of 100 gaps to an equal rival about 95 are
    within the interval; one over the questions of a single seed has fewer."""
    rng, covered, covered_by_one = random.Random(5), 0, 0

    def training():
        share = min(1.0, max(0.0, rng.gauss(0.5, 0.05)))
        return [rng.random() < share for _ in range(400)]

    for _ in range(300):
        first, second = ([training() for _ in range(3)] for _ in range(2))
        gap, one = apart_of_seeds(first, second), apart(first[0], second[0])
        covered += gap["low"] <= 0 <= gap["high"]
        covered_by_one += one["low"] <= 0 <= one["high"]
    assert covered > 0.88 * 300 > covered_by_one
