"""What is learned of a runner's slots."""

from __future__ import annotations

import random

import pytest

from tests.unit.core.simulator import Answer, Simulator, works
from unisono.core.capacity import FIRST_LIMIT, WAIT_S, Capacity, Held
from unisono.core.conductor import Conductor
from unisono.core.model import Slots, SlotSource


def held(start_s: float, end_s: float, waited_s: float = 0.0) -> Held:
    """An item's time in a slot."""
    return Held(start_s=start_s, end_s=end_s, waited_s=waited_s)


def test_begins_at_eight() -> None:
    """While nothing is known, eight may be in flight, or what the ceiling allows."""
    assert Capacity().limit == FIRST_LIMIT == 8
    assert Capacity(ceiling=3).limit == 3
    assert Capacity(ceiling=0).limit == 1
    assert Capacity().slots == Slots(count=0, source=SlotSource.UNKNOWN)


def test_limit_doubles_after_as_many_as_it_ended_without_waiting() -> None:
    """Eight items in a row that did not wait double the limit, seven do not; the ceiling is never passed."""
    capacity = Capacity(ceiling=20)
    limits = []
    for n in range(40):
        capacity.observe(held(n, n + 0.9))
        limits.append(capacity.limit)
    assert limits[6:8] == [8, 16]
    assert limits[22:24] == [16, 20]
    assert limits[-1] == 20


def test_wait_breaks_the_row() -> None:
    """An item that waited, though it proves nothing, means that the limit is not raised soon."""
    capacity = Capacity()
    for n in range(7):
        capacity.observe(held(n, n + 0.9))
    # It waited while nobody was seen to hold a slot: foreign load.
    capacity.observe(held(100.0, 101.0, waited_s=50.0))
    assert capacity.limit == 8
    assert capacity.slots.count == 0
    for n in range(7):
        capacity.observe(held(200 + n, 200.9 + n))
    assert capacity.limit == 8


@pytest.mark.parametrize(("waited_s", "count"), [(WAIT_S - 1e-6, 0), (WAIT_S, 1)])
def test_short_wait_is_bookkeeping(waited_s: float, count: int) -> None:
    """Less than 30 ms is no queue."""
    capacity = Capacity()
    capacity.observe(held(0.0, 1.0))
    capacity.observe(held(1.0, 2.0, waited_s=waited_s))
    assert capacity.slots.count == count


def test_overlap_is_learned_when_somebody_waited_for_it() -> None:
    """Three that hold a slot together are no proof of three slots; a fourth that waited meanwhile is."""
    capacity = Capacity()
    for _ in range(3):
        capacity.observe(held(0.0, 1.0))
    assert capacity.slots.count == 0
    capacity.observe(held(1.0, 2.0, waited_s=0.9))
    assert capacity.slots == Slots(count=3, source=SlotSource.LEARNED)
    assert capacity.limit == 3


def test_who_still_speaks_holds_a_slot() -> None:
    """A wait behind one quick item teaches nothing while three others are known to hold slots."""
    capacity = Capacity()
    capacity.observe(held(0.0, 1.0), speaking=3)
    capacity.observe(held(1.0, 2.0, waited_s=0.9), speaking=3)
    assert capacity.slots.count == 0
    # When these have ended, the same wait is the proof.
    for n in range(3):
        capacity.observe(held(0.0, 9.0), speaking=2 - n)
    assert capacity.slots == Slots(count=4, source=SlotSource.LEARNED)


def test_learned_number_rises_with_what_is_seen() -> None:
    """More items at one time than slots were learned: there are that many."""
    capacity = Capacity()
    capacity.observe(held(0.0, 1.0))
    capacity.observe(held(1.0, 2.0, waited_s=0.9))
    assert capacity.slots.count == 1
    capacity.observe(held(0.5, 1.5))
    assert capacity.slots == Slots(count=2, source=SlotSource.LEARNED)
    # Also where nobody waits any more.
    for _ in range(3):
        capacity.observe(held(50.0, 51.0))
    assert capacity.slots == Slots(count=3, source=SlotSource.LEARNED)


def test_hand_over_is_no_overlap() -> None:
    """A slot that goes from one item to the next, with clocks that differ by some milliseconds, stays one slot."""
    capacity = Capacity()
    for n in range(20):
        capacity.observe(held(n - 0.004, n + 1.004, waited_s=0.5))
    assert capacity.slots.count == 1


def test_configured_number_is_never_moved() -> None:
    """Neither what is told nor what is seen changes a configured number."""
    capacity = Capacity(configured=2)
    capacity.told(7)
    for _ in range(5):
        capacity.observe(held(0.0, 1.0, waited_s=0.5))
    capacity.forget()
    assert capacity.slots == Slots(count=2, source=SlotSource.CONFIGURED)
    assert capacity.limit == 2


def test_told_number_wins_over_what_is_seen() -> None:
    """A number that the backend tells replaces what was learned, and is not learned away."""
    capacity = Capacity()
    capacity.observe(held(0.0, 1.0))
    capacity.observe(held(1.0, 2.0, waited_s=0.9))
    capacity.told(6)
    capacity.observe(held(2.0, 3.0, waited_s=0.9))
    assert capacity.slots == Slots(count=6, source=SlotSource.TOLD)
    capacity.forget()
    assert capacity.slots.count == 6


def test_forgotten_number_is_learned_anew() -> None:
    """After a restart of the server, everything that was learned is gone, the raised limit too."""
    capacity = Capacity()
    for n in range(8):
        capacity.observe(held(n, n + 0.9))
    assert capacity.limit == 16
    capacity.observe(held(8.0, 9.0, waited_s=0.9))
    assert capacity.slots.count == 1
    capacity.forget()
    assert capacity.slots == Slots()
    assert capacity.limit == 8
    capacity.observe(held(9.5, 9.9, waited_s=5.0))
    assert capacity.slots == Slots()


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
def test_never_a_wrong_number(slots: int) -> None:
    """Whatever the lengths and prompts, and with times that are off by 3 ms, no other number is ever learned."""
    seen = []
    for seed in range(20):
        chance = random.Random(seed)
        conductor = Conductor(Capacity())
        world = Simulator(conductor, slots=slots, clock_error_s=lambda r=chance: r.uniform(-0.003, 0.003))  # type: ignore[misc]
        for n in range(40):
            tokens = 1 + int(4 * chance.paretovariate(1.1)) % 400
            world.answers[n] = Answer(tokens=tokens, prompt_s=chance.choice([0.01, 0.05, 0.5]))
        world.do(conductor.open(world.now))
        world.add(works(range(40)))
        world.run()
        seen.append(conductor.capacity.slots.count)
    assert set(seen) <= {0, slots}
    assert seen.count(slots) >= 15
