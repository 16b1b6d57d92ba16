"""A world for the machines of the core: a clock, and a backend that does what their commands say.

`Simulator` drives a Conductor or an Arbiter as the application does. Its backend has a number of slots, a queue in
the order of arrival, and delays; faults are written down by item and attempt. Whatever happens, `Audit` holds every
command against the promises that are never to be broken, so each scenario checks these too.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, TypeVar

from unisono.core.arbiter import Arbiter, Away, Back, Load, Probe, Unload
from unisono.core.arbiter import Command as AnyCommand
from unisono.core.capacity import Held
from unisono.core.commands import Abort, End, Release, Retry, Stage, Work
from unisono.core.conductor import Conductor
from unisono.core.errors import BackendUnavailableError, UnisonoError
from unisono.core.model import RunnerSpec

Machine = Conductor | Arbiter
_Kind = TypeVar("_Kind", bound=AnyCommand)


class Said(NamedTuple):
    """A command, and when it was given."""

    at_s: float
    command: AnyCommand


class Staging(NamedTuple):
    """What names a connection."""

    ticket: int
    serial: int


class Audit:
    """Holds commands against the promises that every machine keeps."""

    def __init__(self) -> None:
        self.added: set[int] = set()
        self.ended: dict[int, End] = {}
        # Connections that the machine may still use: the serial number of each item's.
        self.open: dict[int, int] = {}
        # Of these, the ones that are held ready.
        self.held: set[Staging] = set()
        # Every staging that there was, and what became of those that have gone.
        self.stagings: set[Staging] = set()
        self.outcomes: dict[Staging, str] = {}

    def was_staged(self, staging: Staging) -> None:
        """The machine was told that a request is held."""
        if self.open.get(staging.ticket) == staging.serial and staging not in self.outcomes:
            self.held.add(staging)

    def was_closed(self, staging: Staging, how: str) -> None:
        """The machine was told that an attempt is over."""
        if self.open.get(staging.ticket) == staging.serial:
            self._close(staging, how)

    def _close(self, staging: Staging, how: str) -> None:
        del self.open[staging.ticket]
        self.held.discard(staging)
        self.outcomes.setdefault(staging, how)

    def check(self, commands: Iterable[AnyCommand]) -> None:
        """Raises AssertionError where a command breaks a promise."""
        for command in commands:
            match command:
                case Stage(ticket=ticket, serial=serial, attempt=attempt):
                    self._alive(ticket)
                    assert Staging(ticket, serial) not in self.stagings, "a serial number names one staging"
                    assert ticket not in self.open, "an item has one connection at a time"
                    assert attempt >= 1
                    self.stagings.add(Staging(ticket, serial))
                    self.open[ticket] = serial
                case Release(tickets=tickets):
                    assert tickets, "no release is empty"
                    assert len(set(tickets)) == len(tickets), "nobody is released twice at once"
                    for ticket in tickets:
                        self._alive(ticket)
                        staging = Staging(ticket, self.open[ticket])
                        assert staging in self.held, "only what is held is released"
                        self.held.discard(staging)
                        self.outcomes[staging] = "released"
                case Abort(ticket=ticket, serial=serial):
                    self._alive(ticket)
                    assert self.open.get(ticket) == serial, "only a connection that is open is closed"
                    self._close(Staging(ticket, serial), "aborted")
                case Retry(ticket=ticket, again_in_s=again_in_s, is_free=is_free):
                    self._alive(ticket)
                    assert again_in_s == 0 if is_free else again_in_s > 0
                case End(ticket=ticket):
                    self._alive(ticket)
                    assert ticket not in self.open, "who ended holds no connection"
                    self.ended[ticket] = command
                case Load() | Unload() | Probe() | Away() | Back():
                    pass

    def check_finished(self) -> None:
        """Raises AssertionError where an item is lost, or a staging has no outcome."""
        assert set(self.ended) == self.added, "every item that was added ends"
        assert not self.open, "no connection is forgotten"
        assert set(self.outcomes) == self.stagings, "every staging was released, aborted or failed"

    def _alive(self, ticket: int) -> None:
        assert ticket in self.added, "only items that were added are named"
        assert ticket not in self.ended, "no command names an item after its end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong with one attempt of an item, or what does not go at all."""

    # None: it is not an error that happens, but nothing: the item hangs at that place.
    error: UnisonoError | None = None
    # "staging", "held" (`after_s` after it was staged), or "answer": at the backend, after so many tokens.
    place: str = "answer"
    after_tokens: int = 0
    after_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the backend makes of an item."""

    tokens: int = 8
    prompt_s: float = 0.05
    token_s: float = 0.02


@dataclass(slots=True)
class _Call:
    """A connection, from the backend's side."""

    staging: Staging
    fault: Fault | None
    # Since when it waits for a slot, and since when it holds one.
    came_at_s: float = 0.0
    began_at_s: float | None = None


@dataclass(slots=True)
class _Host:
    """A backend with slots and a queue."""

    slots: int
    busy: dict[Staging, _Call] = field(default_factory=dict)
    queue: deque[_Call] = field(default_factory=deque)


class Simulator:
    """Carries out what a machine commands, on a clock of its own."""

    def __init__(
        self,
        machine: Machine,
        *,
        slots: int = 4,
        answer: Answer | None = None,
        staging_s: float = 0.001,
        load_s: float = 1.0,
        told_slots: int | None = None,
        tells_held: bool = True,
        clock_error_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.machine = machine
        self.now = 100.0
        self.log: list[Said] = []
        self.audit = Audit()
        self.loads = 0
        self.loaded_at_s: list[float] = []
        # Written by a scenario: what goes wrong, in order, and what is different for some items.
        self.faults: dict[int, list[Fault]] = defaultdict(list)
        self.answers: dict[int, Answer] = {}
        self.staging_of: dict[int, float] = {}
        self.load_errors: deque[UnisonoError] = deque()
        self.away_until_s: float | None = None
        self.answers_probes_while_away = False
        # Whether a load finds its runner there.
        self.is_in_memory = False
        self._answer = answer or Answer()
        self._staging_s = staging_s
        self._load_s = load_s
        self._told_slots = told_slots
        self._tells_held = tells_held
        self._clock_error_s = clock_error_s
        self._host = _Host(slots)
        self._calls: dict[Staging, _Call] = {}
        self._current: dict[int, _Call] = {}
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self.most_in_flight = 0
        self.ticks = 0
        # When each item last got a slot.
        self.began_at_s: dict[int, float] = {}

    # -- What a scenario does -------------------------------------------------------------------------------------

    def add(self, works: Iterable[Work], runner: RunnerSpec | None = None, **how: bool) -> None:
        """Hands items to the machine."""
        works = list(works)
        self.audit.added |= {work.ticket for work in works}
        if isinstance(self.machine, Arbiter):
            assert runner is not None
            self.do(self.machine.submit(runner, works, self.now, **how))
        else:
            self.do(self.machine.add(works, self.now))

    def at(self, after_s: float, action: Callable[[], None]) -> None:
        """Does something so many seconds from now."""
        heapq.heappush(self._agenda, (self.now + after_s, next(self._order), action))

    def run(self, for_s: float | None = None) -> None:
        """Lets time pass: so long, or until nothing more will happen."""
        end = None if for_s is None else self.now + for_s
        idle_ticks = 0
        while True:
            event = self._agenda[0][0] if self._agenda else None
            alarm = self.machine.next_alarm()
            moments = [moment for moment in (event, alarm) if moment is not None]
            if not moments or (end is not None and min(moments) > end):
                break
            moment = max(self.now, min(moments))
            # An alarm that is not later than the last tick, again and again, is one that a tick does not quiet.
            idle_ticks = idle_ticks + 1 if moment == self.now and alarm is not None and alarm <= self.now else 0
            assert idle_ticks < 1000, "a tick at next_alarm makes progress"
            self.now = moment
            if event is not None and event <= self.now:
                _, _, action = heapq.heappop(self._agenda)
                action()
            else:
                self.ticks += 1
                self.do(self.machine.tick(self.now))
        if end is not None:
            self.now = end

    def runner_dies(self, error: UnisonoError) -> None:
        """The process that holds the model dies: every request at the backend fails."""
        calls = [*self._host.busy.values(), *self._host.queue]
        self._host.busy.clear()
        self._host.queue.clear()
        for call in calls:
            self._fail(call, error)

    # -- What was seen --------------------------------------------------------------------------------------------

    def said(self, kind: type[_Kind]) -> list[_Kind]:
        """The commands of one kind, in order."""
        return [command for _, command in self.log if isinstance(command, kind)]

    def times(self, kind: type[AnyCommand]) -> list[float]:
        """When the commands of one kind were given."""
        return [at_s for at_s, command in self.log if isinstance(command, kind)]

    @property
    def ends(self) -> dict[int, End]:
        """How each item ended."""
        return self.audit.ended

    @property
    def waves(self) -> list[tuple[int, ...]]:
        """Who was released together."""
        return [release.tickets for release in self.said(Release)]

    # -- The commands ---------------------------------------------------------------------------------------------

    def do(self, commands: Iterable[AnyCommand]) -> None:
        """Carries out commands."""
        commands = list(commands)
        self.audit.check(commands)
        for command in commands:
            self.log.append(Said(self.now, command))
            match command:
                case Stage():
                    self._stage(command)
                case Release(tickets=tickets):
                    for ticket in tickets:
                        self._arrive(self._current[ticket])
                case Abort(ticket=ticket, serial=serial) if call := self._calls.get(Staging(ticket, serial)):
                    self._leave(call)
                case Load(runner=runner):
                    self.loads += 1
                    self.at(self._load_s, lambda runner=runner: self._loaded(runner))  # type: ignore[misc]
                case Probe():
                    self.at(0.01, self._probed)
                case _:
                    pass
        self.most_in_flight = max(self.most_in_flight, self.machine.in_flight)
        if isinstance(self.machine, Conductor) and any(isinstance(command, Release) for command in commands):
            assert self.machine.in_flight <= self.machine.limit, "never more in flight than the limit at a release"

    def _stage(self, stage: Stage) -> None:
        faults = self.faults[stage.ticket]
        call = _Call(Staging(stage.ticket, stage.serial), faults.pop(0) if faults else None)
        self._calls[call.staging] = self._current[stage.ticket] = call
        delay_s = self.staging_of.get(stage.ticket, self._staging_s)
        if self._is_away:
            self.at(0.005, lambda: self._fail(call, BackendUnavailableError("connection refused")))
        elif call.fault is not None and call.fault.place == "staging":
            error = call.fault.error
            if error is not None:
                self.at(delay_s, lambda: self._fail(call, error))
        else:
            self.at(delay_s, lambda: self._staged(call))

    def _staged(self, call: _Call) -> None:
        if self._calls.get(call.staging) is not call:
            return
        if call.fault is not None and call.fault.place == "held":
            error = call.fault.error
            assert error is not None
            self.at(call.fault.after_s, lambda: self._closed_while_held(call, error))
        self.audit.was_staged(call.staging)
        self.do(self.machine.staged(*call.staging, self.now))

    def _closed_while_held(self, call: _Call, error: UnisonoError) -> None:
        if call.staging in self.audit.held:
            self._fail(call, error)

    def _fail(self, call: _Call, error: UnisonoError) -> None:
        if self._calls.get(call.staging) is not call:
            return
        is_lost = isinstance(self.machine, Arbiter) and isinstance(error, BackendUnavailableError)
        if not is_lost:
            # An arbiter that loses its backend may close what has failed: its word is about all connections.
            self.audit.was_closed(call.staging, "failed")
        self._leave(call)
        commands = self.machine.failed(*call.staging, error, self.now)
        self.do(commands)
        self.audit.was_closed(call.staging, "failed")

    def _loaded(self, runner: RunnerSpec) -> None:
        assert isinstance(self.machine, Arbiter)
        if self._is_away:
            self.do(self.machine.load_failed(runner, BackendUnavailableError("connection refused"), self.now))
        elif self.load_errors:
            self.do(self.machine.load_failed(runner, self.load_errors.popleft(), self.now))
        else:
            self.loaded_at_s.append(self.now)
            was_loaded = self.is_in_memory
            self.do(self.machine.loaded(runner, self.now, slots=self._told_slots, was_loaded=was_loaded))

    def _probed(self) -> None:
        assert isinstance(self.machine, Arbiter)
        answers = not self._is_away or self.answers_probes_while_away
        self.do(self.machine.probed(self.now, None if answers else BackendUnavailableError("connection refused")))

    @property
    def _is_away(self) -> bool:
        return self.away_until_s is not None and self.now < self.away_until_s

    # -- The backend ----------------------------------------------------------------------------------------------

    def _arrive(self, call: _Call) -> None:
        call.came_at_s = self.now
        self._host.queue.append(call)
        self._fill()

    def _fill(self) -> None:
        while self._host.queue and len(self._host.busy) < self._host.slots:
            call = self._host.queue.popleft()
            call.began_at_s = self.began_at_s[call.staging.ticket] = self.now
            self._host.busy[call.staging] = call
            answer = self.answers.get(call.staging.ticket, self._answer)
            fault = call.fault if call.fault is not None and call.fault.place == "answer" else None
            said = answer.tokens if fault is None else fault.after_tokens
            self._speak(call, answer, 0, said, fault)

    def _speak(self, call: _Call, answer: Answer, spoken: int, until: int, fault: Fault | None) -> None:
        """Schedules an item's next token, one after the other, and what comes after the last."""
        if self._calls.get(call.staging) is not call:
            return
        if spoken:
            self.do(self.machine.spoke(*call.staging, self.now))
        if self._calls.get(call.staging) is not call:
            return
        if spoken < until:
            pause_s = answer.token_s + (0.0 if spoken else answer.prompt_s)
            self.at(pause_s, lambda: self._speak(call, answer, spoken + 1, until, fault))
        elif fault is None:
            self._finish(call)
        elif fault.error is not None:
            error = fault.error
            self.at(fault.after_s, lambda: self._fail(call, error))

    def _finish(self, call: _Call) -> None:
        assert call.began_at_s is not None
        began_at_s, ended_at_s = call.began_at_s + self._clock_error_s(), self.now + self._clock_error_s()
        self._leave(call)
        held = Held(
            start_s=began_at_s,
            end_s=ended_at_s,
            waited_s=max(0.0, began_at_s - call.came_at_s),
            settled_s=min(
                (one.came_at_s for one in (*self._host.busy.values(), *self._host.queue)), default=math.inf
            ),
        )
        self.audit.was_closed(call.staging, "released")
        self.do(self.machine.finished(*call.staging, self.now, held if self._tells_held else None))

    def _leave(self, call: _Call) -> None:
        """Takes a call off the backend, which gives its slot to the next at once."""
        self._calls.pop(call.staging, None)
        if self._host.busy.pop(call.staging, None) is None and call in self._host.queue:
            self._host.queue.remove(call)
        # The next begins in an event of its own: a backend does not answer while it is being told something.
        self.at(0.0, self._fill)


def works(numbers: Iterable[int], batch: int = 0, **more: float | None) -> list[Work]:
    """Items of one batch, with these tickets."""
    return [Work(ticket=number, batch=batch, **more) for number in numbers]  # type: ignore[arg-type]
