"""The arbiter's promises, each shown by a scenario on a simulated backend."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from tests.unit.core.simulator import Answer, Fault, Simulator, works
from unisono.core.arbiter import LOAD_ATTEMPTS, MAX_PLACES, Arbiter, ArbiterSettings, Away, Back, Load, Probe, Unload
from unisono.core.capacity import Capacity
from unisono.core.commands import Abort, End, Release, Retry, Stage, Work
from unisono.core.conductor import ConductorSettings
from unisono.core.errors import (
    BackendUnavailableError,
    CancelledItemError,
    ConnectionLostError,
    LoadFailedError,
    ModelNotFoundError,
    RunnerDiedError,
    UnisonoError,
)
from unisono.core.model import ItemState, RunnerOptions, RunnerSpec, Slots, SlotSource
from unisono.core.report import RunnerFigures

A, B, C = (RunnerSpec(backend="ollama", model=name, digest=f"sha256:{name}") for name in "abc")
AWAY = BackendUnavailableError("connection refused")
LOST = ConnectionLostError("the connection ended before the answer was whole")
CANCELLED = CancelledItemError("cancelled")


def simulate(
    *,
    configured: int | None = None,
    settings: ArbiterSettings | None = None,
    slots: int = 4,
    answer: Answer | None = None,
    told_slots: int | None = None,
    load_s: float = 1.0,
) -> tuple[Arbiter, Simulator]:
    """An arbiter and its world."""
    arbiter = Arbiter(lambda _: Capacity(configured=configured), settings)
    return arbiter, Simulator(arbiter, slots=slots, answer=answer, told_slots=told_slots, load_s=load_s)


def finish(world: Simulator) -> dict[int, End]:
    """Runs to the end; nothing may be lost on the way."""
    world.run()
    world.audit.check_finished()
    return world.ends


def story(world: Simulator) -> list[str]:
    """Loads, releases and unloads in order, by the first letter of the runner or of who was released."""
    told: list[str] = []
    for command in (said.command for said in world.log):
        match command:
            case Load(runner=runner):
                told.append(f"load {runner.model}")
            case Unload(runner=runner):
                told.append(f"unload {runner.model}")
            case Release(tickets=tickets):
                told.append("release " + " ".join(map(str, sorted(tickets))))
            case Probe():
                told.append("probe")
            case _:
                pass
    return told


# -- Load first --------------------------------------------------------------------------------------------------


def test_nothing_is_staged_before_the_runner_is_loaded() -> None:
    """A cold runner is loaded first, once; then its first wave goes together."""
    arbiter, world = simulate(slots=8)
    world.add(works(range(8)), A)
    assert arbiter.queued == 8
    assert [type(said.command) for said in world.log] == [Load]
    world.add(works([8]), A)
    assert world.loads == 1
    finish(world)
    assert min(world.times(Stage)) == 101.0
    assert story(world)[:2] == ["load a", "release 0 1 2 3 4 5 6 7"]
    assert world.loads == 1


def test_who_was_just_used_needs_no_load() -> None:
    """Within ready_s after its last item a runner counts as loaded; after that it is loaded again."""
    _, world = simulate(settings=ArbiterSettings(ready_s=5.0))
    world.add(works([0]), A)
    world.run()
    world.run(for_s=4.9)
    world.add(works([1]), A, is_loaded=True)
    world.run()
    assert world.loads == 1
    world.run(for_s=5.1)
    world.add(works([2]), A, is_loaded=True)
    finish(world)
    assert world.loads == 2


def test_who_was_just_used_and_is_gone_is_loaded_again() -> None:
    """The server may have been started again meanwhile. Who is at work is there, whatever an older look said."""
    arbiter, world = simulate(slots=2)
    world.add(works(range(20)), A)
    world.run(for_s=1.2)
    assert world.loads == 1
    world.add(works([20]), A)
    world.run()
    assert world.loads == 1
    assert arbiter.capacity(A).slots.source is SlotSource.LEARNED
    world.add(works([21]), A)
    finish(world)
    assert world.loads == 2
    assert arbiter.capacity(A).slots == Slots(count=2, source=SlotSource.REMEMBERED)


def test_who_may_have_made_room_is_loaded_again() -> None:
    """A runner that was just used is loaded again once another has been: memory may hold only one of them."""
    _, world = simulate(settings=ArbiterSettings(ready_s=1000.0))
    for n, runner in enumerate((A, B, A, A)):
        world.add(works([n]), runner, is_loaded=n > 1)
        world.run()
    finish(world)
    assert [load.runner.model for load in world.said(Load)] == ["a", "b", "a"]


def test_told_slots_are_used_from_the_first_wave_on() -> None:
    """Where loading tells the number of slots, the first wave is as many, and the limit one more."""
    arbiter, world = simulate(slots=3, told_slots=3)
    world.add(works(range(20)), A)
    finish(world)
    assert arbiter.capacity(A).slots == Slots(count=3, source=SlotSource.TOLD)
    assert len(world.waves[0]) == 3
    assert world.most_in_flight == 4


def test_load_of_another_process_forgets_what_the_one_before_showed() -> None:
    """Its number is remembered until it is confirmed; a runner that was found there is the same one."""
    arbiter, world = simulate(slots=2)
    world.add(works(range(20)), A)
    finish(world)
    learned = Slots(count=2, source=SlotSource.LEARNED)
    assert (arbiter.capacity(A).slots, arbiter.capacity(A).at_least) == (learned, 2)
    _ = arbiter.loaded(A, world.now, was_loaded=True)
    assert (arbiter.capacity(A).slots, arbiter.capacity(A).at_least) == (learned, 2)
    _ = arbiter.loaded(A, world.now)
    assert arbiter.capacity(A).slots == Slots(count=2, source=SlotSource.REMEMBERED)
    assert arbiter.capacity(A).at_least == 0


def test_failed_load_is_tried_again() -> None:
    """A load that fails for a reason that may pass is repeated after a growing pause, and the items complete."""
    _, world = simulate()
    world.load_errors.extend([LoadFailedError("out of memory")] * (LOAD_ATTEMPTS - 1))
    world.add(works(range(3)), A)
    ends = finish(world)
    assert {end.state for end in ends.values()} == {ItemState.COMPLETED}
    assert world.loads == LOAD_ATTEMPTS
    first, second, third = world.times(Load)
    assert 1.125 <= second - first <= 1.25 <= third - second <= 1.5


def test_load_that_never_works_fails_its_items() -> None:
    """After three loads that failed, every item of the runner fails with the load's error; other runners go on."""
    _, world = simulate()
    error = LoadFailedError("out of memory")
    world.load_errors.extend([error] * LOAD_ATTEMPTS)
    world.add(works(range(3)), A)
    world.add(works(range(3, 6)), B)
    ends = finish(world)
    assert [ends[n].error for n in range(3)] == [error] * 3
    assert {ends[n].state for n in range(3, 6)} == {ItemState.COMPLETED}
    # The next batch has its three loads again.
    world.load_errors.extend([error] * (LOAD_ATTEMPTS - 1))
    world.add(works([6]), A)
    assert finish(world)[6].state is ItemState.COMPLETED


def test_load_that_cannot_work_fails_at_once() -> None:
    """An error of the caller's while loading is not tried again."""
    _, world = simulate()
    error = ModelNotFoundError("no model 'a'")
    world.load_errors.append(error)
    world.add(works([0]), A)
    assert finish(world)[0] == End(ticket=0, state=ItemState.FAILED, attempts=0, error=error)
    assert world.loads == 1


def test_load_is_not_broken_off() -> None:
    """When all items are cancelled while their model loads, the load goes on, and no other begins before its end."""
    arbiter, world = simulate(load_s=10.0)
    world.add(works([0]), A)
    world.run(for_s=1.0)
    world.do(arbiter.stop([0], ItemState.CANCELLED, CANCELLED, world.now))
    world.add(works([1]), B)
    assert world.loads == 1
    finish(world)
    assert world.times(Load) == [100.0, 110.0]


def test_late_word_of_a_load_changes_nothing() -> None:
    """Word of a load that nobody waits for any more neither opens nor closes anything."""
    arbiter, world = simulate()
    assert arbiter.loaded(A, world.now) == []
    assert arbiter.load_failed(B, LoadFailedError("no"), world.now) == []
    world.add(works([0]), C)
    assert arbiter.loaded(A, world.now) == []
    assert finish(world)[0].state is ItemState.COMPLETED


# -- Turns -------------------------------------------------------------------------------------------------------


def test_one_runner_at_a_time() -> None:
    """The second runner is loaded when the last item of the first has ended."""
    _, world = simulate()
    world.add(works(range(10)), A)
    world.add(works(range(10, 20)), B)
    finish(world)
    last_of_a = max(at for at, command in world.log if isinstance(command, End) and command.ticket < 10)
    assert world.times(Load) == [100.0, last_of_a]


def test_loaded_runner_goes_first() -> None:
    """When a turn ends, a runner that is in memory goes before one that has waited longer."""
    _, world = simulate()
    world.add(works([0]), A)
    world.add(works([1]), B)
    world.run(for_s=0.5)
    world.add(works([2]), C, is_loaded=True)
    finish(world)
    assert story(world) == ["load a", "release 0", "load c", "release 2", "load b", "release 1"]


def test_otherwise_who_waited_longest() -> None:
    """Among runners that are not in memory, they go in the order in which their work came."""
    _, world = simulate()
    world.add(works([0]), C)
    world.add(works([1]), B)
    world.run(for_s=0.1)
    world.add(works([2]), A)
    finish(world)
    assert [load.runner.model for load in world.said(Load)] == ["c", "b", "a"]


def test_turns_are_cut_into_slices() -> None:
    """While another waits, a turn ends after turn_s: what is held goes back, and what is in flight ends first."""
    _, world = simulate(configured=2, slots=2, settings=ArbiterSettings(turn_s=5.0), answer=Answer(tokens=40))
    world.add(works(range(40)), A)
    world.add(works(range(40, 80)), B)
    ends = finish(world)
    assert {end.state for end in ends.values()} == {ItemState.COMPLETED}
    assert {end.attempts for end in ends.values()} == {1}
    turns = [load.runner.model for load in world.said(Load)]
    assert turns[:6] == ["a", "b", "a", "b", "a", "b"]
    for first, second in pairwise(world.times(Load)[:6]):
        # Load, the slice, and the two answers' time of those in flight.
        assert 1.0 + 5.0 <= second - first <= 1.0 + 5.0 + 2.0
    assert len(world.said(Abort)) >= 6


def test_last_runner_in_a_contest_goes_on_without_a_break() -> None:
    """A turn that was to end goes on when the others' items are gone."""
    arbiter, world = simulate(configured=2, slots=2, settings=ArbiterSettings(turn_s=5.0), answer=Answer(tokens=100))
    world.add(works(range(20)), A)
    world.add(works([99]), B)
    world.run(for_s=6.5)
    assert len(world.said(Abort)) == 2
    world.do(arbiter.stop([99], ItemState.CANCELLED, CANCELLED, world.now))
    finish(world)
    assert world.loads == 1
    # It does so for another whole slice.
    assert story(world)[0] == "load a"


def test_slice_that_is_contested_no_more_is_not_cut() -> None:
    """turn_s says nothing while nobody else waits."""
    _, world = simulate(configured=2, slots=2, settings=ArbiterSettings(turn_s=2.0), answer=Answer(tokens=40))
    world.add(works(range(40)), A)
    finish(world)
    assert world.loads == 1
    assert world.said(Abort) == []


def test_turn_ends_for_good_when_everything_ends_at_once() -> None:
    """A batch on two runners, cancelled while one hands over, leaves no turn behind: whoever comes next loads."""
    arbiter, world = simulate(configured=1, slots=1, settings=ArbiterSettings(turn_s=2.0), answer=Answer(tokens=500))
    world.add(works(range(3)), A)
    world.add(works(range(3, 6)), B)
    world.run(for_s=5.0)
    world.do(arbiter.stop(range(6), ItemState.CANCELLED, CANCELLED, world.now))
    world.run(for_s=3600.0)
    world.add(works([6]), A)
    finish(world)
    assert story(world)[-2:] == ["load a", "release 6"]


def test_nobody_starves_behind_loaded_runners() -> None:
    """Two runners in memory that never run out of work do not keep a third from its turn."""
    _, world = simulate(configured=1, slots=1, settings=ArbiterSettings(turn_s=5.0))
    world.add(works(range(100, 500)), A, is_loaded=True)
    world.add(works(range(500, 900)), B, is_loaded=True)
    world.add(works([0]), C)
    world.run(for_s=30.0)
    assert 0 in world.ends


def test_items_in_flight_elsewhere_never_overlap() -> None:
    """At no moment do two runners have items at the backend."""
    arbiter, world = simulate(settings=ArbiterSettings(turn_s=1.0), load_s=0.1)
    for n, runner in enumerate((A, B, C)):
        world.add(works(range(n * 20, n * 20 + 20), batch=n), runner)
    flying: set[int] = set()
    while not all(n in world.ends for n in range(60)):
        world.run(for_s=0.02)
        flying = {n for wave in world.waves for n in wave} - set(world.ends)
        assert len({n // 20 for n in flying}) <= 1
    assert arbiter.in_flight == 0
    assert arbiter.runners() == [A, B, C]


def test_waiting_for_the_next_attempt_does_not_keep_the_turn() -> None:
    """While a runner's only item waits for its next attempt, another works; then it is loaded again where needed."""
    _, world = simulate(settings=ArbiterSettings(ready_s=0.0))
    world.faults[0] = [Fault(error=LOST)]
    world.add(works([0]), A)
    world.add(works([1]), B)
    ends = finish(world)
    assert ends[0].attempts == 2
    assert story(world) == ["load a", "release 0", "load b", "release 1", "load a", "release 0"]


def test_same_model_with_other_options_is_another_runner() -> None:
    """Runner options tell runners apart."""
    arbiter, world = simulate()
    other = RunnerSpec(backend="ollama", model="a", digest="sha256:a", options=RunnerOptions(num_ctx=2048))
    world.add(works([0]), A)
    world.add(works([1]), other)
    assert arbiter.runner_of(1) is other
    finish(world)
    assert world.loads == 2
    with pytest.raises(KeyError):
        arbiter.runner_of(1)


# -- Taking out of memory ----------------------------------------------------------------------------------------


def test_unloads_after_the_last_item() -> None:
    """A runner whose batch asked for it leaves memory once, after its last item, and is loaded anew for the next."""
    _, world = simulate()
    world.add(works(range(3)), A, unload_after=True)
    world.run()
    assert story(world) == ["load a", "release 0 1 2", "unload a"]
    world.add(works([3]), A)
    finish(world)
    assert story(world)[3:] == ["load a", "release 3"]


def test_stays_while_anybody_needs_it() -> None:
    """Nobody's wish to unload takes the model from another batch's items."""
    _, world = simulate()
    world.add(works([0]), A, unload_after=True)
    world.add(works(range(1, 30), batch=1), A)
    finish(world)
    assert story(world)[-1] == "unload a"
    assert len(world.said(Unload)) == 1


def test_unloads_though_the_last_item_was_cancelled_while_it_waited() -> None:
    """The wish holds when the runner's turn was over before its last item ended."""
    arbiter, world = simulate()
    world.faults[0] = [Fault(error=ConnectionLostError("cut", retry_after_s=100.0))]
    world.add(works([0]), A, unload_after=True)
    world.run(for_s=10.0)
    assert world.said(Unload) == []
    world.do(arbiter.stop([0], ItemState.CANCELLED, CANCELLED, world.now))
    assert story(world)[-1] == "unload a"


def test_what_was_never_loaded_is_not_unloaded() -> None:
    """Items that were cancelled before their runner's turn leave the backend alone."""
    arbiter, world = simulate()
    world.add(works([0]), A)
    world.add(works([1]), B, unload_after=True)
    world.do(arbiter.stop([1], ItemState.CANCELLED, CANCELLED, world.now))
    finish(world)
    assert world.said(Unload) == []


# -- A backend that is away --------------------------------------------------------------------------------------


def test_away_pauses_everything_and_costs_nothing() -> None:
    """Refused connections pause all items; when the backend is back, all are loaded for and complete, uncharged."""
    arbiter, world = simulate()
    world.away_until_s = 110.0
    world.add([Work(ticket=n, batch=0, max_attempts=1) for n in range(20)], A)
    world.add([Work(ticket=n, batch=0, max_attempts=1) for n in range(20, 30)], B)
    world.run(for_s=5.0)
    was_away = arbiter.is_away
    assert was_away
    assert world.said(Stage) == []
    ends = finish(world)
    assert not arbiter.is_away
    assert {end.state for end in ends.values()} == {ItemState.COMPLETED}
    assert {end.attempts for end in ends.values()} == {1}
    assert world.said(Retry) == []


@pytest.mark.parametrize("flaps", [False, True])
def test_an_outage_is_told_once(*, flaps: bool) -> None:
    """When it begins, with who waits, and when it is over, and after how long; though it seems back meanwhile."""
    _, world = simulate(configured=4)
    world.add(works(range(40)), A)
    world.run(for_s=2.0)
    done, began_s = len(world.ends), world.now
    world.away_until_s = world.now + 20.0
    world.answers_probes_while_away = flaps
    world.runner_dies(LOST)
    finish(world)
    (away,), (back,) = world.said(Away), world.said(Back)
    assert away.items == 40 - done
    assert isinstance(away.error, BackendUnavailableError)
    assert back.after_s == pytest.approx(world.times(Back)[0] - world.times(Away)[0])
    assert began_s + 20.0 <= world.times(Back)[0]
    # The next one is told again.
    world.away_until_s = world.now + 5.0
    world.add(works(range(40, 50)), A)
    finish(world)
    assert len(world.said(Away)) == len(world.said(Back)) == 2


def test_away_in_the_middle_of_a_batch() -> None:
    """A backend that is killed and comes back loses nobody: finished items stay, those in flight are tried again."""
    arbiter, world = simulate(configured=4)
    world.add(works(range(40)), A)
    world.run(for_s=2.0)
    done = set(world.ends)
    world.away_until_s = world.now + 7.0
    world.runner_dies(LOST)
    world.run(for_s=3.0)
    assert arbiter.is_away
    assert done
    ends = finish(world)
    assert {end.state for end in ends.values()} == {ItemState.COMPLETED}
    assert {ends[n].attempts for n in done} == {1}
    assert {end.attempts for end in ends.values()} == {1}
    assert sum(end.disturbed for end in ends.values()) == 5
    assert world.loads >= 2


def test_probes_grow_apart() -> None:
    """The backend is probed at once, then at growing intervals of up to 4 s."""
    _, world = simulate(settings=ArbiterSettings(patience_s=60.0))
    world.away_until_s = 1e9
    world.add(works([0]), A)
    world.run()
    probes = world.times(Probe)
    assert probes[0] == pytest.approx(101.0)
    pauses = [later - sooner for sooner, later in pairwise(probes)]
    assert pauses[0] < 0.3
    assert pauses == pytest.approx(sorted(pauses))
    assert 2.0 < pauses[-1] <= 4.1


def test_patience_ends() -> None:
    """Who waits for an absent backend for patience_s fails with BACKEND_UNAVAILABLE; then nothing more is probed."""
    arbiter, world = simulate(settings=ArbiterSettings(patience_s=20.0))
    world.away_until_s = 1e9
    world.add(works(range(3)), A)
    world.add(works(range(3, 5)), B)
    ends = finish(world)
    assert {end.state for end in ends.values()} == {ItemState.FAILED}
    assert all(isinstance(end.error, BackendUnavailableError) for end in ends.values())
    assert "connection refused (waited 20 s for it)" in str(ends[0].error)
    assert world.times(End) == [121.0] * 5
    assert arbiter.is_away
    probes = len(world.said(Probe))
    world.run(for_s=1000.0)
    assert len(world.said(Probe)) == probes


def test_new_work_while_away_asks_again() -> None:
    """Work that comes to an absent backend probes it at once, has all the patience, and completes when it is back."""
    _, world = simulate(settings=ArbiterSettings(patience_s=20.0))
    world.away_until_s = 210.0
    world.add(works([0]), A)
    world.run()
    world.run(for_s=200.0 - world.now)
    world.add(works([1]), A)
    assert story(world)[-1] == "probe"
    assert world.times(Probe)[-1] == 200.0
    ends = finish(world)
    assert ends[0].state is ItemState.FAILED
    assert ends[1].state is ItemState.COMPLETED


def test_new_work_between_two_probes_waits_for_the_next() -> None:
    """Growing intervals are kept when somebody new comes just after everybody has left."""
    arbiter, world = simulate(settings=ArbiterSettings(patience_s=20.0))
    world.away_until_s = 123.0
    world.add(works([0]), A)
    world.run(for_s=15.0)
    world.do(arbiter.stop([0], ItemState.CANCELLED, CANCELLED, world.now))
    probes = len(world.said(Probe))
    world.add(works([1]), A)
    assert len(world.said(Probe)) == probes
    assert finish(world)[1].state is ItemState.COMPLETED


def test_what_was_learned_is_to_be_confirmed_after_an_outage() -> None:
    """A backend that comes back may have other slots: the number is only remembered until it is confirmed."""
    arbiter, world = simulate(slots=2)
    world.add(works(range(20)), A)
    world.run()
    assert arbiter.capacity(A).slots.count == 2
    world.away_until_s = world.now + 5.0
    world.add(works([20]), A)
    world.run(for_s=12.0)
    assert arbiter.capacity(A).slots == Slots(count=2, source=SlotSource.REMEMBERED)
    world.add(works(range(21, 40)), A)
    finish(world)
    assert arbiter.capacity(A).slots == Slots(count=2, source=SlotSource.LEARNED)


def test_backend_that_answers_probes_and_nothing_else_is_away() -> None:
    """Probes that are answered do not keep items waiting for ever, nor are they asked without pause."""
    _, world = simulate(settings=ArbiterSettings(patience_s=20.0))
    world.away_until_s = 1e9
    world.answers_probes_while_away = True
    world.add(works(range(3)), A)
    ends = finish(world)
    assert {end.state for end in ends.values()} == {ItemState.FAILED}
    assert world.times(End) == [121.0] * 3
    assert len(world.said(Probe)) < 20
    # The next who comes is not made to pay for it.
    world.run(for_s=1.0)
    world.away_until_s = None
    world.add(works([3]), A)
    assert finish(world)[3].state is ItemState.COMPLETED


def test_outage_that_nobody_waited_for_is_over() -> None:
    """Who comes to a backend long after an outage has all the patience for the next one."""
    arbiter, world = simulate(settings=ArbiterSettings(patience_s=20.0))
    world.away_until_s = 105.0
    world.add(works([0]), A)
    while not world.said(Probe) or arbiter.is_away:
        world.run(for_s=0.01)
    world.do(arbiter.stop([0], ItemState.CANCELLED, CANCELLED, world.now))
    world.run(for_s=3600.0)
    world.away_until_s = world.now + 5.0
    world.add(works([1]), A)
    assert finish(world)[1].state is ItemState.COMPLETED


def test_two_outages_are_two_when_work_went_on_between() -> None:
    """Patience begins anew once an item has had a connection."""
    _, world = simulate(settings=ArbiterSettings(patience_s=20.0), slots=1, configured=1)
    world.answers = {n: Answer(tokens=100) for n in range(9)}
    world.add(works(range(9)), A)
    world.run(for_s=1.5)
    for _ in range(3):
        world.away_until_s = world.now + 15.0
        world.runner_dies(LOST)
        world.run(for_s=19.0)
    world.away_until_s = None
    ends = finish(world)
    assert {end.state for end in ends.values()} <= {ItemState.COMPLETED, ItemState.FAILED}
    assert not any(isinstance(end.error, BackendUnavailableError) for end in ends.values())


def test_probe_that_nobody_waits_for_is_not_sent() -> None:
    """A load that meets no backend when its items are gone asks nothing more; a probe's late answer is ignored."""
    arbiter, world = simulate()
    world.away_until_s = 150.0
    world.add(works([0]), A)
    world.do(arbiter.stop([0], ItemState.CANCELLED, CANCELLED, world.now))
    world.run()
    assert arbiter.is_away
    assert world.said(Probe) == []
    assert arbiter.next_alarm() is None
    world.run(for_s=60.0)
    world.add(works([1]), A)
    assert finish(world)[1].state is ItemState.COMPLETED
    assert arbiter.probed(world.now, None) == []


def test_a_proxy_s_word_ends_with_the_backend_s() -> None:
    """Two outages are two where an item was told something between, though both were told by whoever answers."""
    arbiter, world = simulate(settings=ArbiterSettings(patience_s=20.0), configured=1, slots=1)
    world.faults[0] = [Fault(error=AWAY), Fault(error=AWAY, after_tokens=300)]
    world.answers[0] = Answer(tokens=400, token_s=0.1)
    world.add(works([0]), A)
    assert finish(world)[0].state is ItemState.COMPLETED
    assert len(world.said(Probe)) == 2
    assert not arbiter.is_away


def test_nobody_waits_for_ever_where_every_item_is_told_that_the_backend_is_away() -> None:
    """Though connections, probes and loads are all there; the pauses between two tries grow."""
    _, world = simulate(settings=ArbiterSettings(patience_s=20.0), configured=1, slots=1)
    world.faults[0] = [Fault(error=AWAY)] * 1_000
    world.add(works([0]), A)
    began_s = world.now
    end = finish(world)[0]
    assert end.state is ItemState.FAILED
    assert isinstance(end.error, BackendUnavailableError)
    assert world.now - began_s == pytest.approx(20.0, abs=10.0)
    assert len(world.waves) < 40


def test_second_refusal_is_no_second_outage() -> None:
    """Several connections that are refused at one time are one outage."""
    arbiter, world = simulate()
    world.add(works(range(8)), A)
    world.run(for_s=1.0)
    world.away_until_s = 103.0
    world.do(arbiter.failed(0, 1, AWAY, world.now))
    world.do(arbiter.failed(1, 2, AWAY, world.now))
    world.do(arbiter.load_failed(A, AWAY, world.now))
    assert len(world.said(Probe)) == 1
    assert {end.state for end in finish(world).values()} == {ItemState.COMPLETED}


# -- The rest ----------------------------------------------------------------------------------------------------


def test_parked_batch_gives_its_turn_away() -> None:
    """A batch that is parked keeps no runner's turn; unparked, it goes on where it was."""
    arbiter, world = simulate(configured=2, slots=2)
    world.add(works(range(20)), A)
    world.add(works(range(20, 25), batch=1), B)
    world.run(for_s=1.01)
    world.do(arbiter.park(0, world.now))
    world.run()
    assert set(range(20, 25)) <= set(world.ends)
    assert len(world.ends) < 25
    world.do(arbiter.unpark(0, world.now))
    assert len(finish(world)) == 25


def test_news_of_the_unknown_are_ignored() -> None:
    """Nothing happens for a ticket that the arbiter does not have."""
    arbiter, world = simulate()
    now = world.now
    errors: list[UnisonoError] = [AWAY, LOST]
    assert arbiter.staged(1, 1, now) == []
    assert arbiter.spoke(1, 1, now) == []
    assert arbiter.finished(1, 1, now, None) == []
    assert [arbiter.failed(1, 1, error, now) for error in errors] == [[], []]
    assert arbiter.stop([1], ItemState.CANCELLED, CANCELLED, now) == []
    assert not arbiter.is_away


def test_settings_of_the_conductor_are_handed_on() -> None:
    """An arbiter's conductors have the patience that its settings say."""
    settings = ArbiterSettings(conductor=ConductorSettings(hold_patience_s=2.0))
    _, world = simulate(settings=settings, slots=8)
    world.staging_of[1] = 1.5
    world.add(works(range(2)), A)
    finish(world)
    assert world.waves == [(0, 1)]


def test_expired_items_are_forgotten() -> None:
    """Time limits hold also for items whose runner's turn has not come."""
    arbiter, world = simulate(load_s=50.0)
    world.add(works([0]), A)
    world.add([Work(ticket=1, batch=0, speak_by_s=110.0)], B)
    world.run(for_s=20.0)
    assert world.ends[1].state is ItemState.EXPIRED
    with pytest.raises(KeyError):
        arbiter.runner_of(1)
    finish(world)


def test_a_runner_that_died_is_loaded_before_anybody_goes_again() -> None:
    """Its death is told by an item; what was in memory is not."""
    arbiter, world = simulate(configured=4)
    world.faults[1] = [Fault(error=RunnerDiedError("killed"), place="answer", after_tokens=1)]
    world.add(works(range(4)), A)
    ends = finish(world)
    assert len(world.times(Load)) == 2
    assert {end.state for end in ends.values()} == {ItemState.COMPLETED}
    assert arbiter.figures(A).deaths >= 1
    assert arbiter.figures(B) == RunnerFigures()


def test_tokens_are_bounded_for_each_runner() -> None:
    """One of 100 tokens fits into 150."""
    arbiter, world = simulate(configured=4)
    arbiter.limit_tokens(A, 150)
    world.add(works(range(3), num_predict=100), A)
    _ = finish(world)
    assert world.most_in_flight == 1


def test_asking_for_slots_leaves_no_trace() -> None:
    """Who only asks what is known of a runner gets the configured number, and no runner is remembered for it."""
    arbiter = Arbiter(lambda _: Capacity(configured=5))
    assert arbiter.slots(A) == Slots(count=5, source=SlotSource.CONFIGURED)
    assert arbiter.runners() == []


def test_ever_new_runners_push_out_idle_ones() -> None:
    """However many runner options callers think of, only so many runners are remembered; one with work always is."""
    arbiter = Arbiter(lambda _: Capacity(configured=1))
    arbiter.submit(A, [Work(ticket=0, batch=0)], 0.0)
    for n in range(1, 2 * MAX_PLACES):
        runner = replace(B, options=RunnerOptions(num_ctx=1000 + n))
        arbiter.submit(runner, [Work(ticket=n, batch=0)], float(n))
        arbiter.stop([n], ItemState.CANCELLED, CancelledItemError("test"), float(n))
    assert len(arbiter.runners()) == MAX_PLACES
    assert A in arbiter.runners()
