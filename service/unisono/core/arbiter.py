"""The machine that runs one backend: which runner's turn it is, when it is loaded, and what to do while it is away.

Theory of operation. A backend is one processor; nothing but its arbiter talks to it. The arbiter holds a conductor
for each runner and lets one of them work at a time, or several that were seen in memory side by side:

1. *Turns*: whose turn it is, when it is over, and when the backend is left to other clients, is in `turns.py`.
2. *Load first*: a runner's first items go when the backend has said that the model is loaded, never before: a
   cold model that meets a burst turns requests away. The word holds for `ready_s` after the last item.
3. *Away*: when no connection can be had, everything pauses, and the backend is probed (`outage.py`). That costs no
   item an attempt. What is still waiting after `patience_s` fails with BACKEND_UNAVAILABLE.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.core import retry
from unisono.core.commands import Command as ItemCommand
from unisono.core.commands import End
from unisono.core.conductor import Conductor, ConductorSettings
from unisono.core.errors import BackendUnavailableError, RunnerDiedError
from unisono.core.model import ItemState
from unisono.core.outage import Outage
from unisono.core.report import RunnerFigures
from unisono.core.turns import Place, Readiness, Turns

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Away:
    """Tell that the backend cannot be reached; once for each outage."""

    error: UnisonoError
    # Items that wait for it.
    items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Back:
    """Tell that it can be reached again, and after how long."""

    after_s: float


Command = ItemCommand | Load | Unload | Probe | Away | Back


@dataclass(frozen=True, slots=True, kw_only=True)
class ArbiterSettings:
    """How patient an arbiter is."""

    # The longest turn of a runner while others wait.
    turn_s: float = 30.0
    # How long a runner that was just used counts as loaded.
    ready_s: float = 5.0
    # Work without a pause after which other clients of the backend get a moment; 0: never.
    yield_every_s: float = 0.0
    # How long items wait for a backend that is away.
    patience_s: float = 60.0
    conductor: ConductorSettings = field(default_factory=ConductorSettings)


class Arbiter:
    """Decides for one backend."""

    def __init__(
        self, capacity_of: Callable[[RunnerSpec], Capacity], settings: ArbiterSettings | None = None
    ) -> None:
        self._capacity_of = capacity_of
        self._settings = settings or ArbiterSettings()
        self._places: dict[RunnerSpec, Place] = {}
        self._runner_of: dict[int, RunnerSpec] = {}
        self._turns = Turns(
            self._places,
            turn_s=self._settings.turn_s,
            ready_s=self._settings.ready_s,
            yield_every_s=self._settings.yield_every_s,
        )
        self._outage = Outage(self._settings.patience_s)

    # -- What it is like ---------------------------------------------------------------------------------------

    @property
    def is_away(self) -> bool:
        """Whether the backend was last found not to answer."""
        return self._outage.is_away

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
        is_sure: bool = False,
        unload_after: bool = False,
    ) -> list[Command]:
        """Items want to be run on a runner. `is_loaded`: the backend was seen to hold it in memory.

        `is_sure`: a moment ago, and just as these items need it, so that its word need not be asked for.
        """
        place = self._place(runner)
        if not place.conductor.has_work:
            place.waiting_since_s = now
        if not is_loaded and not place.is_active:
            # However lately it was used: another process, or another model, has taken its place.
            place.ready_until_s = 0.0
        if is_sure:
            place.ready_until_s = max(place.ready_until_s, now + self._settings.ready_s)
        place.is_loaded = place.is_beside = is_loaded
        place.wants_unload = place.wants_unload or unload_after
        if not self._runner_of:
            self._outage.somebody_came(now)
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
            # Another process: what was seen of the one before proves nothing of its slots.
            place.conductor.capacity.forget()
        place.load_failures = 0
        place.is_loaded = place.is_beside = place.was_used = True
        if slots is not None:
            place.conductor.capacity.told(slots)
        if place.readiness is not Readiness.LOADING:
            return []
        place.readiness = Readiness.READY
        place.turn_began_s = now
        return self._settle(list(place.conductor.open(now, is_fresh=not was_loaded)), now)

    def load_failed(self, runner: RunnerSpec, error: UnisonoError, now: float) -> list[Command]:
        """The runner could not be made ready.

        1. The backend is away: that is another matter.
        2. Another try may help, and there were not too many: again after a while.
        3. Otherwise all its items fail with this error.
        """
        place = self._place(runner)
        if place.readiness is Readiness.LOADING:
            place.readiness = Readiness.COLD
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
        if not self._outage.is_away:
            return []
        if error is not None:
            self._outage.silent(error, now)
            return self._settle([], now)
        self._outage.answered()
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
        told = self._told_back(self._outage.connected(now))
        return self._settle([*told, *conductor.staged(ticket, serial, now)], now)

    def spoke(self, ticket: int, serial: int, now: float, *, is_drafted: bool = False) -> list[Command]:
        """See Conductor.spoke. The one step that happens for every token: it settles only what it changed."""
        conductor = self._conductor_of(ticket)
        if conductor is None:
            return []
        return [
            *self._told_back(self._outage.heard(now)),
            *conductor.spoke(ticket, serial, now, is_drafted=is_drafted),
        ]

    def finished(
        self, ticket: int, serial: int, now: float, held: Held | None, usage: Usage | None = None
    ) -> list[Command]:
        """See Conductor.finished."""
        conductor = self._conductor_of(ticket)
        if conductor is None:
            return []
        told = self._told_back(self._outage.heard(now))
        return self._settle([*told, *conductor.finished(ticket, serial, now, held, usage)], now)

    def failed(self, ticket: int, serial: int, error: UnisonoError, now: float) -> list[Command]:
        """See Conductor.failed.

        That the backend cannot be reached concerns all items. A runner that died is loaded again first.
        """
        runner = self._runner_of.get(ticket)
        if runner is None:
            return []
        place = self._places[runner]
        is_flying = place.conductor.is_flying(ticket, serial)
        commands: list[Command] = []
        if isinstance(error, BackendUnavailableError):
            commands += self._lose(error, now, was_connected=is_flying)
        elif (
            isinstance(error, RunnerDiedError)
            and place.readiness in (Readiness.READY, Readiness.ENDING)
            and is_flying
        ):
            commands += place.conductor.shut(now)
            place.is_loaded = place.is_beside = False
            place.readiness, place.ready_until_s = Readiness.COLD, 0.0
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
        if self._outage.is_too_long(now):
            for place in self._places.values():
                commands += place.conductor.stop_waiting(ItemState.FAILED, self._outage.error, now)
        return self._settle(commands, now)

    def next_alarm(self) -> float | None:
        """When `tick` must be called at the latest; None: not before something happens."""
        moments = [place.conductor.next_alarm() for place in self._places.values()]
        moments += [self._outage.next_moment(is_awaited=self.queued > 0), self._turns.next_moment()]
        return min((moment for moment in moments if moment is not None), default=None)

    # -- Turns and outages -------------------------------------------------------------------------------------

    def _settle(self, commands: list[Command], now: float) -> list[Command]:
        """After any change: forgets who ended, sees whose turn it is, and loads or probes where that is due.

        While the backend is away only probes go, and only while somebody waits.
        """
        self._forget_ended(commands)
        self._turns.see(now)
        if self._outage.is_away:
            return [*commands, Probe()] if self._outage.probe(now, is_awaited=bool(self._runner_of)) else commands
        commands += self._turns.end_old(now)
        commands += self._unload_idle()
        commands += self._turns.begin_new(now)
        runner = self._turns.load_next(now)
        if runner is not None:
            commands.append(Load(runner=runner))
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

    def _told_back(self, after_s: float | None) -> list[Command]:
        return [] if after_s is None else [Back(after_s=after_s)]

    def _lose(self, error: UnisonoError, now: float, *, was_connected: bool = False) -> list[Command]:
        """No connection can be had, or none that leads there. What is in flight fails when its own does."""
        if self._outage.is_away:
            return []
        is_news = self._outage.lost(error, now, was_connected=was_connected)
        commands: list[Command] = [Away(error=error, items=len(self._runner_of))] if is_news else []
        for place in self._places.values():
            commands += place.conductor.shut(now)
            place.readiness = Readiness.NO_TURN
        return commands

    # -- Bookkeeping -------------------------------------------------------------------------------------------

    def _place(self, runner: RunnerSpec) -> Place:
        place = self._places.get(runner)
        if place is None:
            self._forget_idle()
            conductor = Conductor(self._capacity_of(runner), self._settings.conductor)
            place = self._places[runner] = Place(runner, conductor)
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
