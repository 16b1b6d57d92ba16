"""What finished items tell of slots: how many held one together, and what those show that waited."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from unisono.core.slot_history import WAIT_S, Held, SlotHistory, Wait


def held(start_s: float, end_s: float, waited_s: float = 0.0, **more: float) -> Held:
    """An item's time in a slot."""
    return Held(start_s=start_s, end_s=end_s, waited_s=waited_s, **more)


def history(*items: Held) -> SlotHistory:
    """A history of these."""
    made = SlotHistory()
    for item in items:
        made.add(item)
    return made


def test_overlap_is_of_one_moment() -> None:
    """Who hands a slot on does not share it, and two that never met are not two at one time."""
    made = history(held(0, 1), held(1, 2), held(0.5, 1.5), held(5, 6))
    assert made.overlap(0, 10) == 2
    assert made.overlap(5, 10) == 1
    assert made.overlap(2.5, 4) == 0
    # An item shorter than what clocks differ by still held a slot.
    assert history(held(0, 0.004)).overlap(0, 1) == 1


def test_overlap_is_what_a_look_at_every_moment_shows() -> None:
    """In whatever order items are told of, and though a clock is set back."""
    chance = random.Random(1)
    made, items = SlotHistory(), []
    for n in range(600):
        start_s = chance.uniform(n, n + 20) - (300 if n > 400 else 0)
        items.append(held(start_s, start_s + chance.choice([0.0, 0.05, 3.0, 30.0])))
        made.add(items[-1])
        from_s = chance.uniform(n - 320, n + 20)
        until_s = from_s + chance.choice([0.0, 1.0, 50.0])
        spans = [
            (max(from_s, min(one.start_s + 0.010, (one.start_s + one.end_s) / 2)), min(until_s, one.end_s))
            for one in items[-512:]
            if one.end_s > from_s
        ]
        seen = [sum(1 for a_s, z_s in spans if a_s <= moment_s < z_s) for moment_s, _ in spans]
        assert made.overlap(from_s, until_s) == max(seen, default=0)


def test_who_is_under_way_need_not_hold_a_slot() -> None:
    """It counts from when it came; only the last so many are looked at."""
    made = history(held(0, 9), held(4, 5), held(6, 7, 5.0), held(7, 8, 2.5))
    assert made.overlap(0, 9) == 2
    assert (made.under_way(4), made.under_way(2), made.under_way(1)) == (4, 2, 1)


def test_only_the_newest_are_looked_at() -> None:
    """Of 500 items, those that ended since the moment that is asked about."""
    looks = 0

    class Watched(Held):
        """Knows when it is looked at."""

        def __getattribute__(self, name: str) -> Any:
            nonlocal looks
            looks += name == "start_s"
            return super().__getattribute__(name)

    made = SlotHistory()
    for n in range(500):
        made.add(Watched(start_s=n, end_s=n + 1.5, waited_s=0.0))
    looks = 0
    assert made.overlap(497.2, 500.0) == 2
    assert looks <= 10


def test_wait_beside_all_is_seen_with_its_hand_over() -> None:
    """Two held a slot; the third began when one of them ended."""
    made = history(held(0, 1), held(0, 3), held(1, 2, 1.0))
    assert made.settle(math.inf) == [Wait(start_s=1, beside=2, is_handed_over=True)]
    assert made.settle(math.inf) == []


def test_nothing_is_judged_before_it_is_settled() -> None:
    """While something is unanswered that was sent before the item began, it may have held a slot."""
    made = history(held(0, 1), held(1, 2, 1.0))
    assert made.settle(0.5) == []
    made.add(held(0, 5))
    assert made.settle(4.0) == [Wait(start_s=1, beside=2, is_handed_over=True)]


def test_slot_that_came_from_nobody_of_ours() -> None:
    """None of ours ended shortly before."""
    (wait,) = history(held(0, 3), held(1, 2, 0.9)).settle(math.inf)
    assert wait == Wait(start_s=1, beside=1, is_handed_over=False)


def test_wait_during_prompts_shows_nothing() -> None:
    """An item whose slot is given may have to wait until the prompts of others are computed."""
    prompts = [held(n, n + 1.2, n, spoke_s=n + 1) for n in range(4)]
    assert history(*prompts).settle(math.inf) == []
    # Between two prompts it would have begun.
    late = held(2.0, 3.2, 2.0, spoke_s=3.0)
    (wait,) = history(held(0, 1.9, spoke_s=1.0), late).settle(math.inf)
    assert wait.beside == 1
    # A stretch that is too short is none.
    late = held(1.0 + WAIT_S / 2, 3.2, 1.0 + WAIT_S / 2, spoke_s=3.0)
    assert history(held(0, 1.001, spoke_s=1.0), late).settle(math.inf) == []
    # Nor do prompts overlap in a way that hides one.
    late = held(3.0, 3.2, 3.0, spoke_s=3.1)
    (wait,) = history(held(0, 3.0, spoke_s=2.0), held(0.5, 3.5, spoke_s=1.0), late).settle(math.inf)
    assert wait.beside == 2


@pytest.mark.parametrize(("waited_s", "is_seen"), [(0.05, False), (0.19, False), (0.5, True)])
def test_pass_under_way_must_end_first(waited_s: float, *, is_seen: bool) -> None:
    """With passes of 100 ms, a wait of less than two is no queue."""
    made = history(held(0, 1, pass_s=0.1), held(1, 2, waited_s, pass_s=0.1))
    assert bool(made.settle(math.inf)) is is_seen
    assert held(1, 2, waited_s, pass_s=0.1).has_waited is is_seen
    # Also where it cannot tell its own passes.
    assert bool(history(held(0, 1, pass_s=0.1), held(1, 2, waited_s)).settle(math.inf)) is is_seen


def test_what_was_missed_makes_blind_for_a_while() -> None:
    """Waits that began before somebody left without telling are passed over, those known and those to come."""
    made = history(held(0, 1), held(1, 2, 1.0))
    made.missed()
    assert made.settle(math.inf) == []
    made.add(held(2, 3, 1.0))
    assert made.settle(math.inf) == []
    made.add(held(4, 5, 1.0))
    assert [wait.start_s for wait in made.settle(math.inf)] == [4]
    made.missed()
    made.clear()
    made.add(held(0, 1))
    made.add(held(1, 2, 0.5))
    assert len(made.settle(math.inf)) == 1


def test_history_is_bounded() -> None:
    """What has no place any more makes blind before its end; unsettled waits are kept up to a number."""
    made = history(held(0, 900), *(held(n, n + 1, 1.0) for n in range(511)))
    assert len(made.settle(-math.inf)) == 0
    made.add(held(511, 512, 1.0))
    assert made.overlap(0, 1000) == 1
    # The long one is forgotten: nothing that waited beside it can be judged.
    assert made.settle(math.inf) == []
    made.add(held(1000, 1001))
    made.add(held(1001, 1002, 1.0))
    assert [wait.start_s for wait in made.settle(math.inf)] == [1001]


def test_only_so_many_waits_are_kept() -> None:
    """The first ones, since they are settled first."""
    made = history(held(0, 1), *(held(n, n + 1, 0.9) for n in range(1, 100)))
    settled = made.settle(math.inf)
    assert [wait.start_s for wait in settled] == list(range(1, 33))
