"""Capacity in whole worlds: servers with slots and passes, clocks that are off, other clients, restarts."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from tests.unit.core.simulator import Answer, Simulator, works
from tests.unit.core.slot_world import Others, World
from unisono.core.capacity import Capacity
from unisono.core.conductor import Conductor
from unisono.core.model import Slots, SlotSource

Batch = list[tuple[int, float]]
# SEEDS=100 runs many more worlds than the tests need each time.
SEEDS = range(int(os.environ.get("SEEDS", "6")))


def batch(chance: random.Random, count: int, shape: str = "mixed") -> Batch:
    """Items: tokens, and seconds of prompt."""
    makers: dict[str, Callable[[], tuple[int, float]]] = {
        "mixed": lambda: (chance.randint(5, 60), chance.choice([0.01, 0.05, 0.3])),
        "equal": lambda: (20, 0.05),
        "heavy": lambda: (1 + int(6 * chance.paretovariate(1.1)) % 400, chance.choice([0.01, 0.05])),
        "long prompts": lambda: (2, chance.uniform(0.3, 1.5)),
        "only prompts": lambda: (1, chance.uniform(0.3, 1.5)),
    }
    return [makers[shape]() for _ in range(count)]


def lengths(chance: random.Random, kind: str) -> Callable[[], int]:
    """Tokens of a foreign request."""
    kinds: dict[str, Callable[[], int]] = {
        "short": lambda: chance.randint(5, 40),
        "long": lambda: 100_000,
        "both": lambda: chance.choice([20, 400]),
    }
    return kinds[kind]


def world(seed: int, slots: int, *, ahead: int = 0, pass_s: float = 0.02) -> World:
    """A server with nothing known of it."""
    return World(Capacity(), slots, random.Random(seed), ahead=ahead, pass_s=pass_s)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("slots", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("shape", ["mixed", "equal", "heavy"])
def test_number_is_right_or_not_known(shape: str, slots: int, ahead: int) -> None:
    """100 items: the number is never wrong, not even on the way, and nearly always known in the end."""
    ends = []
    for seed in SEEDS:
        there = world(seed, slots, ahead=ahead)
        there.run(batch(there.chance, 100, shape))
        assert set(there.counts) <= {0, slots}
        assert max(there.bounds) <= slots
        ends.append(there.capacity.slots.count)
    assert ends.count(slots) >= 0.8 * len(SEEDS)


@pytest.mark.parametrize("slots", [1, 4, 8, 16])
@pytest.mark.parametrize("shape", ["long prompts", "only prompts"])
def test_items_that_are_all_prompt_teach_no_wrong_number(shape: str, slots: int) -> None:
    """They wait in their slots for each other's prompts, which looks like a queue: at most a lower bound is known."""
    for seed in SEEDS:
        there = world(seed, slots, ahead=1)
        there.run(batch(there.chance, 100, shape))
        assert set(there.counts) <= {0, slots}
        assert 1 <= there.capacity.at_least <= slots


@pytest.mark.parametrize("slots", [2, 8])
def test_slow_passes_are_no_queue(slots: int) -> None:
    """With passes of 120 ms, each item waits for the one under way."""
    for seed in SEEDS:
        there = world(seed, slots, pass_s=0.12)
        there.run(batch(there.chance, 100))
        assert set(there.counts) <= {0, slots}
        assert there.capacity.slots.count == slots


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(
    ("slots", "remembered"), [(8, 1), (8, 2), (8, 4), (4, 1), (4, 2), (2, 1), (1, 2), (1, 8), (2, 8), (4, 8), (8, 8)]
)
def test_wrong_memory_is_put_right_within_one_batch(slots: int, remembered: int, ahead: int) -> None:
    """100 items are enough where it was too low, 150 where it was too high."""
    for seed in SEEDS:
        there = world(seed, slots, ahead=ahead)
        there.capacity.seed(remembered)
        there.run(batch(there.chance, 150 if remembered > slots else 100))
        assert there.capacity.slots == Slots(count=slots, source=SlotSource.LEARNED)
        assert set(there.counts) <= {0, remembered, slots}


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("kind", ["short", "long", "both"])
@pytest.mark.parametrize(("for_s", "pass_s"), [(20.0, 0.02), (60.0, 0.02), (60.0, 0.1)])
def test_foreign_load_lowers_the_limit_and_not_the_number(for_s: float, pass_s: float, kind: str, ahead: int) -> None:
    """Others take 3 of 4 slots before our first item and leave: the number stays, the limit falls and recovers."""
    for seed in SEEDS:
        there = world(seed, 4, ahead=ahead, pass_s=pass_s)
        there.run(batch(there.chance, 100))
        assert there.capacity.slots.count == 4
        begin, before = there.now_s, len(there.counts)
        there.others = (Others(count=3, from_s=begin, until_s=begin + for_s, tokens=lengths(there.chance, kind)),)
        there.let_others_in()
        while there.now_s < begin + for_s:
            there.run(batch(there.chance, 20))
        limits = [
            limit
            for limit, ended_s in zip(there.limits[before:], there.ended_s[before:], strict=True)
            if begin + 250 * pass_s < ended_s < begin + for_s
        ]
        # Others with short requests take turns with ours, so that now and then ours hold all four.
        assert min(limits) <= 3
        assert sum(limits) / len(limits) < {"short": 5, "long": 2, "both": 3}[kind]
        there.run(batch(there.chance, 60))
        assert set(there.counts[before:]) == {4}
        assert there.capacity.limit in (4, 5)


@pytest.mark.parametrize("for_s", [20.0, 200.0])
@pytest.mark.parametrize("ahead", [0, 1])
def test_others_who_were_there_first_mislead_only_until_they_leave(ahead: int, for_s: float) -> None:
    """While nothing is known, foreign requests that never end look like fewer slots; 100 items later all is right."""
    for seed in SEEDS:
        there = world(seed, 4, ahead=ahead)
        there.others = (Others(count=3, until_s=for_s),)
        there.let_others_in()
        while there.now_s < for_s:
            there.run(batch(there.chance, 40))
        there.run(batch(there.chance, 100))
        assert there.capacity.slots == Slots(count=4, source=SlotSource.LEARNED)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(("before", "after"), [(8, 2), (4, 1), (2, 8), (1, 8)])
def test_unnoticed_restart_is_noticed(before: int, after: int, ahead: int) -> None:
    """More slots: within 100 items. Fewer: the limit within 100 items, the number after a long row."""
    for seed in SEEDS:
        there = world(seed, before, ahead=ahead)
        there.run(batch(there.chance, 100))
        assert there.capacity.slots.count == before
        there.restart(after)
        there.run(batch(there.chance, 100))
        if after < before:
            assert there.capacity.limit <= after + 1
            there.run(batch(there.chance, 500))
        assert there.capacity.slots == Slots(count=after, source=SlotSource.LEARNED)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(("before", "after"), [(8, 2), (4, 1), (4, 3), (8, 7), (2, 8), (1, 8)])
def test_restart_that_a_load_tells_of_is_believed_soon(before: int, after: int, ahead: int) -> None:
    """More slots, or fewer: 150 items, where it may be some hundreds without a word."""
    for seed in SEEDS:
        there = world(seed, before, ahead=ahead)
        there.run(batch(there.chance, 100))
        assert there.capacity.slots.count == before
        there.restart(after)
        there.capacity.forget()
        there.run(batch(there.chance, 150))
        assert there.capacity.slots == Slots(count=after, source=SlotSource.LEARNED)


@pytest.mark.parametrize(("before", "after"), [(8, 2), (4, 1), (4, 2)])
def test_slow_items_are_not_counted_for_longer(before: int, after: int) -> None:
    """Of five seconds each: 60 items are enough for a number that was proven."""
    for seed in SEEDS:
        there = world(seed, before, pass_s=0.2)
        there.run(batch(there.chance, 100))
        assert there.capacity.slots.count == before
        there.restart(after)
        there.run(batch(there.chance, 60))
        assert there.capacity.slots == Slots(count=after, source=SlotSource.LEARNED)


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
def test_conductor_learns_no_wrong_number(slots: int) -> None:
    """Whatever the lengths and prompts, and with times that are off by 3 ms, no other number is ever learned."""
    seen = []
    for seed in range(20):
        chance = random.Random(seed)
        conductor = Conductor(Capacity())
        there = Simulator(conductor, slots=slots, clock_error_s=lambda r=chance: r.uniform(-0.003, 0.003))  # type: ignore[misc]
        for n in range(40):
            tokens = 1 + int(4 * chance.paretovariate(1.1)) % 400
            there.answers[n] = Answer(tokens=tokens, prompt_s=chance.choice([0.01, 0.05, 0.5]))
        there.do(conductor.open(there.now))
        there.add(works(range(40)))
        there.run()
        seen.append(conductor.capacity.slots.count)
    assert set(seen) <= {0, slots}
    assert seen.count(slots) >= 15
