"""What is learned of a runner's slots, step by step. Whole worlds are in test_capacity_worlds.py."""

from __future__ import annotations

import pytest

from unisono.core.capacity import (
    FIRST_LIMIT,
    FIRST_PROBE,
    LAST_PROBE,
    PROVEN_FALLS,
    REMEMBERED_FALLS,
    SHORT_WAITS,
    WAIT_S,
    Capacity,
    Held,
    SlotMemo,
)
from unisono.core.model import Slots, SlotSource


def held(start_s: float, end_s: float, waited_s: float = 0.0) -> Held:
    """An item's time in a slot."""
    return Held(start_s=start_s, end_s=end_s, waited_s=waited_s)


class Turns:
    """A server that answers items of a second each, or so, in rounds, as many at a time as it has slots."""

    def __init__(self, capacity: Capacity, *, item_s: float = 1.0) -> None:
        self.capacity = capacity
        self.item_s = item_s
        self.now_s = 0.0

    def round(self, count: int, *, waited_s: float = 0.0) -> Turns:
        """So many at a time, which had waited for those of the round before."""
        for _ in range(count):
            self.capacity.observe(held(self.now_s, self.now_s + self.item_s, waited_s))
        self.now_s += self.item_s
        return self

    def rounds(self, number: int, count: int, *, waited_s: float = 0.9) -> Turns:
        """Several rounds of items that wait."""
        for _ in range(number):
            _ = self.round(count, waited_s=waited_s)
        return self


def learned(count: int) -> Turns:
    """A capacity that has learned a number, and where its server is in time."""
    turns = Turns(Capacity()).round(count).rounds(1 + -(-2 // count), count)
    assert turns.capacity.slots == Slots(count=count, source=SlotSource.LEARNED)
    return turns


# -- While nothing is known --------------------------------------------------------------------------------------


def test_begins_at_eight() -> None:
    """While nothing is known, eight may be in flight, or what the ceiling allows."""
    assert Capacity().limit == FIRST_LIMIT == 8
    assert Capacity(ceiling=3).limit == 3
    assert Capacity(ceiling=0).limit == 1
    assert Capacity().slots == Slots(count=0, source=SlotSource.UNKNOWN)
    assert (Capacity().at_least, Capacity().memory) == (0, None)


def test_limit_doubles_after_as_many_as_it_ended_without_waiting() -> None:
    """Eight items that did not wait double the limit, seven do not; the ceiling is never passed."""
    turns = Turns(Capacity(ceiling=20)).round(7)
    assert turns.capacity.limit == 8
    turns.round(1)
    assert turns.capacity.limit == 16
    turns.round(15)
    assert turns.capacity.limit == 16
    turns.round(1)
    assert turns.capacity.limit == 20
    turns.round(20)
    assert turns.capacity.limit == 20


@pytest.mark.parametrize(("together", "limit"), [(1, 8), (5, 8), (6, 16), (11, 16), (12, 32)])
def test_limit_doubles_only_where_about_as_many_held_a_slot(together: int, limit: int) -> None:
    """However many do not wait: of few at a time, nobody would have to."""
    turns = Turns(Capacity())
    for _ in range(40):
        turns.round(together)
    assert turns.capacity.limit == limit


def test_who_waits_for_a_prompt_is_there_too() -> None:
    """Six are at the backend together, though only one of them at a time seems to hold a slot."""
    capacity = Capacity()
    for n in range(8):
        capacity.observe(held(0.004 * n, 0.004 * (n + 1), waited_s=0.004 * min(n, 5)))
    assert (capacity.at_least, capacity.limit) == (1, 16)


def test_limit_goes_not_far_beyond_what_was_seen_to_hold_a_slot() -> None:
    """Answers of a token: on four slots nobody waits long enough to show it, however many there are."""
    capacity = Capacity()
    for wave in range(400):
        for n in range(capacity.limit):
            begin_s = wave + 0.004 * (n // 4)
            capacity.observe(held(begin_s, begin_s + 0.004, waited_s=0.004 * (n // 4)))
    assert (capacity.at_least, capacity.limit) == (4, 16)


def test_wait_breaks_the_row() -> None:
    """An item that waited, though it proves nothing, means that the limit is not raised soon."""
    capacity = Capacity()
    for n in range(7):
        capacity.observe(held(n, n + 0.9))
    # It waited beside one, whose slot it did not get.
    capacity.observe(held(100.0, 101.0, waited_s=95.0))
    assert capacity.limit == 8
    assert capacity.slots.count == 0
    for n in range(7):
        capacity.observe(held(200, 200.9 + n))
    assert capacity.limit == 8
    capacity.observe(held(200, 208))
    assert capacity.limit == 16


def test_more_at_one_time_is_a_lower_bound() -> None:
    """Three that hold a slot together are no proof of three slots, but of at least three."""
    capacity = Turns(Capacity()).round(3).capacity
    assert capacity.slots == Slots()
    assert capacity.at_least == 3
    assert capacity.memory == SlotMemo(count=0, at_least=3)


# -- Learned -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("waited_s", "count"), [(WAIT_S - 1e-6, 0), (WAIT_S, 1)])
def test_short_wait_is_bookkeeping(waited_s: float, count: int) -> None:
    """Less than 30 ms is no queue."""
    assert Turns(Capacity()).round(1).rounds(2, 1, waited_s=waited_s).capacity.slots.count == count


def test_overlap_is_learned_when_two_waited_for_it() -> None:
    """Two items that waited while three held a slot prove that there are three; one can be an accident."""
    turns = Turns(Capacity()).round(3)
    turns.capacity.observe(held(1.0, 2.0, waited_s=0.9))
    assert turns.capacity.slots.count == 0
    turns.capacity.observe(held(1.0, 2.0, waited_s=0.9))
    assert turns.capacity.slots == Slots(count=3, source=SlotSource.LEARNED)
    assert turns.capacity.limit == 3
    assert turns.capacity.memory == SlotMemo(count=3, at_least=3)


def test_slot_of_somebody_else_proves_nothing() -> None:
    """An item that began while none of ours ended got its slot from a foreign request."""
    capacity = Turns(Capacity()).round(1).capacity
    for n in range(10):
        capacity.observe(held(1.3 + n, 1.8 + n, waited_s=0.4))
    assert capacity.slots == Slots()
    assert capacity.at_least == 1


def test_who_still_speaks_holds_a_slot() -> None:
    """A wait behind one quick item teaches nothing while three others are known to hold slots."""
    capacity = Capacity()
    capacity.observe(held(0.0, 1.0), speaking=3)
    capacity.observe(held(1.0, 2.0, waited_s=0.9), speaking=3)
    capacity.observe(held(2.0, 3.0, waited_s=1.9), speaking=3)
    assert capacity.slots.count == 0
    # When these have ended, the same waits are the proof.
    for n in range(3):
        capacity.observe(held(0.0, 9.0), speaking=2 - n)
    assert capacity.slots == Slots(count=4, source=SlotSource.LEARNED)


def test_hand_over_is_no_overlap() -> None:
    """A slot that goes from one item to the next, with clocks that differ by some milliseconds, stays one slot."""
    capacity = Capacity()
    for n in range(20):
        capacity.observe(held(n - 0.004, n + 1.004, waited_s=0.5))
    assert capacity.slots.count == capacity.at_least == 1


# -- Too low -----------------------------------------------------------------------------------------------------


def test_number_that_was_too_low_is_withdrawn() -> None:
    """More items at one time than slots were learned: known is "at least so many", and twice that is tried."""
    turns = learned(2).round(3)
    capacity = turns.capacity
    assert (capacity.slots, capacity.at_least, capacity.limit) == (Slots(), 3, 6)
    assert capacity.memory == SlotMemo(count=0, at_least=3)
    # Nobody waits: more is tried, and what holds is learned.
    turns.round(6)
    assert capacity.limit == 12
    turns.rounds(2, 8)
    assert capacity.slots == Slots(count=8, source=SlotSource.LEARNED)


def test_probe_is_made_now_and_then_and_confirmed() -> None:
    """One more than the number, after 16 items; while it is confirmed, the next comes later, 64 items at most."""
    turns = learned(1)
    turns.now_s += 100.0
    gaps: list[int] = []
    for _ in range(4):
        gaps.append(0)
        while turns.capacity.limit == 1:
            turns.round(1)
            gaps[-1] += 1
        assert turns.capacity.limit == 2
        turns.rounds(2, 1)
        assert turns.capacity.limit == 1
        assert turns.capacity.slots == Slots(count=1, source=SlotSource.LEARNED)
    assert gaps[0] <= FIRST_PROBE
    # The answer to a probe is the first of the items until the next.
    assert gaps[1:] == [2 * FIRST_PROBE - 1, LAST_PROBE - 1, LAST_PROBE - 1]


def test_probe_that_nothing_answers_is_given_up() -> None:
    """Too little to do for one more: the probe ends, and another is made later."""
    turns = learned(1)
    turns.now_s += 100.0
    while turns.capacity.limit == 1:
        turns.round(1)
    for _ in range(8):
        assert turns.capacity.limit == 2
        turns.round(1)
    assert turns.capacity.limit == 1
    for _ in range(FIRST_PROBE):
        turns.round(1)
    assert turns.capacity.limit == 2


def test_nothing_is_probed_above_the_ceiling() -> None:
    """The ceiling bounds what is tried."""
    capacity = Capacity(ceiling=2)
    capacity.seed(5)
    assert (capacity.limit, capacity.slots.count) == (2, 2)


# -- Foreign load, and too high ----------------------------------------------------------------------------------


def test_foreign_load_lowers_the_limit_and_not_the_number() -> None:
    """Three waits in a row beside fewer than the number: as many as these may run, until more hold a slot again."""
    turns = learned(4)
    turns.now_s += 10.0
    turns.round(1).rounds(SHORT_WAITS - 1, 1)
    assert turns.capacity.limit == 4
    turns.rounds(1, 1)
    assert turns.capacity.limit == 1
    # Another slot falls free, and is held at once.
    turns.round(2, waited_s=0.9)
    assert turns.capacity.limit == 2
    turns.round(4)
    assert turns.capacity.limit >= 4
    assert turns.capacity.slots == Slots(count=4, source=SlotSource.LEARNED)


def test_limit_rises_while_nobody_waits() -> None:
    """The foreign clients leave: one more after as many as the limit, until all slots are used again."""
    turns = learned(3)
    turns.now_s += 10.0
    turns.round(1).rounds(SHORT_WAITS, 1)
    limits = []
    for _ in range(4):
        turns.round(1)
        limits.append(turns.capacity.limit)
    assert limits[:2] == [2, 2]
    assert limits[2] >= 3


@pytest.mark.parametrize(("item_s", "rounds"), [(1.0, 62), (0.1, 602), (5.0, 17)])
def test_number_proven_here_falls_after_a_long_row(item_s: float, rounds: int) -> None:
    """60 s, 16 waits and 32 items: all waits were alike, and all their slots came from ours."""
    turns = learned(4)
    turns.now_s += 10.0
    turns.item_s = item_s
    turns.round(2)
    gone = 1
    while turns.capacity.slots.count == 4:
        turns.rounds(1, 2, waited_s=0.9 * item_s)
        gone += 1
        assert gone <= rounds + 1
    assert turns.capacity.slots == Slots(count=2, source=SlotSource.LEARNED)
    assert turns.capacity.at_least == turns.capacity.limit == 2
    assert gone >= rounds - 1
    assert gone * 2 >= PROVEN_FALLS.items
    assert gone >= PROVEN_FALLS.waits
    assert gone * item_s >= PROVEN_FALLS.span_s


@pytest.mark.parametrize("sign", ["another number", "a slot that was not ours", "more at one time"])
def test_sign_of_others_begins_the_row_again(sign: str) -> None:
    """What only foreign requests explain keeps the number."""
    turns = learned(4)
    turns.now_s += 10.0
    turns.round(2)
    for n in range(200):
        if n % 50 == 49:
            if sign == "another number":
                turns.round(1, waited_s=0.9).round(1, waited_s=0.9)
            elif sign == "a slot that was not ours":
                turns.now_s += 0.5
                turns.round(2, waited_s=1.4)
            else:
                turns.round(3)
        turns.rounds(1, 2)
    assert turns.capacity.slots == Slots(count=4, source=SlotSource.LEARNED)


def test_bound_that_was_seen_by_mistake_falls_too() -> None:
    """Where the number is not known: a clock that was set made more seem to hold a slot than can."""
    turns = Turns(Capacity()).round(5)
    turns.now_s += 10.0
    turns.round(2).rounds(80, 2)
    assert turns.capacity.slots == Slots(count=2, source=SlotSource.LEARNED)


# -- Trouble -----------------------------------------------------------------------------------------------------


def test_trouble_halves_the_limit_and_ends_that_go_well_raise_it() -> None:
    """Down to a half, and up by one after each row of as many as the limit."""
    turns = learned(4)
    turns.capacity.stumbled()
    assert turns.capacity.limit == 2
    limits = []
    for n in range(6):
        turns.capacity.observe(held(100.0 + n, 100.5 + n))
        limits.append(turns.capacity.limit)
    # With all slots in use again, a probe is due.
    assert limits == [2, 3, 3, 3, 5, 5]
    assert turns.capacity.slots.count == 4


def test_trouble_of_one_wave_counts_once() -> None:
    """Eight that fail together halve the limit once; the ninth halves it again, and one is always left."""
    capacity = Capacity()
    limits = []
    for _ in range(16):
        capacity.stumbled()
        limits.append(capacity.limit)
    assert limits == [4] * 8 + [2] * 4 + [1] * 4
    # Ends that go well are of the same wave too.
    capacity = Capacity()
    capacity.stumbled()
    for n in range(3):
        capacity.observe(held(n, n + 0.5))
    for _ in range(4):
        capacity.stumbled()
    assert capacity.limit == 4
    capacity.stumbled()
    assert capacity.limit == 2


def test_trouble_lowers_a_configured_limit_too() -> None:
    """What the configuration says is the number; the moment may not bear it."""
    capacity = Capacity(configured=4)
    capacity.stumbled()
    assert (capacity.limit, capacity.slots.count) == (2, 4)
    for n in range(5):
        capacity.observe(held(n, n + 0.5))
    assert capacity.limit == 4


def test_missed_item_leaves_what_cannot_be_judged() -> None:
    """An item that failed held a slot nobody knows when: waits until then prove nothing."""
    turns = Turns(Capacity()).round(1)
    turns.capacity.missed()
    turns.rounds(2, 1)
    assert turns.capacity.slots.count == 0
    turns.rounds(2, 1)
    assert turns.capacity.slots.count == 1


# -- Told, configured, remembered, forgotten ---------------------------------------------------------------------


def test_configured_number_is_never_moved() -> None:
    """Neither what is told nor what is seen nor remembered changes a configured number."""
    capacity = Capacity(configured=2)
    capacity.told(7)
    capacity.seed(5)
    for _ in range(5):
        capacity.observe(held(0.0, 1.0, waited_s=0.5))
    capacity.forget()
    assert capacity.slots == Slots(count=2, source=SlotSource.CONFIGURED)
    assert (capacity.limit, capacity.at_least, capacity.memory) == (2, 2, None)


def test_told_number_wins_over_what_is_seen() -> None:
    """A number that the backend tells replaces what was learned, and is not learned away."""
    turns = learned(1)
    turns.capacity.told(6)
    turns.rounds(3, 1)
    assert turns.capacity.slots == Slots(count=6, source=SlotSource.TOLD)
    turns.capacity.forget()
    assert turns.capacity.slots.count == turns.capacity.at_least == turns.capacity.limit == 6
    assert turns.capacity.memory is None


def test_remembered_number_is_used_and_probed_at_once() -> None:
    """From the first item on one more is tried; when that one waits, the number is confirmed."""
    capacity = Capacity()
    capacity.seed(2, at_least=2)
    assert capacity.slots == Slots(count=2, source=SlotSource.REMEMBERED)
    assert (capacity.limit, capacity.at_least, capacity.memory) == (3, 0, SlotMemo(count=2))
    Turns(capacity).round(2).rounds(1, 2)
    assert capacity.slots == Slots(count=2, source=SlotSource.LEARNED)
    assert capacity.limit == 2


def test_remembered_number_that_is_too_high_falls_sooner() -> None:
    """It was never proven here: 8 waits in 32 items are enough, without any time."""
    capacity = Capacity()
    capacity.seed(8)
    turns = Turns(capacity).round(2)
    rounds = 1
    while capacity.slots.count == 8:
        turns.rounds(1, 2)
        rounds += 1
        assert rounds < 50
    assert capacity.slots == Slots(count=2, source=SlotSource.LEARNED)
    assert REMEMBERED_FALLS.items <= rounds * 2 <= REMEMBERED_FALLS.items + 8


def test_remembered_lower_bound_is_where_the_search_begins() -> None:
    """Without a number, what was proven at another time is tried first, and proves nothing now."""
    capacity = Capacity()
    capacity.seed(0, at_least=16)
    assert (capacity.slots, capacity.limit, capacity.at_least) == (Slots(), 16, 0)


def test_memory_is_no_news_where_more_is_known() -> None:
    """A number that is known already, or a bound, is not replaced by an older one."""
    turns = learned(2)
    turns.capacity.seed(8)
    assert turns.capacity.slots.count == 2
    capacity = Turns(Capacity()).round(3).capacity
    capacity.seed(2)
    assert capacity.slots == Slots()


def test_another_process_has_to_confirm_the_number() -> None:
    """After a load or an outage it is remembered; the bound, the raised limit and what foreign load left are gone."""
    turns = learned(4)
    turns.now_s += 10.0
    turns.round(1).rounds(SHORT_WAITS, 1)
    assert turns.capacity.limit == 1
    turns.capacity.forget()
    assert turns.capacity.slots == Slots(count=4, source=SlotSource.REMEMBERED)
    assert (turns.capacity.limit, turns.capacity.at_least) == (4, 0)
    assert turns.capacity.memory == SlotMemo(count=4)
    turns.round(4)
    assert turns.capacity.slots.source is SlotSource.REMEMBERED
    turns.rounds(1, 4)
    assert turns.capacity.slots == Slots(count=4, source=SlotSource.LEARNED)


def test_number_of_the_process_before_is_probed_later() -> None:
    """The first wave is not to have one item too many; then one more is tried."""
    turns = learned(4)
    turns.capacity.forget()
    limits = [turns.round(1).capacity.limit for _ in range(20)]
    assert limits == [4] * (FIRST_PROBE - 1) + [5] * (20 - FIRST_PROBE + 1)
    turns.round(5)
    assert (turns.capacity.slots, turns.capacity.limit) == (Slots(), 10)


def test_number_of_the_process_before_falls_sooner() -> None:
    """8 waits in 32 items, as for any that is only remembered."""
    turns = learned(4)
    turns.capacity.forget()
    turns.round(2)
    gone = 1
    while turns.capacity.slots.count == 4:
        turns.rounds(1, 2)
        gone += 1
    assert REMEMBERED_FALLS.items <= gone * 2 <= REMEMBERED_FALLS.items + 8


def test_search_begins_where_another_time_had_got_to() -> None:
    """What was seen at one time, here or in an earlier run, is where the next process is asked first."""
    capacity = Capacity()
    capacity.seed(0, at_least=16)
    capacity.forget()
    assert (capacity.limit, capacity.at_least, capacity.memory) == (16, 0, None)
    Turns(capacity).round(20)
    capacity.forget()
    assert (capacity.limit, capacity.at_least, capacity.memory) == (20, 0, None)


def test_forgotten_search_begins_anew() -> None:
    """Where no number was known, an outage leaves only where the search begins."""
    capacity = Turns(Capacity()).round(8).capacity
    assert capacity.limit == 16
    capacity.forget()
    assert (capacity.slots, capacity.limit, capacity.memory) == (Slots(), 8, None)
    capacity.observe(held(9.5, 9.9, waited_s=5.0))
    assert capacity.slots == Slots()
