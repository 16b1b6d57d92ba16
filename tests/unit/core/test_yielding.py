"""A backend is left to its other clients now and then, however much there is to do."""

from __future__ import annotations

from itertools import count, pairwise

import pytest

from tests.unit.core.simulator import Answer, Fault, Simulator, works
from unisono.core.arbiter import Arbiter, ArbiterSettings, Load
from unisono.core.capacity import Capacity
from unisono.core.commands import End, Release, ReleaseReason, Terms, Work
from unisono.core.errors import BackendUnavailableError, RunnerDiedError
from unisono.core.idle import IdleReason
from unisono.core.model import ItemState, RunnerSpec
from unisono.core.prefixes import Prefix
from unisono.core.yielding import NOTICE_S, Yielding

AWAY = BackendUnavailableError("connection refused")
A, B = (RunnerSpec(backend="ollama", model=name, digest=f"sha256:{name}") for name in "ab")
EVERY_S = 10.0
# Items of four lengths, so that they do not end together.
ANSWERS = [Answer(tokens=8 + 5 * n) for n in range(4)]
# What is at the backend when nothing more goes: the longest, and after it who waits there for its slot.
TAIL_S = 2 * (ANSWERS[-1].prompt_s + ANSWERS[-1].tokens * ANSWERS[-1].token_s)


def simulate(yield_every_s: float = EVERY_S, *, load_s: float = 0.5, slots: int = 4) -> tuple[Arbiter, Simulator]:
    """An arbiter and its world. A runner stays in memory once it was loaded."""
    settings = ArbiterSettings(yield_every_s=yield_every_s)
    arbiter = Arbiter(lambda _: Capacity(configured=slots), settings)
    return arbiter, Simulator(arbiter, slots=slots, load_s=load_s)


def feed(world: Simulator, *runners: RunnerSpec, at_least: int = 12) -> None:
    """Sees to it that items always wait, for as long as the world is run."""
    tickets = count()

    def add() -> None:
        if world.machine.queued < at_least * len(runners):
            for runner in runners:
                made = works([next(tickets) for _ in range(at_least)])
                world.answers |= {work.ticket: ANSWERS[work.ticket % len(ANSWERS)] for work in made}
                world.add(made, runner, is_loaded=len(runners) > 1)
        world.at(0.1, add)

    add()


def quiet(world: Simulator) -> list[tuple[float, float]]:
    """When nothing was at the backend, between the first release and the last; not for a moment only."""
    spans: list[tuple[float, float]] = []
    in_flight, since_s = 0, None
    for at_s, command in world.log:
        if isinstance(command, Release):
            if since_s is not None and at_s >= since_s + NOTICE_S:
                spans.append((since_s, at_s))
            since_s, in_flight = None, in_flight + len(command.tickets)
        elif isinstance(command, End) and command.attempts:
            in_flight -= 1
            since_s = since_s if in_flight else at_s
    return spans


# -- The bound ---------------------------------------------------------------------------------------------------


def test_items_without_end_leave_the_backend_alone_now_and_then() -> None:
    """Never longer at a time than yield_every and what runs then, and not more often."""
    _, world = simulate()
    feed(world, A)
    world.run(for_s=100.0)
    spans = quiet(world)
    assert len(spans) >= 8
    for (_, back_s), (left_s, _) in pairwise(spans):
        assert EVERY_S <= left_s - back_s <= EVERY_S + TAIL_S
    assert spans[0][0] <= world.times(Release)[0] + EVERY_S + TAIL_S


def test_the_pause_is_a_moment_and_a_load() -> None:
    """The runner, of which nobody knows whether it is still there, is asked for as soon as the moment is over."""
    _, world = simulate()
    feed(world, A)
    world.run(for_s=50.0)
    spans, loads = quiet(world), world.times(Load)[1:]
    assert loads == pytest.approx([since_s + NOTICE_S for since_s, _ in spans])
    assert [back_s for _, back_s in spans] == pytest.approx([at_s + 0.501 for at_s in loads])


def test_no_pause_where_none_is_wanted() -> None:
    """0 is never; so it is for backends whose models take nobody's place."""
    _, world = simulate(0.0)
    feed(world, A)
    world.run(for_s=200.0)
    assert quiet(world) == []
    assert world.loads == 1


def test_only_work_without_a_pause_counts() -> None:
    """Whenever nothing was at the backend for the moment that it takes to notice, the time begins anew."""
    yielding = Yielding(10.0)

    def see(in_flight: int, now: float) -> tuple[bool, float | None]:
        yielding.see(in_flight, now)
        return yielding.is_on, yielding.next_moment()

    assert see(0, 0.0) == (False, None)
    assert see(1, 100.0) == (False, 110.0)
    assert see(0, 105.0) == (False, None)
    assert see(1, 105.0 + NOTICE_S / 2) == (False, 110.0)
    assert see(0, 106.0) == (False, None)
    assert see(1, 106.0 + NOTICE_S) == (False, 116.0 + NOTICE_S)
    assert see(1, 115.0) == (False, 116.0 + NOTICE_S)
    assert see(1, 116.0 + NOTICE_S) == (True, None)
    assert see(0, 120.0) == (True, 120.0 + NOTICE_S)
    assert see(0, 120.01) == (True, 120.0 + NOTICE_S)
    assert see(0, 120.0 + NOTICE_S) == (False, None)
    assert see(1, 121.0) == (False, 131.0)


def test_batches_one_after_the_other_leave_pauses_of_their_own() -> None:
    """A second between them is enough for anybody."""
    _, world = simulate()
    for n in range(20):
        world.add(works(range(8 * n, 8 * n + 8)), A, is_loaded=n > 0)
        world.run()
        world.run(for_s=1.0)
    assert world.now > 100.0 + 2 * EVERY_S
    assert world.loads == 1


def test_callers_who_come_at_once_wait_for_the_moment_too() -> None:
    """A lone item that follows on another's end does not go before it is over, though the runner was just used."""
    _, world = simulate(1.0)
    ticket = 0
    while world.now < 110.0:
        world.add(works([ticket]), A, is_loaded=ticket > 0)
        while ticket not in world.ends:
            world.run(for_s=0.005)
        ticket += 1
    spans = quiet(world)
    assert 4 <= len(spans) < 10
    assert world.loads == len(spans) + 1
    for (_, back_s), (left_s, _) in pairwise(spans):
        assert left_s - back_s <= 1.0 + 0.3


# -- What it does not change -------------------------------------------------------------------------------------


def test_the_order_and_the_attempts_stay() -> None:
    """What was held ready goes back, and nobody is overtaken, charged or lost."""

    def order(yield_every_s: float) -> list[int]:
        _, world = simulate(yield_every_s)
        world.answers = {n: ANSWERS[n % 4] for n in range(100)}
        world.add(works(range(100)), A)
        world.run()
        world.audit.check_finished()
        assert {(end.state, end.attempts) for end in world.ends.values()} == {(ItemState.COMPLETED, 1)}
        return [ticket for wave in world.waves for ticket in wave]

    assert order(2.0) == order(0.0)


def test_waves_that_go_together_stay_whole() -> None:
    """One that runs comes to its end, the next comes after the pause."""
    _, world = simulate(2.0)
    terms = Terms(is_together=True)
    world.add([Work(ticket=n, batch=0, terms=terms) for n in range(100)], A)
    world.run()
    world.audit.check_finished()
    assert {len(wave) for wave in world.waves} == {4}
    assert len(quiet(world)) >= 2


# -- Several runners ---------------------------------------------------------------------------------------------


def test_runners_in_memory_side_by_side_are_left_together() -> None:
    """Whoever waits may need the room of all of them; then they are loaded one after the other, and all go on."""
    _, world = simulate()
    world.is_in_memory = True
    feed(world, A, B)
    world.run(for_s=60.0)
    spans = quiet(world)
    assert len(spans) >= 4
    loads = [(at_s, one.runner.model) for at_s, one in world.log if isinstance(one, Load)]
    for since_s, back_s in spans[:-1]:
        (first_s, first), (second_s, second) = [one for one in loads if since_s < one[0] < back_s + 1]
        assert {first, second} == {"a", "b"}
        assert second_s - first_s == pytest.approx(0.5)


def test_a_turn_that_is_over_anyway_passes_on() -> None:
    """The next runner begins after the moment; the first waits for its turn."""
    arbiter = Arbiter(lambda _: Capacity(configured=1), ArbiterSettings(turn_s=5.0, ready_s=1e3, yield_every_s=5.0))
    world = Simulator(arbiter, slots=1, load_s=0.5, answer=Answer(tokens=100))
    world.add(works([0]), B)
    world.run()
    world.add(works(range(1, 9)), A)
    world.run(for_s=1.0)
    world.add(works([9]), B)
    world.run()
    world.audit.check_finished()
    loads = [load.runner.model for load in world.said(Load)]
    assert loads == ["b", "a", "b", "a"]
    assert world.times(Load)[2] == pytest.approx(quiet(world)[-2][0] + NOTICE_S)


def test_a_load_that_ends_while_the_backend_is_left_alone() -> None:
    """Its runner does not begin before the others' moment is over either."""
    _, world = simulate(1.0, load_s=3.0)
    world.answers = {n: Answer(tokens=400) for n in range(4)}
    world.add(works(range(4)), A)
    world.run(for_s=3.1)
    world.add(works(range(4, 8)), B, is_loaded=True)
    world.run()
    world.audit.check_finished()
    ((_, back_s), *_) = quiet(world)
    last_of_a = max(at_s for at_s, end in world.log if isinstance(end, End) and end.ticket < 4)
    assert back_s > last_of_a + NOTICE_S
    assert [wave for wave in world.waves if set(wave) & set(range(4, 8))] == [(4, 5, 6, 7)]


# -- What was in memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_in_memory", [True, False])
def test_prefixes_are_forgotten_where_it_was_loaded_anew(*, is_in_memory: bool) -> None:
    """A runner that made room holds nothing; one that is still there holds what it held."""
    _, world = simulate(2.0)
    prefix = Prefix(1, (10,), (4_000,))
    world.add([Work(ticket=n, batch=0, prefix=prefix, prompt_bytes=4_100) for n in range(200)], A)
    world.run(for_s=1.0)
    world.is_in_memory = is_in_memory
    world.run()
    world.audit.check_finished()
    for _, back_s in quiet(world):
        first = next(one for at_s, one in world.log if isinstance(one, Release) and at_s == back_s)
        assert (first.held_bytes[0] == 4_000) is is_in_memory
        assert (ReleaseReason.PREFIX_HELD in first.reasons) is is_in_memory


# -- What it costs -----------------------------------------------------------------------------------------------


def test_its_cost_has_a_reason_of_its_own() -> None:
    """Slots that stay empty while the others come to their end, the moment, and the load back."""
    arbiter, world = simulate(load_s=1.0)
    feed(world, A)
    world.run(for_s=100.0)
    lost_s, in_flight, before_s, is_left = 0.0, 0, world.log[0].at_s, False
    for at_s, command in world.log:
        lost_s += (4 - in_flight) * (at_s - before_s) if is_left else 0.0
        before_s = at_s
        if isinstance(command, Release):
            in_flight, is_left = in_flight + len(command.tickets), False
        elif isinstance(command, End):
            in_flight -= 1
            is_left = in_flight < 4
    idle_s = arbiter.figures(A).idle_s
    assert idle_s[IdleReason.NOT_READY] == pytest.approx(4.0)
    # Until it is loaded back; then its items are staged, in a millisecond.
    assert idle_s[IdleReason.YIELD] == pytest.approx(lost_s, rel=0.01)


# -- A backend that goes away ------------------------------------------------------------------------------------


def test_a_backend_that_goes_away_meanwhile() -> None:
    """Nobody is lost."""
    _, world = simulate(2.0)
    world.add(works(range(60)), A)
    world.run(for_s=2.6)
    world.away_until_s = world.now + 7.0
    world.runner_dies(AWAY)
    world.run()
    world.audit.check_finished()
    assert {end.state for end in world.ends.values()} == {ItemState.COMPLETED}


def test_a_backend_that_takes_no_more_connections() -> None:
    """What it has goes on there past the time at which others would get their moment: that turns no circles."""
    arbiter, world = simulate(2.0)
    world.answers = {n: Answer(tokens=400) for n in range(6)}
    world.faults[5] = [Fault(error=AWAY, place="held", after_s=1.0)]
    world.add(works(range(6)), A)
    world.run(for_s=1.0)
    world.away_until_s = world.now + 6.0
    world.run(for_s=5.0)
    assert arbiter.is_away
    assert arbiter.in_flight == 5
    assert world.ticks < 30
    world.run()
    world.audit.check_finished()
    assert {end.state for end in world.ends.values()} == {ItemState.COMPLETED}


def test_a_runner_that_dies_meanwhile() -> None:
    """Its items are tried again after the pause."""
    _, world = simulate(2.0)
    world.add(works(range(60)), A)
    world.run(for_s=2.6)
    world.runner_dies(RunnerDiedError("died"))
    world.run()
    world.audit.check_finished()
    assert {end.state for end in world.ends.values()} == {ItemState.COMPLETED}
