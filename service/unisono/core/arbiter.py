"""The machine that runs one backend: which runner's turn it is, when it is loaded, and what to do while it is away.

Theory of operation. A backend is one processor; nothing but its arbiter talks to it. The arbiter holds a conductor
for each runner and lets one of them work at a time, or several that were seen in memory side by side:

1. *Turns*: a runner that is loaded already, or that has waited for `turn_s`, goes first; among such, the one that
   has waited longest. A turn ends when the runner has nothing left for the backend, or, if others wait, after
   `turn_s`: then it takes back what is held, and the next begins when the last in flight has ended.
2. *Load first*: a runner's first items go when the backend has said that the model is loaded, never before: a
   cold model that meets a burst turns requests away. The word holds for `ready_s` after the last item.
3. *Away*: when no connection can be had, everything pauses, and the backend is probed at growing intervals. That
   costs no item an attempt. What is still waiting after `patience_s` fails with BACKEND_UNAVAILABLE. A backend that
   answers probes, but then gives no item a connection, has been away all the while.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from unisono.core import retry
from unisono.core.commands import Command as ItemCommand
from unisono.core.commands import End
from unisono.core.conductor import Conductor, ConductorSettings
from unisono.core.errors import BackendUnavailableError, RunnerDiedError
from unisono.core.model import ItemState
from unisono.core.report import RunnerFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from unisono.core.capacity import Capacity, Held
    from unisono.core.commands import Work
    from unisono.core.errors import UnisonoError
    from unisono.core.model import RunnerSpec, Slots, Usage

# Times that a load is tried before its items fail.
LOAD_ATTEMPTS = 3
# Runners that are remembered, with what was learned of them.
MAX_PLACES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Make this runner ready."""

    runner: RunnerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """Take this runner out of memory: it is idle, and its batch asked for that."""

    runner: RunnerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """See whether the backend answers."""


Command = ItemCommand | Load | Unload | Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class ArbiterSettings:
    """How patient an arbiter is."""

    # The longest turn of a runner while others wait.
    turn_s: float = 30.0
    # How long a runner that was just used counts as loaded.
    ready_s: float = 5.0
    # How long items wait for a backend that is away.
    patience_s: float = 60.0
    conductor: ConductorSettings = field(default_factory=ConductorSettings)


class _Readiness(Enum):
    """How far the turn of a runner is."""

    NO_TURN = "no turn"

    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    # Its time is up: what is in flight ends, and nothing more goes.
    ENDING = "ending"


@dataclass(slots=True)
class _Place:
    """A runner, and what the arbiter knows of it."""

    runner: RunnerSpec
    conductor: Conductor
    # Seen in the backend's memory when work for it came.
    is_loaded: bool = False
    # Seen there since anything was last loaded: it stays beside all others of which that is true.
    is_beside: bool = False
    # Loaded for its items, and not taken out since.
    was_used: bool = False
    waiting_since_s: float = 0.0
    ready_until_s: float = 0.0
    load_failures: int = 0
    load_again_s: float = 0.0
    wants_unload: bool = False
    # Its turn: how far it is, and since when.
    readiness: _Readiness = _Readiness.NO_TURN
    turn_began_s: float = 0.0

    @property
    def is_active(self) -> bool:
        """Whether it is its turn."""
        return self.readiness is not _Readiness.NO_TURN


class Arbiter:
    """Decides for one backend."""

    def __init__(
        self, capacity_of: Callable[[RunnerSpec], Capacity], settings: ArbiterSettings | None = None
    ) -> None:
        self._capacity_of = capacity_of
        self._settings = settings or ArbiterSettings()
        self._places: dict[RunnerSpec, _Place] = {}
        self._runner_of: dict[int, RunnerSpec] = {}
        # Since when no item has got a connection; None: the last one did, or none has tried.
        self._outage_since_s: float | None = None
        # Away: since when, and when it is probed next (None: a probe is under way, or nobody waits).
        self._away_since_s: float | None = None
        self._away_error: UnisonoError | None = None
        self._probe_at_s: float | None = None
        self._probes = 0

    # -- What it is like ---------------------------------------------------------------------------------------

    @property
    def is_away(self) -> bool:
        """Whether the backend was last found not to answer."""
        return self._away_since_s is not None

    @property
    def queued(self) -> int:
        """Items that are not at the backend."""
        return sum(place.conductor.queued for place in self._places.values())

    @property
    def in_flight(self) -> int:
        """Items at the backend."""
        return sum(place.conductor.in_flight for place in self._places.values())

    def runner_of(self, ticket: int) -> RunnerSpec:
        """The runner that an item belongs to; KeyError once it has ended."""
        return self._runner_of[ticket]

    def capacity(self, runner: RunnerSpec) -> Capacity:
        """What is known of a runner's slots."""
        return self._place(runner).conductor.capacity

    def slots(self, runner: RunnerSpec) -> Slots:
        """What is known of a runner's slots; asking about one that never had work leaves no trace."""
        place = self._places.get(runner)
        return (place.conductor.capacity if place else self._capacity_of(runner)).slots

    def figures(self, runner: RunnerSpec) -> RunnerFigures:
        """What was seen of a runner."""
        place = self._places.get(runner)
        return place.conductor.figures if place else RunnerFigures()

    def runners(self) -> list[RunnerSpec]:
        """The runners that had work lately."""
        return list(self._places)

    # -- What happens ------------------------------------------------------------------------------------------

    def submit(
        self,
        runner: RunnerSpec,
        works: Iterable[Work],
        now: float,
        *,
        is_loaded: bool = False,
        unload_after: bool = False,
    ) -> list[Command]:
        """Items want to be run on a runner. `is_loaded`: the backend was seen to hold it in memory."""
        place = self._place(runner)
        if not place.conductor.has_work:
            place.waiting_since_s = now
        place.is_loaded = place.is_beside = is_loaded
        place.wants_unload = place.wants_unload or unload_after
        if not self._runner_of:
            self._outage_since_s = None
            if self._away_since_s is not None:
                # Nobody waited for the backend any more. Now somebody does, from now on.
                self._outage_since_s = self._away_since_s = now
                if self._probes == 0:
                    self._probe_at_s = now
        works = list(works)
        for work in works:
            self._runner_of[work.ticket] = runner
        commands: list[Command] = list(place.conductor.add(works, now))
        return self._settle(commands, now)

    def loaded(
        self, runner: RunnerSpec, now: float, *, slots: int | None = None, was_loaded: bool = False
    ) -> list[Command]:
        """The runner is ready. `slots`: their number, where the backend tells it. `was_loaded`: it was there."""
        place = self._place(runner)
        if not was_loaded:
            for other in self._places.values():
                # It may have had to make room.
                other.is_beside = other.is_active and other.is_beside
        place.load_failures = 0
        place.is_loaded = place.is_beside = place.was_used = True
        if slots is not None:
            place.conductor.capacity.told(slots)
        if place.readiness is not _Readiness.LOADING:
            return []
        place.readiness = _Readiness.READY
        place.turn_began_s = now
        return self._settle(list(place.conductor.open(now, is_fresh=not was_loaded)), now)

    def load_failed(self, runner: RunnerSpec, error: UnisonoError, now: float) -> list[Command]:
        """The runner could not be made ready.

        1. The backend is away: that is another matter.
        2. Another try may help, and there were not too many: again after a while.
        3. Otherwise all its items fail with this error.
        """
        place = self._place(runner)
        if place.readiness is _Readiness.LOADING:
            place.readiness = _Readiness.COLD
        if isinstance(error, BackendUnavailableError):
            return self._settle(self._lose(error, now), now)
        place.load_failures += 1
        if error.is_retryable and place.load_failures < LOAD_ATTEMPTS:
            place.load_again_s = now + retry.backoff_s(place.load_failures, place.runner.model)
            return self._settle([], now)
        place.load_failures = 0
        return self._settle(list(place.conductor.stop_all(ItemState.FAILED, error, now)), now)

    def limit_tokens(self, runner: RunnerSpec, tokens: float | None) -> None:
        """See Conductor.limit_tokens."""
        self._place(runner).conductor.limit_tokens(tokens)

    def probed(self, now: float, error: UnisonoError | None) -> list[Command]:
        """A probe came back: None if the backend answers."""
        if self._away_since_s is None:
            return []
        if error is not None:
            self._away_error = error
            self._probe_at_s = now + retry.backoff_s(min(self._probes, 5), "probe")
            return self._settle([], now)
        self._away_since_s = self._away_error = self._probe_at_s = None
        for place in self._places.values():
            # It may have been restarted: with other slots, and an empty memory.
            place.conductor.capacity.forget()
            place.is_loaded = place.was_used = False
            place.ready_until_s = 0.0
        return self._settle([], now)

    def staged(self, ticket: int, serial: int, now: float) -> list[Command]:
        """See Conductor.staged."""
        conductor = self._conductor_of(ticket)
        if conductor is None:
            return []
        self._outage_since_s = None
        return self._settle(list(conductor.staged(ticket, serial, now)), now)

    def spoke(self, ticket: int, serial: int, now: float) -> list[Command]:
        """See Conductor.spoke. The one step that happens for every token: it settles only what it changed."""
        conductor = self._conductor_of(ticket)
        return list(conductor.spoke(ticket, serial, now)) if conductor else []

    def finished(
        self, ticket: int, serial: int, now: float, held: Held | None, usage: Usage | None = None
    ) -> list[Command]:
        """See Conductor.finished."""
        conductor = self._conductor_of(ticket)
        return self._settle(list(conductor.finished(ticket, serial, now, held, usage)), now) if conductor else []

    def failed(self, ticket: int, serial: int, error: UnisonoError, now: float) -> list[Command]:
        """See Conductor.failed.

        That the backend cannot be reached concerns all items. A runner that died is loaded again first.
        """
        runner = self._runner_of.get(ticket)
        if runner is None:
            return []
        place = self._places[runner]
        commands: list[Command] = []
        if isinstance(error, BackendUnavailableError):
            commands += self._lose(error, now)
        elif (
            isinstance(error, RunnerDiedError)
            and place.readiness in (_Readiness.READY, _Readiness.ENDING)
            and place.conductor.is_flying(ticket, serial)
        ):
            commands += place.conductor.shut(now)
            place.is_loaded = place.is_beside = False
            place.readiness, place.ready_until_s = _Readiness.COLD, 0.0
        return self._settle([*commands, *place.conductor.failed(ticket, serial, error, now)], now)

    def stop(self, tickets: Iterable[int], state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        """These items end now, wherever they are."""
        by_runner: dict[RunnerSpec, list[int]] = {}
        for ticket in tickets:
            runner = self._runner_of.get(ticket)
            if runner is not None:
                by_runner.setdefault(runner, []).append(ticket)
        commands: list[Command] = []
        for runner, theirs in by_runner.items():
            commands += self._places[runner].conductor.stop(theirs, state, error, now)
        return self._settle(commands, now)

    def park(self, batch: int, now: float) -> list[Command]:
        """Nothing more of this batch goes, on any runner that has items of it now."""
        for place in self._places.values():
            place.conductor.park(batch)
        return self._settle([], now)

    def unpark(self, batch: int, now: float) -> list[Command]:
        """The batch goes on."""
        commands: list[Command] = []
        for place in self._places.values():
            commands += place.conductor.unpark(batch, now)
        return self._settle(commands, now)

    def tick(self, now: float) -> list[Command]:
        """Time has passed."""
        commands: list[Command] = []
        for place in list(self._places.values()):
            commands += place.conductor.tick(now)
        if self._away_since_s is not None and now >= self._away_since_s + self._settings.patience_s:
            commands += self._give_up_waiting(now)
        return self._settle(commands, now)

    def next_alarm(self) -> float | None:
        """When `tick` must be called at the latest; None: not before something happens."""
        moments = [moment for p in self._places.values() if (moment := p.conductor.next_alarm()) is not None]
        if self._away_since_s is not None:
            if self._probe_at_s is not None:
                moments.append(self._probe_at_s)
            if self._runner_of:
                moments.append(self._away_since_s + self._settings.patience_s)
        for place in self._active():
            if place.readiness is _Readiness.COLD:
                moments.append(place.load_again_s)
            elif place.readiness is _Readiness.READY and self._someone_else_waits():
                moments.append(place.turn_began_s + self._settings.turn_s)
        return min(moments, default=None)

    # -- Turns -------------------------------------------------------------------------------------------------

    def _settle(self, commands: list[Command], now: float) -> list[Command]:
        """After any change: forgets who ended, sees whose turn it is, and loads or probes where that is due.

        1. The backend is away: only probes go, and only while somebody waits.
        2. A runner's turn is over: nothing in flight, and nothing that wants the backend, or its time is up.
        3. Nobody is active: the next one is. So is one that was seen in memory beside all that are. A runner that was
           used a moment ago needs no load.
        4. An active runner is cold, no other is being loaded, and no failed load must be waited out: load it.
        """
        self._forget_ended(commands)
        if self._away_since_s is not None:
            return [*commands, *self._probe(now)]
        for place in self._active():
            commands += self._end_turn(place, now)
        commands += self._unload_idle()
        while (place := self._next_place(now)) is not None:  # type: ignore[assignment]  # mypy keeps the loop's type
            place.turn_began_s = now
            place.readiness = _Readiness.COLD
            if now < place.ready_until_s:
                place.readiness = _Readiness.READY
                commands += place.conductor.open(now)
        active = self._active()
        cold = next((one for one in active if one.readiness is _Readiness.COLD and now >= one.load_again_s), None)
        if cold is not None and all(one.readiness is not _Readiness.LOADING for one in active):
            cold.readiness = _Readiness.LOADING
            for one in self._places.values():
                # Whoever is in memory may have to make room.
                one.ready_until_s = 0.0
            commands.append(Load(runner=cold.runner))
        return commands

    def _end_turn(self, place: _Place, now: float) -> list[Command]:
        """Sees whether the active runner's turn is over.

        1. A load is under way: it is not broken off, since the backend would have to begin again.
        2. Its time is up while another waits: what is held goes back, and what is in flight ends.
        3. It was ending, but nobody waits any more: it goes on.
        4. It has something for the backend, or at the backend: it goes on.
        5. Otherwise the turn is over.
        """
        commands: list[Command] = []
        if place.readiness is _Readiness.LOADING:
            return []
        others_wait = self._someone_else_waits()
        is_late = now >= place.turn_began_s + self._settings.turn_s
        if place.readiness is _Readiness.READY and others_wait and is_late:
            place.readiness = _Readiness.ENDING
            commands += place.conductor.shut(now)
        elif place.readiness is _Readiness.ENDING and not others_wait:
            place.readiness = _Readiness.READY
            place.turn_began_s = now
            commands += place.conductor.open(now)
        is_ending = place.readiness is _Readiness.ENDING
        if place.conductor.in_flight or (place.conductor.has_work and not is_ending):
            return commands
        commands += place.conductor.shut(now)
        if place.readiness is not _Readiness.COLD:
            place.ready_until_s = now + self._settings.ready_s
        place.waiting_since_s = now
        place.readiness = _Readiness.NO_TURN
        return commands

    def _unload_idle(self) -> list[Command]:
        """Takes out of memory what has no item left and was asked not to stay."""
        commands: list[Command] = []
        for place in self._places.values():
            if place.wants_unload and not place.is_active and place.conductor.is_idle:
                place.wants_unload = False
                if place.was_used:
                    place.is_loaded = place.was_used = False
                    place.ready_until_s = 0.0
                    commands.append(Unload(runner=place.runner))
        return commands

    def _next_place(self, now: float) -> _Place | None:
        """Whose turn begins now: the first of those that wait, or one that has room beside those that are active."""
        active = self._active()
        waiting = [one for one in self._places.values() if one.conductor.has_work and not one.is_active]
        if active:
            # All of them in memory at one time: none has to make room for another.
            if not all(one.readiness is _Readiness.READY and one.is_beside for one in active):
                return None
            waiting = [one for one in waiting if one.is_beside]

        def rank(place: _Place) -> tuple[bool, float]:
            must_wait = not place.is_loaded and now < place.waiting_since_s + self._settings.turn_s
            return must_wait, place.waiting_since_s

        return min(waiting, key=rank, default=None)

    def _active(self) -> list[_Place]:
        return [place for place in self._places.values() if place.is_active]

    def _someone_else_waits(self) -> bool:
        return any(place.conductor.has_work for place in self._places.values() if not place.is_active)

    # -- Away --------------------------------------------------------------------------------------------------

    def _lose(self, error: UnisonoError, now: float) -> list[Command]:
        """No connection can be had. What is in flight fails by itself, when its own connection does."""
        if self._away_since_s is not None:
            return []
        if self._outage_since_s is None:
            self._outage_since_s = now
            self._probes = 0
        self._away_since_s = self._outage_since_s
        self._away_error = error
        self._probe_at_s = now + (retry.backoff_s(min(self._probes, 5), "probe") if self._probes else 0.0)
        commands: list[Command] = []
        for place in self._places.values():
            commands += place.conductor.shut(now)
            place.readiness = _Readiness.NO_TURN
        return commands

    def _probe(self, now: float) -> list[Command]:
        if self._probe_at_s is None or now < self._probe_at_s:
            return []
        self._probe_at_s = None
        if not self._runner_of:
            # Nobody waits: the next who comes will ask.
            self._probes = 0
            return []
        self._probes += 1
        return [Probe()]

    def _give_up_waiting(self, now: float) -> list[Command]:
        said = self._away_error.message if self._away_error else "the backend cannot be reached"
        error = BackendUnavailableError(f"{said} (waited {self._settings.patience_s:g} s for it)")
        commands: list[Command] = []
        for place in self._places.values():
            commands += place.conductor.stop_waiting(ItemState.FAILED, error, now)
        return commands

    # -- Bookkeeping -------------------------------------------------------------------------------------------

    def _place(self, runner: RunnerSpec) -> _Place:
        place = self._places.get(runner)
        if place is None:
            self._forget_idle()
            conductor = Conductor(self._capacity_of(runner), self._settings.conductor)
            place = self._places[runner] = _Place(runner, conductor)
        return place

    def _forget_idle(self) -> None:
        """Callers may ask for ever new runner options: of runners without work, the oldest makes room."""
        idle = [p for p in self._places.values() if p.conductor.is_idle and not p.is_active and not p.wants_unload]
        if len(self._places) >= MAX_PLACES and idle:
            del self._places[min(idle, key=lambda place: place.waiting_since_s).runner]

    def _conductor_of(self, ticket: int) -> Conductor | None:
        runner = self._runner_of.get(ticket)
        return self._places[runner].conductor if runner is not None else None

    def _forget_ended(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, End):
                self._runner_of.pop(command.ticket, None)
