"""Random events, in any order, at any time: neither the conductor nor the arbiter ever breaks a promise."""

from __future__ import annotations

from functools import partial
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.core.simulator import Audit, Staging
from unisono.core.arbiter import Arbiter, ArbiterSettings, Load, Probe, Unload
from unisono.core.arbiter import Command as AnyCommand
from unisono.core.capacity import Capacity, Held
from unisono.core.commands import Priority, Release, Stage, Terms, Work
from unisono.core.conductor import Conductor, ConductorSettings
from unisono.core.errors import (
    BackendBusyError,
    BackendUnavailableError,
    CancelledItemError,
    ConnectionLostError,
    LoadFailedError,
    ModelNotFoundError,
    PromptTooLongError,
    RunnerDiedError,
)
from unisono.core.lifecycle import Phase
from unisono.core.model import ItemState, RunnerSpec, Usage
from unisono.core.prefixes import Prefix
from unisono.core.yielding import NOTICE_S

ERRORS = st.sampled_from(
    [
        ConnectionLostError("lost"),
        RunnerDiedError("died"),
        BackendBusyError("busy", retry_after_s=3.0),
        BackendUnavailableError("away"),
        PromptTooLongError("long"),
    ]
)
SECONDS = st.sampled_from([0.0, 0.001, 0.1, 0.3, 1.0, 7.0, 31.0, 700.0])
LIMITS = st.none() | st.sampled_from([0.05, 0.7, 5.0, 100.0])
PATIENCE = ConductorSettings(hold_patience_s=0.25, hold_limit_s=20.0, stall_s=60.0)
CANCELLED = CancelledItemError("cancelled")

# Batches of all kinds; and families: two that begin alike, one by itself, and items that share nothing.
TERMS = [
    partial(Terms),
    partial(Terms, priority=Priority.HIGH, max_concurrency=2, items_per_second=3.0),
    partial(Terms, weight=3, is_together=True),
]
PREFIXES = [
    None,
    Prefix(1, (10, 11), (600, 1_200)),
    Prefix(2, (10, 12), (600, 2_400)),
    Prefix(3, (30,), (2_000,)),
]

# More steps for one item than these is an endless loop.
MANY = 5000


class Machine(RuleBasedStateMachine):
    """What both machines have in common: items come, and news of them, true, old and made up."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1.1
        self.audit = Audit()
        self.tickets = count()
        self.terms: dict[int, Terms] = {}
        self.sizes = 0
        self.machine: Conductor | Arbiter

    # -- To be said by each

    def do(self, commands: list[AnyCommand]) -> None:
        """Notes what the machine says."""
        self.audit.check(commands)
        for command in commands:
            if isinstance(command, Release):
                self.check_release(command)

    def check_release(self, release: Release) -> None:
        """Holds a release against what the machine itself says."""
        raise NotImplementedError

    def make_works(self, number: int, batch: int, limits: tuple[float | None, ...], attempts: int) -> list[Work]:
        """New items."""
        speak_s, end_s, silence_s = limits
        made = [
            Work(
                ticket=next(self.tickets),
                batch=batch,
                speak_by_s=None if speak_s is None else self.now + speak_s,
                end_by_s=None if end_s is None else self.now + end_s,
                silence_s=silence_s,
                max_attempts=attempts,
                num_predict=3 if batch else None,
                terms=self.terms.setdefault(batch, TERMS[batch]()),
                prefix=PREFIXES[(self.sizes + place) % len(PREFIXES)],
                prompt_bytes=4_000,
                is_single=batch == 2 and place == 0,
            )
            for place in range(number)
        ]
        self.sizes += number
        self.audit.added |= {work.ticket for work in made}
        return made

    def pick(self, data: st.DataObject, *, held: bool | None = None) -> Staging:
        """A staging that is open, or (now and then) one that is over, or that never was."""
        open_now = [Staging(*pair) for pair in self.audit.open.items()]
        if held is not None:
            open_now = [staging for staging in open_now if (staging in self.audit.held) is held]
        fakes = [Staging(0, 1), Staging(9999, 1), Staging(1, 9999), *sorted(self.audit.stagings)[-3:]]
        return data.draw(st.sampled_from(open_now * 4 + fakes))

    # -- What may happen

    @rule(data=st.data())
    def is_staged(self, data: st.DataObject) -> None:
        """All but a last byte was sent."""
        staging = self.pick(data, held=False)
        if staging not in self.audit.outcomes:
            self.audit.was_staged(staging)
        self.do(list(self.machine.staged(*staging, self.now)))

    @rule(data=st.data(), times=st.integers(1, 4))
    def speaks(self, data: st.DataObject, times: int) -> None:
        """An item got tokens."""
        staging = self.pick(data)
        for _ in range(times):
            self.do(list(self.machine.spoke(*staging, self.now)))

    @rule(data=st.data(), waited_s=st.sampled_from([None, 0.0, 0.5]))
    def finishes(self, data: st.DataObject, waited_s: float | None) -> None:
        """An answer is whole; for one that was never released, this is nonsense, and ignored."""
        staging = self.pick(data)
        held = None if waited_s is None else Held(start_s=self.now - 0.5, end_s=self.now, waited_s=waited_s)
        if self.audit.outcomes.get(staging) == "released":
            self.audit.was_closed(staging, "released")
        usage = None if waited_s is None else Usage(prompt_tokens=900, completion_tokens=3)
        self.do(list(self.machine.finished(*staging, self.now, held, usage)))

    @rule(data=st.data(), error=ERRORS)
    def fails(self, data: st.DataObject, error: BaseException) -> None:
        """An attempt went wrong."""
        staging = self.pick(data)
        is_lost = isinstance(self.machine, Arbiter) and isinstance(error, BackendUnavailableError)
        if not is_lost:
            self.audit.was_closed(staging, "failed")
        self.do(list(self.machine.failed(*staging, error, self.now)))  # type: ignore[arg-type]
        if is_lost and self.machine_has_left(staging):
            self.audit.was_closed(staging, "failed")

    def machine_has_left(self, staging: Staging) -> bool:
        """Whether the audit still holds a connection open that the machine was told is lost."""
        return self.audit.open.get(staging.ticket) == staging.serial

    @rule(data=st.data())
    def is_cancelled(self, data: st.DataObject) -> None:
        """Some items, ended ones among them, are cancelled."""
        some = data.draw(st.lists(st.sampled_from(sorted(self.audit.added) or [0]), max_size=5))
        self.do(list(self.machine.stop(some, ItemState.CANCELLED, CANCELLED, self.now)))

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        """The clock jumps, and the alarm rings as late as that."""
        self.now += seconds
        self.do(list(self.machine.tick(self.now)))

    @rule()
    def alarm_rings(self) -> None:
        """The alarm rings just in time, until it is quiet."""
        alarm = self.machine.next_alarm()
        if alarm is None:
            return
        self.now = max(self.now, alarm)
        for _ in range(MANY):
            self.do(list(self.machine.tick(self.now)))
            alarm = self.machine.next_alarm()
            if alarm is None or alarm > self.now:
                return
        pytest.fail("a tick at next_alarm makes no progress")

    @invariant()
    def counts_are_right(self) -> None:
        """What is queued and in flight are all that have not ended."""
        living = len(self.audit.added) - len(self.audit.ended)
        assert self.machine.queued + self.machine.in_flight == living
        at_work = [Staging(*pair) for pair in self.audit.open.items() if self.audit.outcomes.get(Staging(*pair))]
        assert self.machine.in_flight == len(at_work)

    # -- The end

    def go(self) -> bool:
        """Lets every item that has a connection take its next step, and succeed; False where none has one to take."""
        has_gone = False
        for staging in [Staging(*pair) for pair in self.audit.open.items()]:
            if self.audit.open.get(staging.ticket) != staging.serial:
                continue
            has_gone = has_gone or staging not in self.audit.held
            if self.audit.outcomes.get(staging) == "released":
                self.do(list(self.machine.spoke(*staging, self.now)))
                self.audit.was_closed(staging, "released")
                self.do(list(self.machine.finished(*staging, self.now, None)))
            elif staging not in self.audit.held:
                self.audit.was_staged(staging)
                self.do(list(self.machine.staged(*staging, self.now)))
        return has_gone

    def finish(self) -> None:
        """Lets everything end well: nobody may be lost."""
        for _ in range(MANY):
            if not self.go():
                alarm = self.machine.next_alarm()
                if alarm is None:
                    break
                self.now = max(self.now, alarm)
                self.do(list(self.machine.tick(self.now)))
        self.audit.check_finished()
        assert self.machine.queued == self.machine.in_flight == 0
        assert all(terms.in_flight == 0 for terms in self.terms.values())


class ConductorMachine(Machine):
    """Random events for a conductor."""

    @initialize(configured=st.sampled_from([None, 1, 3]), ceiling=st.sampled_from([2, 16]))
    def begin(self, configured: int | None, ceiling: int) -> None:
        """A conductor of some size."""
        self.conductor = self.machine = Conductor(Capacity(configured=configured, ceiling=ceiling), PATIENCE)
        self.is_open = False

    def check_release(self, release: Release) -> None:
        """Never more in flight than the limit, and nothing goes while it is closed."""
        assert self.is_open
        assert self.conductor.in_flight <= self.conductor.limit

    @rule(
        number=st.integers(1, 12),
        batch=st.integers(0, 2),
        limits=st.tuples(LIMITS, LIMITS, LIMITS),
        attempts=st.integers(1, 3),
    )
    def add(self, number: int, batch: int, limits: tuple[float | None, ...], attempts: int) -> None:
        """Items come."""
        self.do(list(self.conductor.add(self.make_works(number, batch, limits, attempts), self.now)))

    @rule()
    def open(self) -> None:
        """The runner is ready."""
        self.is_open = True
        self.do(list(self.conductor.open(self.now)))

    @rule()
    def shut(self) -> None:
        """Another's turn has come."""
        self.is_open = False
        self.do(list(self.conductor.shut(self.now)))
        assert self.audit.held == set()

    @rule(batch=st.integers(0, 2))
    def park(self, batch: int) -> None:
        """A batch must stand aside."""
        self.conductor.park(batch)

    @rule(batch=st.integers(0, 2))
    def unpark(self, batch: int) -> None:
        """It goes on."""
        self.do(list(self.conductor.unpark(batch, self.now)))

    @rule()
    def stop_all(self) -> None:
        """Everything is cancelled."""
        self.do(list(self.conductor.stop_all(ItemState.CANCELLED, CANCELLED, self.now)))
        assert self.conductor.is_idle
        assert not self.conductor.has_work

    @invariant()
    def phases_are_right(self) -> None:
        """Each item is where its commands have put it."""
        for ticket in self.audit.added:
            serial = self.audit.open.get(ticket)
            staging = Staging(ticket, serial or 0)
            phase = self.conductor.phase(ticket)
            if ticket in self.audit.ended:
                assert phase is Phase.ENDED
            elif serial is None:
                assert phase in (Phase.QUEUED, Phase.WAITING)
            elif staging in self.audit.held:
                assert phase is Phase.STAGED
            elif staging in self.audit.outcomes:
                assert phase in (Phase.RELEASED, Phase.SPEAKING)
            else:
                assert phase is Phase.STAGING

    def teardown(self) -> None:
        """Everything is allowed, and all succeed: every item ends, once."""
        for batch in range(3):
            self.do(list(self.conductor.unpark(batch, self.now)))
        self.open()
        self.finish()
        assert self.conductor.is_idle


RUNNERS = [RunnerSpec(backend="ollama", model=name, digest=name) for name in "abc"]


class ArbiterMachine(Machine):
    """Random events for an arbiter with three runners."""

    @initialize(configured=st.sampled_from([None, 1, 3]), yield_every_s=st.sampled_from([0.0, 0.2, 3.0]))
    def begin(self, configured: int | None, yield_every_s: float) -> None:
        """An arbiter of some size."""
        settings = ArbiterSettings(
            turn_s=5.0, ready_s=2.0, yield_every_s=yield_every_s, patience_s=40.0, conductor=PATIENCE
        )
        self.arbiter = self.machine = Arbiter(lambda _: Capacity(configured=configured), settings)
        self.runner_of: dict[int, RunnerSpec] = {}
        self.loading: list[RunnerSpec] = []
        self.probing = 0
        # The runners that the backend holds.
        self.memory: set[RunnerSpec] = set()
        # Items that were at the backend when it was last away.
        self.left_over: set[int] = set()
        # Since when the backend was never without an item of ours for a moment; since when it has none (None: it
        # has some); and whether it must have none for a moment before anything more goes.
        self.yield_every_s = yield_every_s
        self.working_since_s = 0.0
        self.quiet_since_s: float | None = 0.0
        self.must_yield = False

    def do(self, commands: list[AnyCommand]) -> None:
        """Notes loads and probes as well."""
        super().do(commands)
        for command in commands:
            match command:
                case Load(runner=runner):
                    assert not self.arbiter.is_away
                    self.loading.append(runner)
                case Unload(runner=runner):
                    assert runner not in {self.runner_of[ticket] for ticket in self.alive()}
                    self.memory.discard(runner)
                case Probe():
                    self.probing += 1
                    assert self.probing == 1, "one probe at a time"
                case Stage(ticket=ticket):
                    assert self.runner_of[ticket] in self.memory, "nothing is staged before its runner was loaded"
                case _:
                    pass
        if self.arbiter.is_away:
            self.left_over |= set(self.flying())
        self.left_over &= set(self.flying())
        self.look_for_pauses()

    def look_for_pauses(self) -> None:
        """Notes since when others had no chance."""
        if not self.arbiter.in_flight:
            self.quiet_since_s = self.now if self.quiet_since_s is None else self.quiet_since_s
            if self.now >= self.quiet_since_s + NOTICE_S:
                self.must_yield = False
            return
        if self.quiet_since_s is not None and self.now >= self.quiet_since_s + NOTICE_S:
            self.working_since_s = self.now
        self.quiet_since_s = None
        if self.yield_every_s and self.now >= self.working_since_s + self.yield_every_s:
            self.must_yield = True

    def check_release(self, release: Release) -> None:
        """One runner at a time, or several that are in memory side by side."""
        assert not self.must_yield, "others of the backend had their moment"
        theirs = {self.runner_of[ticket] for ticket in release.tickets}
        others = [ticket for ticket in self.flying() if ticket not in self.left_over]
        assert theirs | {self.runner_of[ticket] for ticket in others} <= self.memory
        runner = theirs.pop()
        mine = sum(1 for ticket in self.flying() if self.runner_of[ticket] == runner)
        assert mine <= 2 * self.arbiter.capacity(runner).limit

    def alive(self) -> list[int]:
        """Items that have not ended."""
        return [ticket for ticket in self.audit.added if ticket not in self.audit.ended]

    def flying(self) -> list[int]:
        """Items at the backend."""
        return [t for t, serial in self.audit.open.items() if self.audit.outcomes.get(Staging(t, serial))]

    @rule(
        number=st.integers(1, 8),
        runner=st.sampled_from(RUNNERS),
        limits=st.tuples(LIMITS, LIMITS, LIMITS),
        attempts=st.integers(1, 3),
        unload_after=st.booleans(),
    )
    def submit(
        self,
        number: int,
        runner: RunnerSpec,
        limits: tuple[float | None, ...],
        attempts: int,
        *,
        unload_after: bool,
    ) -> None:
        """Items come."""
        made = self.make_works(number, RUNNERS.index(runner), limits, attempts)
        self.runner_of.update({work.ticket: runner for work in made})
        is_loaded = runner in self.memory
        self.do(self.arbiter.submit(runner, made, self.now, is_loaded=is_loaded, unload_after=unload_after))

    @precondition(lambda self: self.loading)
    @rule(has_room=st.booleans())
    def is_loaded(self, *, has_room: bool) -> None:
        """A load comes to its end; where there is no room, all others had to go."""
        runner = self.loading.pop(0)
        was_loaded = runner in self.memory
        self.memory = {*(self.memory if has_room or was_loaded else ()), runner}
        self.do(self.arbiter.loaded(runner, self.now, was_loaded=was_loaded))

    @precondition(lambda self: self.loading)
    @rule(error=st.sampled_from([LoadFailedError("no"), ModelNotFoundError("none"), BackendUnavailableError("away")]))
    def load_fails(self, error: BackendUnavailableError) -> None:
        """A load goes wrong."""
        runner = self.loading.pop(0)
        self.do(self.arbiter.load_failed(runner, error, self.now))

    @precondition(lambda self: self.probing)
    @rule(answers=st.booleans())
    def is_probed(self, *, answers: bool) -> None:
        """A probe comes back."""
        self.probing -= 1
        self.do(self.arbiter.probed(self.now, None if answers else BackendUnavailableError("away")))

    @rule(batch=st.integers(0, 2))
    def park(self, batch: int) -> None:
        """A batch must stand aside."""
        self.do(self.arbiter.park(batch, self.now))

    @rule(batch=st.integers(0, 2))
    def unpark(self, batch: int) -> None:
        """It goes on."""
        self.do(self.arbiter.unpark(batch, self.now))

    @invariant()
    def knows_whose_they_are(self) -> None:
        """Every living item has its runner."""
        for ticket in self.alive():
            assert self.arbiter.runner_of(ticket) == self.runner_of[ticket]

    def go(self) -> bool:
        """Lets loads and probes succeed as well."""
        has_moved = bool(self.loading or self.probing)
        while self.loading:
            self.is_loaded(has_room=False)
        if self.probing:
            self.is_probed(answers=True)
        return super().go() or has_moved

    def teardown(self) -> None:
        """Everything is allowed, and all succeed: every item ends, once, and the backend is left in peace."""
        for batch in range(3):
            self.unpark(batch)
        self.finish()
        assert not self.loading
        # A minute later nothing counts as loaded any more.
        self.now += 60.0
        self.do(self.arbiter.tick(self.now))
        ticket = next(self.tickets)
        self.audit.added.add(ticket)
        self.runner_of[ticket] = RUNNERS[0]
        self.memory = set()
        self.do(self.arbiter.submit(RUNNERS[0], [Work(ticket=ticket, batch=9)], self.now))
        self.finish()


TestConductor = ConductorMachine.TestCase
TestConductor.settings = settings(max_examples=100, stateful_step_count=50)
TestArbiter = ArbiterMachine.TestCase
TestArbiter.settings = settings(max_examples=100, stateful_step_count=50)
