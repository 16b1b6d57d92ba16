"""The conductor's promises, each shown by a scenario on a simulated backend."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.unit.core.simulator import Answer, Fault, Simulator, works
from unisono.core.capacity import Capacity
from unisono.core.commands import Abort, Command, End, Priority, Release, Retry, Stage, Terms, Work
from unisono.core.conductor import Conductor, ConductorSettings
from unisono.core.errors import (
    BackendBusyError,
    BackendStalledError,
    BackendUnavailableError,
    BatchDeadlineError,
    CancelledItemError,
    ConnectionLostError,
    ItemTimeoutError,
    OutOfMemoryError,
    PromptTooLongError,
    QueueTimeoutError,
    RunnerDiedError,
)
from unisono.core.exits import FREE_RESTAGES
from unisono.core.idle import IdleReason
from unisono.core.lifecycle import Phase
from unisono.core.model import ItemState, Slots, SlotSource

LOST = ConnectionLostError("the connection ended before the answer was whole")
CANCELLED = CancelledItemError("cancelled")


def simulate(
    *,
    configured: int | None = None,
    ceiling: int = 64,
    settings: ConductorSettings | None = None,
    slots: int = 4,
    answer: Answer | None = None,
    tells_held: bool = True,
) -> tuple[Conductor, Simulator]:
    """A conductor that is open, and its world."""
    conductor = Conductor(Capacity(configured=configured, ceiling=ceiling), settings)
    world = Simulator(conductor, slots=slots, answer=answer, tells_held=tells_held)
    world.do(conductor.open(world.now))
    return conductor, world


def finish(world: Simulator) -> dict[int, End]:
    """Runs to the end; nothing may be lost on the way."""
    world.run()
    world.audit.check_finished()
    return world.ends


# -- The schedule ------------------------------------------------------------------------------------------------


def test_first_wave_is_released_together() -> None:
    """All that fit are released in one go, once every one of them is staged, however long each took."""
    _, world = simulate(slots=8)
    world.staging_of = {n: 0.01 * n for n in range(8)}
    world.add(works(range(8)))
    ends = finish(world)
    assert world.waves == [tuple(range(8))]
    assert world.times(Release) == [pytest.approx(100.07)]
    assert {end.state for end in ends.values()} == {ItemState.COMPLETED}
    assert {end.attempts for end in ends.values()} == {1}


def test_nothing_goes_before_the_runner_is_open() -> None:
    """Items that are added to a closed conductor wait, and go when it opens."""
    conductor = Conductor(Capacity())
    world = Simulator(conductor)
    world.add(works(range(3)))
    assert world.log == []
    assert conductor.queued == 3
    assert conductor.phase(0) is Phase.QUEUED
    world.do(conductor.open(world.now))
    assert conductor.phase(0) is Phase.STAGING
    assert len(finish(world)) == 3
    assert conductor.phase(0) is Phase.ENDED


def test_requests_are_held_ready_ahead() -> None:
    """For each slot a request is staged while others are answered, and no more."""
    conductor, world = simulate(configured=4)
    world.add(works(range(40)))
    world.run(for_s=0.1)
    in_flight = conductor.in_flight
    staged = len(world.said(Stage)) - in_flight
    assert (in_flight, staged) == (5, 4)
    finish(world)


def test_what_falls_free_is_filled_at_once() -> None:
    """Whenever an item ends, the next is released in the same breath: no slot waits for a wave."""
    _, world = simulate(configured=4)
    world.answers = {n: Answer(tokens=5 + 3 * n) for n in range(5)}
    world.add(works(range(20)))
    finish(world)
    ended_at = world.times(End)
    # The first wave fills the slots, and one more follows it at once.
    refills = world.times(Release)[2:]
    assert len(refills) >= 15
    assert set(refills) <= set(ended_at)


def test_one_more_than_the_slots_closes_the_gap() -> None:
    """With known slots, one request more than these is in flight, and only one."""
    _, world = simulate(configured=4, answer=Answer(tokens=30))
    world.add(works(range(20)))
    finish(world)
    assert world.most_in_flight == 5


def test_successor_goes_two_tokens_before_the_end() -> None:
    """When all slots come to their num_predict, the second successor is released two tokens before the end."""
    _, world = simulate(configured=2, slots=2, answer=Answer(tokens=10))
    world.add([Work(ticket=n, batch=0, num_predict=10) for n in range(5)])
    finish(world)
    assert world.waves[:3] == [(0, 1), (2,), (3,)]
    first_token = 100.001 + 0.05 + 0.02
    assert world.times(Release)[2] == pytest.approx(first_token + 7 * 0.02)
    assert world.times(End)[0] == pytest.approx(first_token + 9 * 0.02)


@pytest.mark.parametrize(("tokens_left", "in_flight"), [(3, 3), (2, 4)])
def test_near_end_is_two_tokens(tokens_left: int, in_flight: int) -> None:
    """With three tokens left nobody follows yet, with two a successor for each slot does."""
    conductor = Conductor(Capacity(configured=2))
    conductor.add([Work(ticket=n, batch=0, num_predict=10) for n in range(6)], 0.0)
    conductor.open(0.0)
    for ticket in range(4):
        conductor.staged(ticket, ticket + 1, 0.0)
    for ticket in (0, 1) * (10 - tokens_left):
        conductor.spoke(ticket, ticket + 1, 1.0)
    assert conductor.in_flight == in_flight == conductor.limit


@pytest.mark.parametrize("num_predict", [None, -1, -2, 0])
def test_without_a_bound_nobody_is_near_its_end(num_predict: int | None) -> None:
    """An answer without a bound, or with one that means none, never sends its successor early."""
    conductor, world = simulate(configured=1, slots=1, answer=Answer(tokens=100))
    world.add([Work(ticket=n, batch=0, num_predict=num_predict) for n in range(6)])
    finish(world)
    assert world.most_in_flight == 2
    assert conductor.limit == 2


def test_near_end_never_doubles_more_than_the_slots() -> None:
    """When all slots near their end together, one successor a slot is released, no more."""
    _, world = simulate(configured=4, slots=4, answer=Answer(tokens=10))
    world.add([Work(ticket=n, batch=0, num_predict=10) for n in range(40)])
    finish(world)
    assert 5 < world.most_in_flight <= 8


def test_batches_take_turns() -> None:
    """A batch of 3 items that comes behind one of 100 is not behind all of these."""
    _, world = simulate(configured=2)
    world.add(works(range(100)))
    world.add(works(range(100, 103), batch=1))
    finish(world)
    order = [stage.ticket for stage in world.said(Stage)]
    assert max(order.index(ticket) for ticket in (100, 101, 102)) < 12


def test_items_of_one_batch_keep_their_order() -> None:
    """Within a batch, items are staged in the order in which they were added."""
    _, world = simulate(configured=3)
    world.add(works(range(50)))
    finish(world)
    assert [stage.ticket for stage in world.said(Stage)] == list(range(50))


def test_waves_are_numbered() -> None:
    """Every release of a runner has the next number, from 0."""
    _, world = simulate(configured=2)
    world.add(works(range(12)))
    finish(world)
    assert [release.wave for release in world.said(Release)] == list(range(len(world.waves)))


# -- How many ----------------------------------------------------------------------------------------------------


def test_limit_doubles_while_nobody_waits() -> None:
    """On a backend with more slots than anyone asked for, the limit goes 8, 16, 32, up to its ceiling."""
    conductor, world = simulate(ceiling=32, slots=100)
    limits: list[int] = []
    world.add(works(range(200)))
    while world.machine.next_alarm() is not None or not conductor.is_idle:
        if not limits or conductor.limit != limits[-1]:
            limits.append(conductor.limit)
        world.run(for_s=0.01)
    assert limits == [8, 16, 32]
    assert world.most_in_flight == 32
    assert len(world.ends) == 200


@pytest.mark.parametrize("slots", [1, 4, 8])
@pytest.mark.parametrize("items", [16, 40])
@pytest.mark.parametrize("shape", ["equal", "mixed", "heavy"])
def test_slots_are_learned_exactly(slots: int, items: int, shape: str) -> None:
    """One batch of 16 or 40 items tells the number of slots, whatever the lengths of its answers.

    Only 16 items on 8 slots tell nothing: the first 8 do not wait, and neither do the 8 that are left.
    """
    conductor, world = simulate(slots=slots)
    lengths = {"equal": lambda n: 20, "mixed": lambda n: 8 + 5 * (n * 7 % 5), "heavy": lambda n: (3, 6, 90, 9)[n % 4]}
    length: Callable[[int], int] = lengths[shape]
    world.answers = {n: Answer(tokens=length(n)) for n in range(items)}
    world.add(works(range(items)))
    finish(world)
    learned = Slots(count=slots, source=SlotSource.LEARNED)
    assert conductor.capacity.slots == (Slots() if (slots, items) == (8, 16) else learned)


def test_quick_answers_do_not_hide_slow_ones() -> None:
    """Three endless answers beside one slot that turns over quickly are four slots, not one."""
    conductor, world = simulate(slots=4)
    world.answers = {n: Answer(tokens=400 if n in (1, 2, 3) else 4) for n in range(40)}
    world.add(works(range(40)))
    world.run(for_s=3.0)
    assert conductor.capacity.slots.count in (0, 4)
    assert conductor.in_flight >= 4
    finish(world)
    assert conductor.capacity.slots.count == 4


def test_configured_number_wins() -> None:
    """A configured number of slots holds, whatever is seen or told."""
    conductor, world = simulate(configured=2, slots=8)
    conductor.capacity.told(5)
    world.add(works(range(20)))
    finish(world)
    assert conductor.capacity.slots == Slots(count=2, source=SlotSource.CONFIGURED)
    assert world.most_in_flight == 3


def test_answers_without_times_teach_nothing() -> None:
    """A backend that does not say when an item held its slot leaves the limit where it began."""
    conductor, world = simulate(slots=2, tells_held=False)
    world.add(works(range(30)))
    finish(world)
    assert conductor.capacity.slots == Slots()
    assert world.most_in_flight == 8


# -- Waiting for a wave ------------------------------------------------------------------------------------------


def test_straggler_does_not_hold_the_wave() -> None:
    """A wave goes after hold_patience_s without the one that is still being staged; that follows when it is ready."""
    _, world = simulate(slots=8, answer=Answer(tokens=100))
    world.staging_of[7] = 1.0
    world.add(works(range(8)))
    finish(world)
    assert world.waves == [tuple(range(7)), (7,)]
    assert world.times(Release) == [pytest.approx(100.251), pytest.approx(101.0)]


def test_wave_goes_early_when_all_that_fit_are_there() -> None:
    """Nobody waits for a straggler for whom there is no room anyway."""
    conductor, world = simulate(configured=1)
    world.staging_of[1] = 60.0
    world.add(works(range(2)))
    world.staging_of[0] = 0.0
    world.run(for_s=0.3)
    assert world.waves == [(0,)]
    assert conductor.in_flight + len(world.ends) == 1


def test_held_too_long_is_staged_anew() -> None:
    """A request that was held for hold_limit_s is closed and staged again, in its place, at no cost."""
    _, world = simulate(
        configured=1, slots=1, settings=ConductorSettings(hold_limit_s=5.0), answer=Answer(tokens=1, prompt_s=12)
    )
    world.add(works(range(5)))
    ends = finish(world)
    aborted = [(at, command.ticket) for at, command in world.log if isinstance(command, Abort)]
    assert [ticket for _, ticket in aborted[:4]] == [2, 2, 3, 3]
    assert [at for at, _ in aborted[:2]] == pytest.approx([105.003, 110.004])
    assert {end.attempts for end in ends.values()} == {1}
    assert [ticket for wave in world.waves for ticket in wave] == [0, 1, 2, 3, 4]


# -- Attempts ----------------------------------------------------------------------------------------------------


def test_failed_item_is_tried_again_after_growing_pauses() -> None:
    """A failure at the backend is followed by a pause that grows, then by another attempt."""
    _, world = simulate()
    world.faults[0] = [Fault(error=LOST), Fault(error=LOST)]
    world.add(works([0]))
    ends = finish(world)
    pauses = [retry.again_in_s for retry in world.said(Retry)]
    assert 0.125 <= pauses[0] < 0.25 <= pauses[1] < 0.5
    assert [retry.attempt for retry in world.said(Retry)] == [1, 2]
    assert [stage.attempt for stage in world.said(Stage)] == [1, 2, 3]
    assert ends[0] == End(ticket=0, state=ItemState.COMPLETED, attempts=3)


def test_gives_up_after_max_attempts() -> None:
    """The last attempt that is allowed ends the item with its error."""
    _, world = simulate()
    world.faults[0] = [Fault(error=LOST, after_tokens=2)] * 2
    world.add([Work(ticket=0, batch=0, max_attempts=2)])
    assert finish(world)[0] == End(ticket=0, state=ItemState.FAILED, attempts=2, error=LOST)


def test_callers_error_is_never_retried() -> None:
    """What the caller got wrong fails at once, though attempts are left."""
    _, world = simulate()
    wrong = PromptTooLongError("5,000 tokens in a context of 4,096")
    world.faults[0] = [Fault(error=wrong)]
    world.faults[1] = [Fault(error=wrong, place="staging")]
    world.add(works([0, 1]))
    ends = finish(world)
    assert ends[0] == End(ticket=0, state=ItemState.FAILED, attempts=1, error=wrong)
    assert ends[1] == End(ticket=1, state=ItemState.FAILED, attempts=0, error=wrong)
    assert world.said(Retry) == []


def test_backend_may_say_when_to_come_back() -> None:
    """The pause that the backend asked for is kept."""
    _, world = simulate()
    world.faults[0] = [Fault(error=BackendBusyError("503", retry_after_s=7.0))]
    world.add(works([0]))
    finish(world)
    first, second = world.times(Stage)
    assert second - first == pytest.approx(7.051, abs=0.1)


def test_retried_item_goes_before_those_that_never_went() -> None:
    """An item whose pause is over takes the head of its batch's line."""
    _, world = simulate(configured=1, slots=1)
    world.faults[0] = [Fault(error=LOST)]
    world.add(works(range(30)))
    finish(world)
    order = [stage.ticket for stage in world.said(Stage)]
    assert order.index(0, 1) < 10


def test_closed_while_held_is_staged_again_for_free() -> None:
    """A held connection that the other side closes costs no attempt and no pause."""
    _, world = simulate(configured=1, slots=1)
    world.faults[2] = [Fault(error=LOST, place="held", after_s=0.01)] * FREE_RESTAGES
    world.add([Work(ticket=n, batch=0, max_attempts=1) for n in range(4)])
    ends = finish(world)
    assert {end.state for end in ends.values()} == {ItemState.COMPLETED}
    assert ends[2].attempts == 1
    assert world.said(Retry) == []
    # Nothing is closed that the other side has closed already.
    assert world.said(Abort) == []


def test_server_that_always_closes_held_connections_costs_attempts_in_the_end() -> None:
    """Free stagings are bounded, so that such a server cannot keep an item for ever."""
    _, world = simulate()
    world.faults[0] = [Fault(error=LOST, place="staging")] * 100
    world.add([Work(ticket=0, batch=0, max_attempts=2)])
    ends = finish(world)
    assert ends[0] == End(ticket=0, state=ItemState.FAILED, attempts=0, error=LOST)
    assert len(world.said(Stage)) == 2 * (FREE_RESTAGES + 1)
    assert [retry.attempt for retry in world.said(Retry)] == [1]


def test_backend_that_is_away_costs_no_attempt() -> None:
    """An item that met no backend is back in the queue with all its attempts, also from the middle of an answer."""
    conductor, world = simulate()
    world.faults[0] = [Fault(error=BackendUnavailableError("refused"), after_tokens=n) for n in (0, 3)]
    world.add([Work(ticket=0, batch=0, max_attempts=1)])
    ends = finish(world)
    assert ends[0].state is ItemState.COMPLETED
    assert world.said(Retry) == []
    assert conductor.is_idle


def test_runner_that_dies_takes_nobody_with_it_for_good() -> None:
    """All items in flight when a runner dies are tried again and complete; those held are not touched."""
    conductor, world = simulate(configured=4)
    world.add(works(range(20)))
    world.run(for_s=0.15)
    flying = conductor.in_flight
    world.runner_dies(RunnerDiedError("signal: killed"))
    ends = finish(world)
    assert len(world.said(Retry)) == flying == 5
    assert {end.state for end in ends.values()} == {ItemState.COMPLETED}


def test_old_news_are_ignored() -> None:
    """News of an older staging, of an unknown item, or that fit no phase, change nothing."""
    conductor, world = simulate()
    world.faults[0] = [Fault(error=LOST)]
    world.add(works([0]))
    now = world.now
    stray = [
        conductor.spoke(0, 1, now),
        conductor.finished(0, 1, now, None),
        conductor.staged(0, 99, now),
        conductor.staged(7, 1, now),
        conductor.spoke(7, 1, now),
        conductor.failed(7, 1, LOST, now),
    ]
    assert stray == [[]] * 6
    assert conductor.phase(0) is Phase.STAGING
    world.run(for_s=0.12)
    assert conductor.phase(0) is Phase.WAITING
    assert conductor.failed(0, 1, LOST, world.now) == []
    ends = finish(world)
    assert ends[0] == End(ticket=0, state=ItemState.COMPLETED, attempts=2)
    assert conductor.finished(0, 2, world.now, None) == []


# -- Time limits -------------------------------------------------------------------------------------------------


def test_queue_timeout_ends_who_never_spoke() -> None:
    """An item that was answered nothing by then expires, wherever it is; whoever spoke in time goes on."""
    _, world = simulate(configured=1, slots=1, answer=Answer(tokens=100))
    world.add([Work(ticket=n, batch=0, speak_by_s=101.0) for n in range(5)])
    ends = finish(world)
    assert ends[0].state is ItemState.COMPLETED
    for n in range(1, 5):
        assert ends[n].state is ItemState.EXPIRED
        assert isinstance(ends[n].error, QueueTimeoutError)
    assert set(world.times(End)[:4]) == {101.0}
    # One waited at the backend, one was held, two were in our queue: connections close where there were any.
    assert [abort.ticket for abort in world.said(Abort)] == [1, 2]


def test_queue_timeout_is_met_for_good() -> None:
    """An item that has spoken once is not ended by its queue_timeout, though it must begin again."""
    _, world = simulate()
    world.faults[0] = [Fault(error=BackendBusyError("503", retry_after_s=5.0), after_tokens=1)]
    world.add([Work(ticket=0, batch=0, speak_by_s=101.0)])
    assert finish(world)[0].state is ItemState.COMPLETED


def test_item_timeout_is_silence_after_the_first_token() -> None:
    """Silence before the first token is no item_timeout; silence after it is, to the second."""
    _, world = simulate(slots=2)
    world.answers[0] = Answer(tokens=3, prompt_s=50.0)
    world.faults[1] = [Fault(after_tokens=2)]
    world.add([Work(ticket=n, batch=0, silence_s=0.7) for n in range(2)])
    ends = finish(world)
    assert ends[0].state is ItemState.COMPLETED
    assert ends[1].state is ItemState.EXPIRED
    assert isinstance(ends[1].error, ItemTimeoutError)
    assert [abort.ticket for abort in world.said(Abort)] == [1]
    assert world.times(End)[0] == pytest.approx(100.001 + 0.05 + 2 * 0.02 + 0.7)


@pytest.mark.parametrize(("stalled", "limit"), [(1, 4), (2, 2), (4, 2)])
def test_time_outs_lower_the_load_where_many_are_silent(stalled: int, limit: int) -> None:
    """One that falls silent while others speak has stalled by itself, and costs the others nothing."""
    conductor = Conductor(Capacity(configured=4))
    conductor.add([Work(ticket=n, batch=0, silence_s=1.0) for n in range(4)], 0.0)
    conductor.open(0.0)
    for ticket in range(4):
        conductor.staged(ticket, ticket + 1, 0.0)
    for ticket in range(4):
        conductor.spoke(ticket, ticket + 1, 0.1)
    for ticket in range(stalled, 4):
        conductor.spoke(ticket, ticket + 1, 1.0)
    ended = [command.ticket for command in conductor.tick(1.1) if isinstance(command, End)]
    assert ended == list(range(stalled))
    assert conductor.capacity.limit == limit


def test_batch_deadline_ends_items_in_every_phase() -> None:
    """At the batch's deadline everything that has not ended expires, speaking or not."""
    conductor, world = simulate(configured=1, slots=1)
    world.answers = {0: Answer(tokens=500)}
    world.faults[1] = [Fault(error=BackendBusyError("503", retry_after_s=30.0), place="answer")]
    world.staging_of[2] = 60.0
    world.add([Work(ticket=n, batch=0, end_by_s=105.0) for n in range(6)])
    world.run(for_s=4.9)
    assert conductor.phase(0) is Phase.SPEAKING
    ends = finish(world)
    assert {end.state for end in ends.values()} == {ItemState.EXPIRED}
    assert all(isinstance(end.error, BatchDeadlineError) for end in ends.values())
    assert world.times(End) == [105.0] * 6
    # Two at the backend, one being staged; the others had no connection.
    assert sorted(abort.ticket for abort in world.said(Abort)) == [0, 1, 2]


def test_stalled_backend_is_given_up() -> None:
    """Requests at a backend that says nothing to anybody for stall_s are closed and tried again."""
    conductor, world = simulate(slots=2, configured=2, settings=ConductorSettings(stall_s=20.0))
    for n in range(3):
        world.faults[n] = [Fault()]
    world.add(works(range(5)))
    ends = finish(world)
    assert [abort.ticket for abort in world.said(Abort)] == [0, 1, 2]
    assert world.times(Abort) == pytest.approx([120.001] * 3)
    assert all(isinstance(retry.error, BackendStalledError) for retry in world.said(Retry))
    assert {end.state for end in ends.values()} == {ItemState.COMPLETED}
    assert conductor.is_idle


def test_stall_counts_from_the_release_for_those_who_follow() -> None:
    """Items that take the place of stalled ones have all of stall_s for themselves; and fewer go at a time."""
    _, world = simulate(slots=2, configured=2, settings=ConductorSettings(stall_s=20.0))
    for n in range(9):
        world.faults[n] = [Fault()] * 3
    world.add([Work(ticket=n, batch=0, max_attempts=1) for n in range(9)])
    ends = finish(world)
    assert [sorted(wave) for wave in world.waves] == [[0, 1], [2], [3], [4], [5], [6], [7], [8]]
    assert sorted(set(world.times(End))) == [pytest.approx(100.001 + 20.0 * k) for k in (1, 2, 3, 4)]
    assert all(isinstance(end.error, BackendStalledError) for end in ends.values())


def test_one_that_speaks_is_proof_of_life_for_all() -> None:
    """While anybody is answered, a long silence for the others is not a stall."""
    _, world = simulate(slots=2, settings=ConductorSettings(stall_s=5.0), answer=Answer(tokens=400))
    world.answers[1] = Answer(tokens=1, prompt_s=7.9)
    world.add(works(range(2)))
    ends = finish(world)
    assert {end.attempts for end in ends.values()} == {1}


def test_tick_at_every_alarm_makes_progress_whatever_the_fractions() -> None:
    """A limit is met exactly at the moment that next_alarm names, whatever rounding does to sums of seconds."""
    for thousandth in range(200):
        conductor = Conductor(Capacity(configured=1), ConductorSettings(stall_s=0.7, hold_limit_s=0.3))
        start = thousandth / 1000
        conductor.add([Work(ticket=n, batch=0, silence_s=0.1, max_attempts=1) for n in range(4)], start)
        conductor.open(start)
        for serial in (1, 2, 3):
            conductor.staged(serial - 1, serial, start)
        conductor.spoke(0, 1, start + 0.001)
        said = 0
        while (alarm := conductor.next_alarm()) is not None and said < 50:
            said += len(conductor.tick(alarm))
            later = conductor.next_alarm()
            assert later is None or later > alarm
        assert said >= 4


def test_alarms_of_those_who_ended_ring_for_nobody() -> None:
    """The queue_timeout of an item that has ended comes and goes, as that of one that has spoken does."""
    conductor, world = simulate()
    world.answers[0] = Answer(tokens=500)
    world.add([Work(ticket=0, batch=0, speak_by_s=103.0), Work(ticket=1, batch=0, speak_by_s=104.0)])
    world.run(for_s=2.0)
    assert set(world.ends) == {1}
    assert conductor.next_alarm() == 103.0
    assert conductor.tick(105.0) == []
    assert finish(world)[0].state is ItemState.COMPLETED


def ticks_until_something_happens(conductor: Conductor) -> int:
    """How often a tick at next_alarm is needed, with the clock standing just there, until it says something."""
    for ticks in range(1, 100):
        alarm = conductor.next_alarm()
        assert alarm is not None
        if conductor.tick(alarm):
            return ticks
    pytest.fail("the alarm rings for nothing")


@pytest.mark.parametrize("limit", ["hold_patience_s", "hold_limit_s", "stall_s"])
def test_limits_are_met_at_their_alarm(limit: str) -> None:
    """A wave's patience, a held request's age and a stall are each acted on at the first ring of their alarm."""
    for thousandth in range(300):
        start = thousandth / 1000
        conductor = Conductor(Capacity(configured=2), ConductorSettings(**{limit: 0.1}))  # type: ignore[arg-type]  # each is a number
        conductor.add(works(range(1 if limit == "stall_s" else 4)), start)
        conductor.open(start)
        conductor.staged(0, 1, start)
        if limit == "hold_limit_s":
            for serial in (2, 3, 4):
                conductor.staged(serial - 1, serial, start)
        assert ticks_until_something_happens(conductor) == 1


def test_runner_that_was_just_opened_has_all_of_the_stall_limit() -> None:
    """Items that were at the backend while its runner was not ready are given stall_s from when it is ready again."""
    conductor = Conductor(Capacity(configured=1), ConductorSettings(stall_s=10.0))
    conductor.add(works([0]), 0.0)
    conductor.open(0.0)
    conductor.staged(0, 1, 0.0)
    conductor.shut(0.0)
    conductor.open(9.0)
    assert conductor.tick(18.0) == []
    assert len(conductor.tick(19.0)) == 2


# -- Cancelling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "has_connection"),
    [
        (Phase.QUEUED, False),
        (Phase.STAGING, True),
        (Phase.STAGED, True),
        (Phase.RELEASED, True),
        (Phase.SPEAKING, True),
        (Phase.WAITING, False),
    ],
)
def test_cancel_closes_a_connection_where_there_is_one(phase: Phase, *, has_connection: bool) -> None:
    """An item is cancelled in any phase; its connection is closed exactly where it has one."""
    conductor, world = simulate(configured=1, slots=1)
    ticket = {Phase.QUEUED: 9, Phase.STAGING: 2, Phase.STAGED: 2, Phase.RELEASED: 1, Phase.SPEAKING: 0}.get(phase, 5)
    world.answers[0] = Answer(tokens=50)
    if phase is Phase.STAGING:
        world.staging_of[2] = 9.0
    if phase is Phase.WAITING:
        world.faults[5] = [Fault(error=BackendBusyError("503", retry_after_s=60.0))]
        world.add(works([5]))
        world.run(for_s=1.0)
    else:
        world.add(works(range(10)))
        world.run(for_s=0.3)
    assert conductor.phase(ticket) is phase
    before = len(world.log)
    world.do(conductor.stop([ticket], ItemState.CANCELLED, CANCELLED, world.now))
    said = [command for _, command in world.log[before:] if not isinstance(command, (Stage, Release))]
    serial = next((s.serial for s in world.said(Stage) if s.ticket == ticket), 0)
    end = End(ticket=ticket, state=ItemState.CANCELLED, attempts=said[-1].attempts, error=CANCELLED)  # type: ignore[union-attr]
    assert said == ([Abort(ticket=ticket, serial=serial)] if has_connection else []) + [end]
    assert end.attempts == (1 if phase in (Phase.RELEASED, Phase.SPEAKING, Phase.WAITING) else 0)
    # Cancelled again: nothing.
    assert conductor.stop([ticket, 777], ItemState.CANCELLED, CANCELLED, world.now) == []
    finish(world)


def test_cancelled_slot_goes_to_the_next() -> None:
    """When an item in flight is cancelled, one that is held goes in its place, in the same breath."""
    conductor, world = simulate(configured=1, slots=1, answer=Answer(tokens=500))
    world.add(works(range(4)))
    world.run(for_s=1.0)
    world.do(conductor.stop([0], ItemState.CANCELLED, CANCELLED, world.now))
    assert world.waves[-1] == (2,)
    assert world.times(Release)[-1] == world.now


def test_all_are_cancelled_at_once() -> None:
    """stop_all ends every item, and nothing is left to wait for."""
    conductor, world = simulate()
    world.add([Work(ticket=n, batch=0, end_by_s=9e9) for n in range(100)])
    world.run(for_s=0.1)
    world.do(conductor.stop_all(ItemState.CANCELLED, CANCELLED, world.now))
    assert len(world.ends) == 100
    assert conductor.is_idle
    assert not conductor.has_work
    assert conductor.next_alarm() is None
    world.audit.check_finished()


# -- Closing and parking -----------------------------------------------------------------------------------------


def test_shut_takes_back_what_is_held_in_its_order() -> None:
    """Closing a conductor lets what is in flight end, closes held connections, and forgets nobody's place."""
    conductor, world = simulate(configured=2, slots=2)
    world.staging_of = {4: 2.0}
    world.add(works(range(10)))
    world.run(for_s=0.1)
    world.do(conductor.shut(world.now))
    assert [abort.ticket for abort in world.said(Abort)] == [3, 4]
    world.run()
    assert sorted(world.ends) == [0, 1, 2]
    assert conductor.has_work
    world.staging_of = {}
    already = len(world.said(Stage))
    world.do(conductor.open(world.now))
    finish(world)
    assert [stage.ticket for stage in world.said(Stage)[already:]] == [3, 4, 5, 6, 7, 8, 9]


def test_parked_batch_stands_aside() -> None:
    """Nothing more of a parked batch goes until it is unparked; others do, and its own in flight end."""
    conductor, world = simulate(configured=2, slots=2)
    world.add(works(range(20)))
    world.run(for_s=0.01)
    conductor.park(0)
    conductor.park(0)
    world.add(works(range(20, 24), batch=1))
    world.run()
    assert set(range(20, 24)) <= set(world.ends)
    mine = [ticket for ticket in world.ends if ticket < 20]
    # The three in flight; those that were held wait.
    assert sorted(mine) == [0, 1, 2]
    world.add(works([24]))
    world.do(conductor.stop([10, 24], ItemState.CANCELLED, CANCELLED, world.now))
    assert not conductor.has_work
    assert not conductor.is_idle
    world.do(conductor.unpark(0, world.now))
    assert len(finish(world)) == 25


def test_slots_that_a_parked_batch_leaves_are_not_being_refilled() -> None:
    """Their time is counted before it goes on, by why they were idle until then."""
    conductor, world = simulate(configured=2, slots=2)
    conductor.park(0)
    world.add(works(range(4)))
    world.run(for_s=5.0)
    world.do(conductor.unpark(0, world.now))
    assert len(finish(world)) == 4
    idle_s = conductor.figures.idle_s
    assert sum(idle_s.values()) > 2 * 5.0 - 0.1
    assert idle_s.get(IdleReason.REFILL, 0.0) < 1.0


def test_empty_batch_is_parked_and_unparked() -> None:
    """A batch without items can be parked: what comes meanwhile waits. Unparking what is not parked is nothing."""
    conductor, world = simulate()
    conductor.park(3)
    world.add(works([0], batch=3))
    world.run(for_s=5.0)
    assert world.log == []
    world.do(conductor.unpark(3, world.now))
    assert len(finish(world)) == 1
    assert conductor.unpark(3, world.now) == []


def test_cancelled_item_of_a_parked_batch_ends() -> None:
    """Items of a parked batch can be cancelled, to the last."""
    conductor, world = simulate()
    conductor.park(0)
    world.add(works(range(3)))
    world.do(conductor.stop_all(ItemState.CANCELLED, CANCELLED, world.now))
    world.audit.check_finished()
    assert conductor.unpark(0, world.now) == []


# -- Size --------------------------------------------------------------------------------------------------------


def test_fifty_thousand_items_are_added_run_and_finished_in_seconds() -> None:
    """The cost of an item does not grow with the number of items."""
    conductor = Conductor(Capacity(configured=8))
    began = time.perf_counter()
    queue = list(conductor.add([Work(ticket=n, batch=n % 7, end_by_s=1e9) for n in range(50_000)], 0.0))
    queue += conductor.open(0.0)
    serials: dict[int, int] = {}
    ended = 0
    while queue:
        command = queue.pop()
        match command:
            case Stage(ticket=ticket, serial=serial):
                serials[ticket] = serial
                queue += conductor.staged(ticket, serial, 1.0)
            case Release(tickets=tickets):
                for ticket in tickets:
                    queue += conductor.spoke(ticket, serials[ticket], 1.0)
                    queue += conductor.finished(ticket, serials[ticket], 1.0, None)
            case End():
                ended += 1
            case _:
                pytest.fail(f"nothing was to go wrong: {command}")
    assert ended == 50_000
    assert conductor.next_alarm() is None
    # Five as a rule; counting branches takes four times as long, and other work on the cores again.
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize("is_reversed", [False, True])
def test_fifty_thousand_queued_items_are_cancelled_in_seconds(*, is_reversed: bool) -> None:
    """Cancelling is as cheap from the end of a line as from its head."""
    conductor = Conductor(Capacity())
    tickets = list(range(50_000))
    conductor.add(works(tickets), 0.0)
    conductor.open(0.0)
    if is_reversed:
        tickets.reverse()
    began = time.perf_counter()
    commands = conductor.stop(tickets, ItemState.CANCELLED, CANCELLED, 1.0)
    assert time.perf_counter() - began < 10
    assert sum(1 for command in commands if isinstance(command, End)) == 50_000
    assert conductor.is_idle


def test_out_of_memory_lowers_what_is_in_flight() -> None:
    """The item is tried again, and half as many go at a time until it has gone well for a while."""
    conductor, world = simulate(configured=4, slots=4)
    world.faults[0] = [Fault(error=OutOfMemoryError("CUDA error: out of memory"), place="answer", after_tokens=2)]
    world.add(works(range(30)))
    world.run(for_s=0.2)
    assert conductor.capacity.limit == 2
    ends = finish(world)
    assert {end.state for end in ends.values()} == {ItemState.COMPLETED}
    assert ends[0].attempts == 2
    assert conductor.capacity.limit == 4


def test_others_go_while_one_that_ended_the_runner_waits_for_its_next_attempt() -> None:
    """It runs apart when its pause is over; until then nobody waits for it."""
    conductor, world = simulate(configured=2, slots=2)
    world.faults[0] = [Fault(error=RunnerDiedError("killed"), place="answer", after_tokens=1)]
    world.add(works([0]))
    world.run(for_s=0.08)
    assert conductor.phase(0) is Phase.WAITING
    world.add(works([1], batch=1))
    world.run(for_s=0.05)
    assert conductor.phase(1) in (Phase.RELEASED, Phase.SPEAKING)
    ends = finish(world)
    assert (ends[0].attempts, ends[1].attempts) == (2, 1)
    assert {end.state for end in ends.values()} == {ItemState.COMPLETED}


def test_single_requests_that_are_cancelled_leave_nothing_behind() -> None:
    """Neither they nor their batches are remembered: callers come and go for ever."""
    conductor, world = simulate(configured=2, slots=2, answer=Answer(tokens=50))
    world.add(works([0]))
    world.run(for_s=0.01)
    for n in range(1, 21):
        world.add(works([n], batch=n, is_single=True))
    world.do(conductor.stop(range(1, 21), ItemState.CANCELLED, CANCELLED, world.now))
    assert len(conductor._schedule.room.batches) == 1


def test_what_others_have_displaced_is_not_held_for_ever() -> None:
    """With one lane, the third that is held for it sends the first two back: two connections for each lane."""
    conductor = Conductor(Capacity(configured=1))

    def staged(commands: list[Command]) -> list[int]:
        found = [command for command in commands if isinstance(command, Stage)]
        for stage in found:
            commands += conductor.staged(stage.ticket, stage.serial, 1.0)
        return [stage.ticket for stage in found]

    _ = conductor.open(0.0)
    low, normal, high = (Terms(priority=priority) for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH))
    # One sits, and one stands at the door; the others are held.
    for ticket, terms in enumerate([low, low, low, normal]):
        assert staged(conductor.add([Work(ticket=ticket, batch=ticket, terms=terms)], 1.0)) == [ticket]
    assert [conductor.phase(ticket) for ticket in range(4)] == [Phase.RELEASED] * 2 + [Phase.STAGED] * 2
    commands = conductor.add([Work(ticket=4, batch=4, terms=high)], 1.0)
    assert staged(commands) == [4]
    assert [command.ticket for command in commands if isinstance(command, Abort)] == [2, 3]


def test_tokens_at_the_backend_are_bounded() -> None:
    """Of items that reserve 100 tokens each, two fit into 250; by itself one always may."""
    conductor = Conductor(Capacity(configured=4))
    conductor.limit_tokens(250)
    world = Simulator(conductor, slots=4)
    world.do(conductor.open(world.now))
    world.add(works(range(6), num_predict=100))
    _ = finish(world)
    assert world.most_in_flight == 2
