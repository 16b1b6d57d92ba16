"""A runner dies: who ended it is found, and nobody else pays for it."""

from __future__ import annotations

from math import ceil, log2

import pytest

from tests.unit.core.processor import DIED, Processor
from tests.unit.core.simulator import Answer, Fault, Simulator, works
from unisono.core.capacity import Capacity
from unisono.core.commands import Release, ReleaseReason, Retry, Work
from unisono.core.conductor import Conductor
from unisono.core.errors import ConnectionLostError, RunnerDiedError
from unisono.core.model import ItemState
from unisono.core.suspects import WAKE_S, Suspects

LOST = ConnectionLostError("the connection ended before the answer was whole")
ATTEMPTS = 3


# -- The wake ----------------------------------------------------------------------------------------------------


def test_nothing_is_judged_while_others_may_still_fall() -> None:
    """Three were in flight; each that has not fallen yet may."""
    suspects = Suspects()
    assert suspects.judged(0.0) is None
    suspects.fell(1, DIED, [1, 2, 3], 10.0)
    assert suspects.judged(10.0) is None
    suspects.fell(2, DIED, [2, 3], 10.1)
    suspects.left(3)
    assert suspects.judged(10.1) == {1: DIED, 2: DIED}
    assert suspects.wake is None


def test_a_second_is_enough() -> None:
    """Whoever has not fallen by then does not."""
    suspects = Suspects()
    suspects.fell(1, DIED, [1, 2], 10.0)
    assert suspects.judged(10.0 + WAKE_S - 0.001) is None
    assert suspects.judged(10.0 + WAKE_S) == {1: DIED}


def test_who_was_answered_all_the_same_is_no_suspect() -> None:
    """Also if it had seemed to fall."""
    suspects = Suspects()
    suspects.fell(1, DIED, [2], 10.0)
    suspects.fell(2, DIED, [], 10.0)
    suspects.left(1)
    assert suspects.judged(10.0) == {2: DIED}


@pytest.mark.parametrize(("errors", "is_grave"), [([LOST], False), ([DIED], True), ([LOST, LOST], True)])
def test_one_cut_connection_stops_nobody(errors: list[RunnerDiedError], *, is_grave: bool) -> None:
    """Two do, and so does the word that the runner died."""
    suspects = Suspects()
    for ticket, error in enumerate(errors):
        suspects.fell(ticket, error, [7, 8], 10.0)
    assert suspects.wake is not None
    assert suspects.wake.is_grave is is_grave


# -- The trials --------------------------------------------------------------------------------------------------


def test_halves_are_tried_one_after_the_other() -> None:
    """The first half first; the other one when all of that have left."""
    suspects = Suspects()
    suspects.halve([1, 2, 3])
    assert suspects.is_active
    assert suspects.on_trial == {1, 2}
    suspects.left(1)
    assert suspects.on_trial == {2}
    suspects.left(2)
    assert suspects.on_trial == {3}
    suspects.left(3)
    assert suspects.on_trial == frozenset()
    assert (suspects.is_active, suspects.wake) == (False, None)


def test_a_half_that_falls_is_halved_before_the_other() -> None:
    """So the culprit is found while the fewest are apart."""
    suspects = Suspects()
    suspects.halve([1, 2, 3, 4])
    assert suspects.on_trial == {1, 2}
    suspects.halve([1, 2])
    assert suspects.on_trial == {1}
    suspects.isolate(1)
    assert suspects.on_trial == {1}
    suspects.left(1)
    assert suspects.on_trial == {2}
    suspects.left(2)
    assert suspects.on_trial == {3, 4}


def test_who_has_ended_is_tried_no_more() -> None:
    """A half of which nobody is left is no trial."""
    suspects = Suspects()
    suspects.halve([1, 2, 3])
    suspects.forget(3)
    suspects.forget(9)
    suspects.forget(1)
    assert suspects.on_trial == {2}
    suspects.forget(2)
    assert not suspects.is_active


# -- All of it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8, 16, 32])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_culprit_among_many(count: int, place: str) -> None:
    """It takes log2(n) deaths to find it after the first, and its attempts; nobody else is charged one."""
    culprit = {"first": 0, "middle": count // 2 - 1, "last": count - 1}[place]
    world = Processor(conductor=Conductor(Capacity(configured=count)), slots=count)
    world.killers = {culprit}
    world.add([Work(ticket=n, batch=0, num_predict=10, max_attempts=ATTEMPTS) for n in range(count + 8)])
    ends = world.run()
    assert world.deaths <= 1 + ceil(log2(count + 1)) + ATTEMPTS
    assert world.conductor.figures.deaths == world.deaths
    assert ends[culprit].state is ItemState.FAILED
    assert ends[culprit].error is DIED
    assert {end.state for ticket, end in ends.items() if ticket != culprit} == {ItemState.COMPLETED}
    assert {end.attempts for ticket, end in ends.items() if ticket != culprit} == {1}
    assert max(end.disturbed for end in ends.values()) >= 1


def test_two_culprits() -> None:
    """Both are found, and all others answered, each in one attempt of its own."""
    world = Processor(conductor=Conductor(Capacity(configured=16)), slots=16)
    world.killers = {2, 11}
    world.add([Work(ticket=n, batch=0, num_predict=10, max_attempts=ATTEMPTS) for n in range(40)])
    ends = world.run()
    failed = {ticket for ticket, end in ends.items() if end.state is ItemState.FAILED}
    assert failed == world.killers
    assert {end.attempts for ticket, end in ends.items() if ticket not in failed} == {1}
    assert world.deaths <= 1 + 2 * (4 + ATTEMPTS)


def test_suspects_are_run_apart_from_everybody_else() -> None:
    """While they are tried, nobody else is in flight; and each says why it went."""
    world = Processor(conductor=Conductor(Capacity(configured=4)), slots=4)
    world.killers = {1}
    world.add([Work(ticket=n, batch=0, num_predict=10) for n in range(30)])
    _ = world.run()
    trials = [release.tickets for release in world.releases if release.reasons[0] is ReleaseReason.SUSPECT]
    # Five fell: the four that sat, and the one that stood at the door.
    assert trials[:3] == [(0, 1, 2), (0, 1), (0,)]
    assert {ticket for trial in trials for ticket in trial} == set(range(5))


def test_nobody_waits_for_the_long_answers_of_the_cleared() -> None:
    """Who got further than when it fell goes on beside the next half; then beside everybody else."""
    world = Processor(conductor=Conductor(Capacity(configured=8)), slots=8)
    world.killers = {5}
    world.add([Work(ticket=n, batch=0, num_predict=500, max_attempts=1) for n in range(16)])
    while 5 not in world.ends:
        _ = world.run(passes=1)
    assert world.passes <= 30
    _ = world.run(passes=3)
    # Nobody has ended, and all eight slots are taken; one stands at the door.
    assert set(world.ends) == {5}
    assert world.conductor.in_flight == 8 + 1
    ends = world.run()
    assert {end.attempts for ticket, end in ends.items() if ticket != 5} == {1}
    assert world.passes <= 2 * 500 + 100


def test_the_cleared_are_not_suspected_before_those_on_trial() -> None:
    """They fell with them; of these it was one."""
    suspects = Suspects()
    suspects.halve([1, 2, 3, 4])
    assert suspects.on_trial == {1, 2}
    assert suspects.clear(1)
    assert not suspects.clear(1)
    assert suspects.clear(2)
    assert suspects.on_trial == {3, 4}
    assert suspects.at_large == {1, 2, 3, 4}
    suspects.halve([1, 2, 3, 4])
    assert suspects.on_trial == suspects.at_large == {3}
    suspects.left(3)
    assert suspects.on_trial == {4}
    suspects.left(4)
    assert not suspects.is_active


def test_one_attempt_is_enough_for_a_culprit_that_has_no_more() -> None:
    """It ends as soon as it fell alone."""
    world = Processor(conductor=Conductor(Capacity(configured=4)), slots=4)
    world.killers = {3}
    world.add([Work(ticket=n, batch=0, num_predict=10, max_attempts=1) for n in range(4)])
    ends = world.run()
    assert ends[3].state is ItemState.FAILED
    assert [ends[n].state for n in range(3)] == [ItemState.COMPLETED] * 3
    # All; one half, beside the other, which was cleared; its half; by itself.
    assert world.deaths <= 4


def test_a_lone_death_is_judged_when_a_second_has_passed() -> None:
    """Another in flight neither falls nor ends: nothing else goes until it is known that it will not."""
    conductor = Conductor(Capacity(configured=2))
    world = Simulator(conductor, slots=2, answer=Answer(tokens=400))
    world.do(conductor.open(world.now))
    world.faults[0] = [Fault(error=DIED, after_tokens=2)]
    world.add(works(range(2)))
    world.run()
    world.audit.check_finished()
    fell_s = world.times(Release)[0] + 0.05 + 2 * 0.02
    assert world.times(Retry)[0] == pytest.approx(fell_s + WAKE_S, abs=0.03)
    # Its attempt was over when it fell, and not with the judgement.
    assert [retry.ago_s for retry in world.said(Retry)] == [pytest.approx(WAKE_S, abs=0.03)]
    assert world.ends[0].attempts == 2
    assert world.ends[1].attempts == 1
