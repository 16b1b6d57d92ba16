"""How many passes a family takes on so many lanes."""

from __future__ import annotations

import heapq
import random

import pytest

from unisono.core.makespan import grain, passes


def longest_first(lengths: list[int], busy: list[float]) -> float:
    """What it is for, done: the longest first, each to the lane that is free first."""
    lanes = list(busy)
    heapq.heapify(lanes)
    ends = [heapq.heapreplace(lanes, lanes[0] + length) + length for length in sorted(lengths, reverse=True)]
    return max(ends)


@pytest.mark.parametrize(("lanes", "rounds"), [(1, 16), (2, 8), (3, 6), (4, 4), (5, 4), (6, 3), (7, 3), (8, 2)])
def test_equal_answers_go_in_rounds(lanes: int, rounds: int) -> None:
    """Sixteen answers take as many passes on seven lanes as on six: a third round for the last."""
    assert passes(16 * 24, 24, grain(24, 0), [0.0] * lanes) == rounds * 24


def test_equal_answers_fill_lanes_that_have_other_work() -> None:
    """As if each went to the lane that is free first."""
    rng = random.Random(1)
    for _ in range(300):
        busy = [float(rng.choice([0, 0, rng.randint(1, 90)])) for _ in range(rng.randint(1, 9))]
        lengths = [rng.randint(1, 40)] * rng.randint(1, 30)
        done = passes(sum(lengths), lengths[0], grain(lengths[0], 0), busy)
        assert done == pytest.approx(longest_first(lengths, busy))


def test_different_answers_fill_each_others_gaps() -> None:
    """Then it is the level, or the longest; never more than the shortest piece from the truth."""
    rng = random.Random(2)
    for _ in range(300):
        busy = [float(rng.choice([0, rng.randint(1, 90)])) for _ in range(rng.randint(1, 9))]
        lengths = [min(200, int(6 * rng.paretovariate(0.9))) for _ in range(60)]
        mean = sum(lengths) / 60
        deviation = (sum(length**2 for length in lengths) / 60 - mean**2) ** 0.5
        assert grain(mean, deviation) == 0
        done = passes(sum(lengths), max(lengths), 0, busy)
        assert longest_first(lengths, busy) - max(lengths) <= done <= longest_first(lengths, busy) * 1.001


def test_the_longest_goes_somewhere() -> None:
    """However many lanes there are, and however little else there is to do."""
    assert passes(100, 90, 0, [10.0, 0.0, 0.0]) == 90


def test_nothing_to_do_takes_no_pass() -> None:
    """Whatever the lanes do otherwise."""
    assert passes(0, 0, 0, [10.0, 20.0]) == 0


def test_pieces_are_as_fine_as_answers_differ() -> None:
    """Equal ones come whole; ones that differ by a quarter in halves; others are as good as water."""
    assert grain(24, 0) == 24
    assert grain(24, 6) == 12
    assert grain(24, 11) == 0
    assert grain(24, 30) == 0
