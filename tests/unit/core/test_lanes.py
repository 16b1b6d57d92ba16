"""What is believed of a runner's slots: who sits where, what each holds, and which one a request gets."""

from __future__ import annotations

import pytest

from tests.unit.core.processor import family
from unisono.core.lanes import Lane, Lanes
from unisono.core.prefixes import Prefix

# Two that begin alike, and one by itself.
RULES = Prefix(1, (10, 11), (600, 2_000))
ORDERS = Prefix(2, (10, 12), (600, 1_800))
OTHER = family(3, 2_000)


def lanes_of(*held: Prefix | None) -> Lanes:
    """A lane for each of these, used in this order."""
    lanes = Lanes()
    lanes.resize(len(held))
    for ticket, (lane, prefix) in enumerate(zip(lanes.all, held, strict=True)):
        _ = lanes.sit(lane, ticket, prefix, lane.holds)
        lanes.stand_up(lane)
    return lanes


def numbers(lanes: Lanes) -> list[int]:
    """The lanes that there are."""
    return [lane.number for lane in lanes.all]


# -- Which one it gets -------------------------------------------------------------------------------------------


def test_the_lane_that_holds_its_prefix() -> None:
    """However recently that one was used."""
    lanes = lanes_of(None, OTHER, RULES)
    assert lanes.choose(RULES, 2_400, lanes.open()).number == 2
    assert lanes.choose(OTHER, 2_400, lanes.open()).number == 1


def test_the_lane_that_holds_most() -> None:
    """Of two that begin like it, the one with more in common."""
    lanes = lanes_of(ORDERS, RULES)
    assert lanes.choose(RULES, 2_400, lanes.open()).number == 1


@pytest.mark.parametrize(("prompt_bytes", "number"), [(5_999, 1), (6_000, 0)])
def test_a_tenth_of_the_prompt_must_be_alike(prompt_bytes: int, number: int) -> None:
    """For less than that, the slot that was used least recently is taken."""
    lanes = lanes_of(None, ORDERS)
    assert lanes.choose(RULES, prompt_bytes, lanes.open()).number == number


def test_the_least_recently_used_for_what_shares_nothing() -> None:
    """Coming and going both count as use."""
    lanes = lanes_of(OTHER, RULES, None)
    assert lanes.choose(None, 100, lanes.open()).number == 0
    _ = lanes.sit(lanes.all[0], 7, None, None)
    lanes.stand_up(lanes.all[0])
    assert lanes.choose(None, 100, lanes.open()).number == 1
    assert [lane.number for lane in lanes.open()] == [1, 2, 0]


def test_taken_lanes_are_not_open() -> None:
    """Nor one whose successor is decided."""
    lanes = lanes_of(None, None, None)
    _ = lanes.sit(lanes.all[0], 7, None, None)
    lanes.all[1].successor = 8
    assert [lane.number for lane in lanes.open()] == [2]


# -- What they hold ----------------------------------------------------------------------------------------------


def test_who_sits_down_is_told_what_it_finds() -> None:
    """The bytes of its beginning that were there before it came; afterwards, all of it is there."""
    lanes = lanes_of(ORDERS, None)
    first, second = lanes.all
    assert lanes.sit(first, 7, RULES, first.holds) == 600
    assert lanes.sit(second, 8, RULES, second.holds) == 0
    assert (first.ticket, first.holds, second.holds) == (7, RULES, RULES)


def test_the_most_that_any_lane_holds() -> None:
    """It is 0 for what nobody holds, and for what shares nothing."""
    lanes = lanes_of(ORDERS, None)
    assert lanes.best_held(RULES) == 600
    assert lanes.best_held(ORDERS) == 1_800
    assert lanes.best_held(OTHER) == 0
    assert lanes.best_held(None) == 0


def test_one_that_lets_go_does_not_speak_for_another() -> None:
    """A prefix is held until the last lane that holds it has something else."""
    lanes = lanes_of(RULES, RULES)
    lanes.hold(lanes.all[0], OTHER)
    assert lanes.best_held(RULES) == 2_000
    lanes.hold(lanes.all[1], ORDERS)
    assert lanes.best_held(RULES) == 600
    lanes.hold(lanes.all[1], None)
    assert lanes.best_held(RULES) == 0


def test_a_runner_that_is_loaded_anew_holds_nothing() -> None:
    """Nor does what a lane held before a decision come back when that is taken back."""
    lanes = lanes_of(RULES, OTHER)
    lanes.all[0].before = OTHER
    lanes.forget()
    assert [(lane.holds, lane.before) for lane in lanes.all] == [(None, None)] * 2
    assert lanes.best_held(RULES) == lanes.best_held(OTHER) == 0


# -- How many ----------------------------------------------------------------------------------------------------


def test_fewer_lanes_give_up_what_holds_nothing_first() -> None:
    """Then what was used least recently; and what they held is forgotten."""
    lanes = lanes_of(RULES, OTHER, None, ORDERS)
    lanes.resize(3)
    assert numbers(lanes) == [0, 1, 3]
    lanes.resize(1)
    assert numbers(lanes) == [3]
    assert lanes.best_held(OTHER) == 0


def test_a_lane_that_is_taken_stays_until_it_is_free() -> None:
    """And so does one that is about to be."""
    lanes = lanes_of(None, None, None)
    _ = lanes.sit(lanes.all[0], 7, None, None)
    lanes.all[2].successor = 8
    lanes.resize(1)
    assert numbers(lanes) == [0, 2]
    lanes.all[1].successor = None
    lanes.resize(1)
    assert numbers(lanes) == [0]


def test_new_lanes_take_the_numbers_that_are_free() -> None:
    """A lane's number names one lane."""
    lanes = lanes_of(None, RULES, None)
    lanes.resize(1)
    assert numbers(lanes) == [1]
    lanes.resize(4)
    assert sorted(numbers(lanes)) == [0, 1, 2, 3]
    assert lanes.all[0] == next(lane for lane in lanes.all if lane.number == 1)
    assert isinstance(lanes.all[0], Lane)
