"""A lone item beside a batch of many: it gets the next slot that falls free, or the one after that."""

from __future__ import annotations

import random

import pytest

from tests.unit.core.simulator import Answer, Simulator, works
from unisono.core.capacity import Capacity
from unisono.core.commands import Release, Terms, Work
from unisono.core.conductor import Conductor

SLOTS = 4
MANY = 600


def configured() -> Capacity:
    """As many as there are."""
    return Capacity(configured=SLOTS)


def remembered() -> Capacity:
    """Confirmed soon, and probed again and again."""
    capacity = Capacity()
    capacity.seed(SLOTS)
    return capacity


def unknown() -> Capacity:
    """As many as are tried: nobody ever waits, so the number is never learned."""
    return Capacity(ceiling=SLOTS)


def busy(capacity: Capacity, rng: random.Random) -> tuple[Conductor, Simulator]:
    """A runner in the middle of a batch whose answers end one by one."""
    conductor = Conductor(capacity)
    world = Simulator(conductor, slots=SLOTS)
    world.answers = {n: Answer(tokens=rng.randrange(2, 40)) for n in range(MANY)}
    world.do(conductor.open(world.now))
    world.add(Work(ticket=n, batch=0, terms=Terms()) for n in range(MANY))
    world.run(for_s=3.0 + 2.0 * rng.random())
    return conductor, world


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("capacity", [configured, remembered, unknown])
def test_at_most_one_other_gets_a_slot_before_it(capacity: type[Capacity], seed: int) -> None:
    """Who is at the backend's own door already; while the number of slots is not known, nobody is."""
    rng = random.Random(seed)
    _, world = busy(capacity(), rng)
    for ticket in range(MANY, MANY + 8):
        came_s = world.now
        world.add([Work(ticket=ticket, batch=ticket, terms=Terms())])
        world.run(for_s=2.0)
        released = [one for at_s, one in world.log if isinstance(one, Release) and at_s >= came_s]
        assert ticket in released[0].tickets, "it is the next that goes"
        before = [n for n, at_s in world.began_at_s.items() if came_s < at_s < world.began_at_s[ticket]]
        assert len(before) <= (capacity is not unknown)
        world.run(for_s=rng.random())


def test_a_lane_that_was_tried_goes_when_the_probe_is_over() -> None:
    """Though somebody always stands at the door: as many as slots and one are at the backend, not one more."""
    conductor, world = busy(remembered(), random.Random(1))
    most: list[int] = []
    for _ in range(400):
        world.run(for_s=0.02)
        if conductor.capacity.limit == SLOTS:
            most.append(conductor.in_flight)
    assert len(most) > 200
    assert most.count(SLOTS + 1) > 0.8 * len(most)
    # The last of those that were tried may still be there for a moment.
    assert most.count(SLOTS + 2) < 0.1 * len(most)
    assert max(most) <= SLOTS + 2


def test_nobody_goes_to_the_door_before_it_while_it_is_made_ready() -> None:
    """A request of the others does not, though that is ready already."""
    conductor = Conductor(Capacity(configured=2))
    world = Simulator(conductor, slots=2)
    world.answers = {0: Answer(tokens=20), 1: Answer(tokens=50)}
    world.staging_of = {100: 0.3}
    world.do(conductor.open(world.now))
    world.add(works(range(6)))
    world.run(for_s=0.4)
    # Two are answered, and a third stands at the door, whose slot falls free while the newcomer is made ready.
    assert conductor.in_flight == 3
    world.add([Work(ticket=100, batch=1)])
    world.run()
    world.audit.check_finished()
    order = sorted(world.began_at_s, key=lambda ticket: world.began_at_s[ticket])
    assert order[:5] == [0, 1, 2, 100, 3]
