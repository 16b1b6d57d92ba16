"""What is added up for a group's report."""

from __future__ import annotations

import pytest

from tests.unit.core.processor import family
from unisono.core.idle import IdleReason
from unisono.core.report import Costs, FamilyReport, RunnerFigures
from unisono.core.tally import MOST_REPORTED, ContextTally, FamilyTally, RunnerTally, one_at_a_time_s

# -- Families ----------------------------------------------------------------------------------------------------


def test_how_often_a_prefix_was_computed() -> None:
    """Once where its lane did not hold it; what a lane holds all of, or nearly, costs nothing."""
    tally, rules = FamilyTally(), family(1, 2_000)
    for held in (0, 2_000, 1_800, 1_744, None):
        tally.joined(rules)
        tally.released(rules, held)
    assert tally.report(4.0) == (FamilyReport(prefix_tokens=500, item_count=5, computed=2),)


def test_what_shares_nothing_is_no_family() -> None:
    """Nor is an item by itself; and one that was never part of the group counts nowhere."""
    tally = FamilyTally()
    for _ in range(2):
        tally.joined(None)
        tally.released(None, 0)
    tally.joined(family(1, 2_000))
    tally.released(family(2, 2_000), 0)
    assert tally.report(4.0) == ()


def test_the_largest_families_are_reported() -> None:
    """By items, then by the size of what they share."""
    tally = FamilyTally()
    for key in range(MOST_REPORTED + 20):
        for _ in range(2 + (key == 7)):
            tally.joined(family(key, 400 + key))
    report = tally.report(1.0)
    assert len(report) == MOST_REPORTED
    assert [one.prefix_tokens for one in report[:2]] == [407, 400 + MOST_REPORTED + 19]


def test_items_that_left() -> None:
    """They count no more; where none is left, there is nothing to reuse."""
    tally, rules = FamilyTally(), family(1, 2_000)
    for _ in range(3):
        tally.joined(rules)
    tally.left(rules)
    tally.left(None)
    tally.left(family(2, 2_000))
    assert tally.reusable_tokens(4.0) == 500
    assert [one.item_count for one in tally.report(4.0)] == [2]
    for _ in range(2):
        tally.left(rules)
    assert tally.reusable_tokens(4.0) == 0
    assert tally.report(4.0) == ()


def test_ten_thousand_families_are_counted() -> None:
    """More are passed over: those that are known still grow."""
    tally = FamilyTally()
    for key in range(10_001):
        tally.joined(family(key, 400))
    tally.joined(family(10_000, 400))
    assert tally.report(1.0) == ()
    tally.joined(family(0, 400))
    assert [one.item_count for one in tally.report(1.0)] == [2]


# -- Context -----------------------------------------------------------------------------------------------------


def test_the_most_context_at_one_time() -> None:
    """Who ends as another begins is not counted beside it."""
    tally = ContextTally()
    assert tally.most == 0
    tally.answered(0, 10, 100)
    tally.answered(5, 15, 30)
    tally.answered(10, 20, 60)
    assert tally.most == 130


# -- One at a time -----------------------------------------------------------------------------------------------

COSTS = Costs(pass_s=0.01, token_s=0.002, prompt_token_s=0.001, passes_measured=100, single_stream_token_s=0.012)


def test_one_at_a_time() -> None:
    """Each token in a pass of its own, and all prompts."""
    assert one_at_a_time_s(COSTS, prompt_tokens=500, completion_tokens=100) == pytest.approx(1.7)


@pytest.mark.parametrize(
    "costs",
    [
        None,
        Costs(pass_s=0.01, token_s=0.002, prompt_token_s=0.001, passes_measured=9, single_stream_token_s=None),
        Costs(pass_s=0.01, token_s=0.002, prompt_token_s=None, passes_measured=9, single_stream_token_s=0.012),
    ],
)
def test_what_was_not_measured_is_not_guessed(costs: Costs | None) -> None:
    """Without a single stream or a prompt, there is no answer."""
    assert one_at_a_time_s(costs, prompt_tokens=500, completion_tokens=100) is None


def test_what_one_slot_would_not_compute_again() -> None:
    """Of each family all but the first item's beginning."""
    tally = FamilyTally()
    for key, count in ((1, 3), (2, 1)):
        for _ in range(count):
            tally.joined(family(key, 2_000))
    assert tally.reusable_tokens(4.0) == 1_000


# -- The runner --------------------------------------------------------------------------------------------------


def seen(idle_s: float, deaths: int = 0) -> RunnerFigures:
    """What was seen of a runner so far."""
    return RunnerFigures(idle_s={IdleReason.NOT_READY: idle_s}, deaths=deaths)


def test_of_a_runner_counts_what_was_seen_while_the_group_was_there() -> None:
    """From the first release to the last end; not while all its items were elsewhere."""
    tally = RunnerTally()
    tally.released(seen(1.0, 1), 1_000_000_000)
    tally.released(seen(1.5, 1), 2_000_000_000)
    tally.ended(seen(2.0, 1), 3_000_000_000)
    assert (tally.duration_s, tally.idle_s(4), tally.deaths) == (2.0, {IdleReason.NOT_READY: 1.0}, 0)
    # More came after its last end, and left.
    tally.left(seen(3.0, 2), 4_000_000_000)
    tally.ended(seen(50.0, 9), 40_000_000_000)
    tally.released(seen(60.0, 10), 50_000_000_000)
    assert (tally.duration_s, tally.idle_s(4), tally.deaths) == (3.0, {IdleReason.NOT_READY: 2.0}, 1)
    tally.ended(seen(60.5, 10), 51_000_000_000)
    assert (tally.duration_s, tally.idle_s(4), tally.deaths) == (4.0, {IdleReason.NOT_READY: 2.5}, 1)
    assert tally.last == seen(60.5, 10)
    assert tally.idle_s(0) == {}


def test_of_a_runner_counts_nothing_where_nothing_was_released() -> None:
    """Whatever other groups have seen of it."""
    tally = RunnerTally()
    tally.left(seen(7.0, 3), 1)
    assert (tally.duration_s, tally.idle_s(4), tally.deaths, tally.last) == (None, {}, 0, RunnerFigures())
