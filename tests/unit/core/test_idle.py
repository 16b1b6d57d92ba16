"""Idle slot time: of slots that are known, and of nothing else."""

from __future__ import annotations

import pytest

from tests.unit.core.simulator import Answer, Simulator, works
from unisono.core.capacity import Capacity
from unisono.core.conductor import Conductor
from unisono.core.idle import IdleReason, IdleTime, slot_seconds
from unisono.core.report import RunnerFigures

NO_ITEMS, REFILL = IdleReason.NO_ITEMS, IdleReason.REFILL


def run(capacity: Capacity, *, slots: int, items: int, tokens: int = 50) -> dict[IdleReason, float]:
    """The idle time of so many equal items on a simulated backend."""
    conductor = Conductor(capacity)
    world = Simulator(conductor, slots=slots, answer=Answer(tokens=tokens), staging_s=0.0)
    world.do(conductor.open(world.now))
    world.add(works(range(items)))
    world.run()
    world.audit.check_finished()
    return dict(conductor.figures.idle_s)


def test_a_lane_that_is_tried_is_no_slot() -> None:
    """Four items on four remembered slots, of which a fifth is probed, leave nothing idle."""
    capacity = Capacity()
    capacity.seed(4)
    assert capacity.limit == 5
    assert sum(run(capacity, slots=4, items=4).values()) == 0


def test_slots_that_are_known_are_counted() -> None:
    """One item on four slots: three of them have nothing to do, for as long as it takes."""
    assert run(Capacity(configured=4), slots=4, items=1) == {NO_ITEMS: pytest.approx(3 * (0.05 + 50 * 0.02))}


def test_slots_that_nobody_knows_are_never_idle() -> None:
    """Eight are tried for three items; how many there are is not learned."""
    assert run(Capacity(), slots=4, items=3) == {}


def test_what_was_idle_before_the_number_was_known_counts_then() -> None:
    """As far as it lies below the number, and once."""
    idle = IdleTime()
    # Eight lanes are tried, of which three are taken; then five.
    idle.add({REFILL: 1, NO_ITEMS: 4}, taken=3, slots=0, seconds=2.0)
    idle.add({NO_ITEMS: 3}, taken=5, slots=0, seconds=1.0)
    assert idle.counted == {}
    before = RunnerFigures(idle_s=idle.counted, idle_open=idle.open)
    idle.add({NO_ITEMS: 3}, taken=5, slots=6, seconds=1.0)
    assert idle.counted == {REFILL: 2.0, NO_ITEMS: 2 * 2.0 + 1.0 + 1.0}
    assert idle.open == {}
    idle.add({NO_ITEMS: 2}, taken=4, slots=5, seconds=10.0)
    assert idle.counted[NO_ITEMS] == 16.0
    after = RunnerFigures(idle_s=idle.counted, idle_open=idle.open)
    assert after.idle_since(before, 6) == {NO_ITEMS: 11.0}
    assert after.idle_since(before, 0) == {}
    assert slot_seconds({(NO_ITEMS, 4, 8): 1.0}, 4) == {}
