"""Drives one backend: tells its arbiter what happens, and does what the arbiter says.

Whose the items are is told through `sink.py`; loads, unloads and probes are `errands.py`.

Every method is called from the event loop's thread. News and commands are strictly in turn: a command may cause
news at once (an item's end makes its batch add another), whose commands wait behind the ones before them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from unisono.app.attempts import Attempt, Attempts
from unisono.app.contexts import Contexts
from unisono.app.errands import Errands, defect_error
from unisono.app.sink import Departure
from unisono.app.slot_keeper import SlotKeeper, held_of
from unisono.app.timers import Alarm
from unisono.core.arbiter import Arbiter, ArbiterSettings, Away, Back, Load, Probe, Unload
from unisono.core.commands import Abort, End, Release, Retry, Stage
from unisono.core.errors import ConnectionLostError, UnisonoError
from unisono.core.harmonise import Standing
from unisono.core.model import Finished, ItemState, Slots, SlotState, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from unisono.app.ports import Backend, Clock, HeldCall, SlotMemory
    from unisono.app.sink import Sink
    from unisono.core.arbiter import Command
    from unisono.core.capacity import Held
    from unisono.core.commands import Work
    from unisono.core.model import Item, ModelInfo, RunnerSpec
    from unisono.core.report import RunnerFigures

_DEFAULT_KEEP_ALIVE_S = 300.0
_NO_USAGE = Usage()
# Names releases, of all backends; never used twice within a process.
_releases = count(1)


@dataclass(slots=True)
class _Ticket:
    """An item on this backend."""

    item: Item
    runner: RunnerSpec
    sink: Sink


@dataclass(slots=True)
class _Runner:
    """What the driver remembers of a runner."""

    # Sinks that have items on it, and how many.
    sinks: Counter[Sink] = field(default_factory=Counter)
    keep_alive_s: float = _DEFAULT_KEEP_ALIVE_S
    # Tokens of context of each slot as they were planned; 0: not known.
    context_tokens: int = 0


class BackendDriver:
    """Runs items on one backend. `run` must be running meanwhile."""

    def __init__(
        self,
        backend: Backend,
        clock: Clock,
        *,
        slots: int | None = None,
        max_in_flight: int = 64,
        memory_factor: float = 1.0,
        settings: ArbiterSettings | None = None,
        memory: SlotMemory | None = None,
        report_defect: Callable[[str, BaseException], None],
        report_outage: Callable[[Away | Back], None] = lambda _: None,
    ) -> None:
        """`slots`: the configured number. `memory`: what earlier runs learned of slots.

        `memory_factor`: the share of a runner's context that items in flight may reserve.
        `report_defect` is told what should not have happened, with where; `report_outage`, when the backend goes away
        and when it is back.
        """
        self.backend = backend
        self._clock = clock
        self._slot_keeper = SlotKeeper(backend, configured=slots, ceiling=max_in_flight, memory=memory)
        self._arbiter = Arbiter(self._slot_keeper.new, settings)
        self._report_defect = report_defect
        self._report_outage = report_outage
        self._errands = Errands(backend, report_defect)
        self._tickets: dict[int, _Ticket] = {}
        self._attempts = Attempts()
        self._runners: dict[RunnerSpec, _Runner] = {}
        self._contexts = Contexts(memory_factor)
        self._to_do: deque[Command] = deque()
        self._is_busy = False
        self._alarm = Alarm(clock, self._tick)
        self._group: asyncio.TaskGroup | None = None
        # Loads, unloads and probes under way.
        self._under_way: set[asyncio.Task[None]] = set()
        self._is_over = asyncio.Event()
        # Whether it did not answer when it was last asked for a model, beside what the arbiter knows.
        self._was_silent = False

    # -- For the application -------------------------------------------------------------------------------

    async def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Carries out what is decided, until `stop`."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                started()
                await self._is_over.wait()
                for task in [*self._attempts.tasks, *self._under_way]:
                    _ = task.cancel()
        finally:
            self._group = None
            self._alarm.stop()

    def stop(self) -> None:
        """Ends `run`. Items that have not ended are told nothing any more."""
        self._is_over.set()

    def submit(
        self,
        runner: RunnerSpec,
        works: Sequence[tuple[Work, Item]],
        sink: Sink,
        *,
        is_loaded: bool,
        keep_alive_s: float | None,
        context_tokens: int = 0,
        is_sure: bool = False,
    ) -> None:
        """Items of one sink want to be run. `context_tokens`: of each slot, as planned; 0: not known.

        `is_sure`: see Arbiter.submit.
        """
        place = self._runners.setdefault(runner, _Runner())
        if keep_alive_s:
            # Of those that share a runner, the longest.
            place.keep_alive_s = max(place.keep_alive_s, keep_alive_s) if place.sinks else keep_alive_s
        place.sinks[sink] += len(works)
        for work, item in works:
            self._tickets[work.ticket] = _Ticket(item, runner, sink)
        place.context_tokens = context_tokens or place.context_tokens
        self._limit_tokens(runner)
        self._carry_out(
            self._arbiter.submit(
                runner,
                (work for work, _ in works),
                self._clock.monotonic_s(),
                is_loaded=is_loaded,
                is_sure=is_sure,
                unload_after=keep_alive_s == 0,
            )
        )

    def end(self, tickets: Iterable[int], state: ItemState, error: UnisonoError) -> None:
        """These items end now."""
        self._carry_out(self._arbiter.stop(tickets, state, error, self._clock.monotonic_s()))

    def park(self, batch: int) -> None:
        """Nothing more of this batch goes, until `unpark`."""
        self._carry_out(self._arbiter.park(batch, self._clock.monotonic_s()))

    def unpark(self, batch: int) -> None:
        """The batch goes on."""
        self._carry_out(self._arbiter.unpark(batch, self._clock.monotonic_s()))

    def slots(self, runner: RunnerSpec) -> Slots:
        """What is known of a runner's slots."""
        return self._arbiter.slots(runner)

    def slot_state(self, runner: RunnerSpec, model: ModelInfo | None = None) -> SlotState:
        """The same with all that belongs to it; why there is only one, where its model is said."""
        is_known = runner in self._arbiter.runners()
        capacity = self._arbiter.capacity(runner) if is_known else self._slot_keeper.new(runner)
        return self._slot_keeper.state(runner, capacity, model)

    def figures(self, runner: RunnerSpec) -> RunnerFigures:
        """What was seen of a runner since it first had work."""
        return self._arbiter.figures(runner)

    def tell_slots(self, runner: RunnerSpec, count: int) -> None:
        """The backend itself says how many slots a runner has."""
        self._arbiter.capacity(runner).told(count)

    @property
    def known_slots(self) -> dict[RunnerSpec, SlotState]:
        """What is known of the slots of all runners that had work so far."""
        return {runner: self.slot_state(runner) for runner in self._arbiter.runners()}

    @property
    def standing(self) -> list[Standing]:
        """The runners that had work lately, with what the backend gave them."""
        return [
            Standing(runner=runner, context_tokens=self._contexts.given(runner), is_busy=runner in self._runners)
            for runner in self._arbiter.runners()
        ]

    @property
    def is_away(self) -> bool:
        """Whether the backend was last found not to answer."""
        return self._arbiter.is_away

    @property
    def is_silent(self) -> bool:
        """See BackendStanding. While it has no items its arbiter does not ask, and knows of nothing."""
        return self._was_silent or self.is_away

    def found(self, *, is_silent: bool) -> None:
        """Somebody else asked the backend, and it answered or not: only for those who look at it from outside."""
        self._was_silent = is_silent

    @property
    def queued(self) -> int:
        """Items that are not at the backend."""
        return self._arbiter.queued

    @property
    def in_flight(self) -> int:
        """Items at the backend."""
        return self._arbiter.in_flight

    # -- Commands ------------------------------------------------------------------------------------------

    def _carry_out(self, commands: Iterable[Command]) -> None:
        self._to_do.extend(commands)
        if self._is_busy:
            return
        self._is_busy = True
        try:
            while self._to_do:
                command = self._to_do.popleft()
                try:
                    self._do(command)
                except Exception as defect:  # noqa: BLE001 - the commands behind it are for other items
                    self._report_defect(f"the command {type(command).__name__}", defect)
                    self._give_up(command, defect)
        finally:
            self._is_busy = False
        self._set_alarm()

    def _do(self, command: Command) -> None:
        match command:
            case Stage():
                attempt = Attempt(command.serial, self._start(self._attempt(command)))
                self._attempts.begin(command.ticket, attempt)
            case Release():
                self._release(command)
            case Abort():
                self._abort(command)
            case Retry():
                self._tickets[command.ticket].sink.item_retried(command)
            case End():
                ticket = self._tickets.pop(command.ticket)
                sinks = self._runners[ticket.runner].sinks
                sinks[ticket.sink] -= 1
                if not sinks[ticket.sink]:
                    del sinks[ticket.sink]
                if not sinks:
                    del self._runners[ticket.runner]
                ticket.sink.item_ended(command)
            case Load():
                self._go(self._load(command.runner))
            case Unload():
                self._go(self._errands.unload(command.runner))
            case Probe():
                self._go(self._probe())
            case Away() | Back():
                self._report_outage(command)

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        if self._group is None:
            work.close()
            raise RuntimeError("the driver of this backend is not running")
        return self._group.create_task(work)

    def _go(self, work: Coroutine[None, None, None]) -> None:
        """Starts what runs until it is done, or the driver is stopped."""
        task = self._start(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    def _give_up(self, command: Command, defect: Exception) -> None:
        """Requests of a release that went wrong would wait for an answer that never comes."""
        if not isinstance(command, Release):
            return
        error = defect_error(defect)
        for number in command.tickets:
            attempt = self._attempts.end_any(number)
            if attempt is not None:
                self._miss(number, attempt)
                attempt.break_off()
                self._to_do.extend(self._arbiter.failed(number, attempt.serial, error, self._clock.monotonic_s()))

    def _abort(self, abort: Abort) -> None:
        attempt = self._attempts.end(abort.ticket, abort.serial)
        if attempt is not None:
            self._miss(abort.ticket, attempt)
            attempt.break_off()

    def _release(self, release: Release) -> None:
        attempts = [self._attempts[number] for number in release.tickets]
        now = self._clock.monotonic_s()
        for attempt in attempts:
            attempt.is_released = True
            attempt.released_s = now
        times = self.backend.release([attempt.call for attempt in attempts if attempt.call is not None])
        wave_key = next(_releases)
        departures = {
            number: Departure(wave_key=wave_key, at_ns=times.last_ns, reason=reason, lane=lane, held_bytes=held)
            for number, reason, lane, held in zip(
                release.tickets, release.reasons, release.lanes, release.held_bytes, strict=True
            )
        }
        by_sink: dict[Sink, list[int]] = {}
        for number in release.tickets:
            by_sink.setdefault(self._tickets[number].sink, []).append(number)
        for sink, theirs in by_sink.items():
            for number in theirs:
                sink.item_released(number, departures[number])
            others = len(release.tickets) - len(theirs)
            sink.wave_released(theirs, others, times, wave_key)

    # -- One attempt ---------------------------------------------------------------------------------------

    async def _attempt(self, stage: Stage) -> None:
        """One attempt, from the staging to the end of the answer; whatever ends it is told to the arbiter."""
        error: UnisonoError
        try:
            await self._stage_and_answer(stage)
        except UnisonoError as failure:
            error = failure
        except Exception as defect:  # noqa: BLE001 - a defect must cost one item, not the service with all batches
            self._report_defect(f"an attempt of item {stage.ticket}", defect)
            error = defect_error(defect)
        else:
            return
        ticket = self._tickets.get(stage.ticket)
        relay = ticket.sink.relay_of(stage.ticket) if ticket is not None else None
        error.is_final = relay is not None and relay.has_begun
        attempt = self._attempts.end(stage.ticket, stage.serial)
        if attempt is not None:
            self._miss(stage.ticket, attempt)
        self._carry_out(self._arbiter.failed(stage.ticket, stage.serial, error, self._clock.monotonic_s()))

    async def _stage_and_answer(self, stage: Stage) -> None:
        number, serial = stage.ticket, stage.serial
        ticket, attempt = self._tickets[number], self._attempts[number]
        headers = ticket.sink.item_staging(number, stage.attempt)
        relay = ticket.sink.relay_of(number)
        call = attempt.call = await self.backend.stage(ticket.item, ticket.runner, headers, relay)
        try:
            self.found(is_silent=False)
            ticket.sink.item_staged(number)
            self._carry_out(self._arbiter.staged(number, serial, self._clock.monotonic_s()))
            await call.wait_closed()
            if not attempt.is_released:
                raise ConnectionLostError("the backend closed a connection on which a request was held")
            await self._read(stage, ticket, call)
        finally:
            call.abort()

    async def _read(self, stage: Stage, ticket: _Ticket, call: HeldCall) -> None:
        number, serial, has_spoken = stage.ticket, stage.serial, False
        async with contextlib.aclosing(call.answer()) as pieces:
            async for piece in pieces:
                now = self._clock.monotonic_s()
                if isinstance(piece, Finished):
                    _ = self._attempts.end(number, serial)
                    ticket.sink.item_finished(number, piece)
                    held = self._held(ticket, piece, now)
                    # Not every answer that is only passed on tells its tokens.
                    usage = piece.usage if piece.usage != _NO_USAGE else None
                    self._carry_out(self._arbiter.finished(number, serial, now, held, usage))
                    self._slot_keeper.remember(ticket.runner, self._arbiter.capacity(ticket.runner))
                    self._limit_tokens(ticket.runner)
                    return
                is_drafted = ticket.sink.item_spoke(number, piece)
                commands = self._arbiter.spoke(number, serial, now, is_drafted=is_drafted)
                if commands or not has_spoken:
                    has_spoken = True
                    self._carry_out(commands)
        raise ConnectionLostError("the answer ended before the backend said that it was done")

    # -- Slots ---------------------------------------------------------------------------------------------

    def _miss(self, number: int, attempt: Attempt) -> None:
        """An attempt is over, and nobody will know when it held a slot."""
        if attempt.is_released:
            self._arbiter.capacity(self._tickets[number].runner).missed()

    def _held(self, ticket: _Ticket, answer: Finished, now: float) -> Held | None:
        held = held_of(answer, now - self._attempts.first_release_s)
        if held is None:
            self._arbiter.capacity(ticket.runner).missed()
        return held

    def _limit_tokens(self, runner: RunnerSpec) -> None:
        """Says how many tokens items in flight may reserve, as far as context and slots are known by now."""
        if self._contexts.is_limited(runner):
            place = self._runners.get(runner)
            planned = place.context_tokens if place is not None else 0
            capacity = self._arbiter.capacity(runner)
            self._arbiter.limit_tokens(runner, self._contexts.limit(runner, capacity, planned))

    # -- The runner and the backend ------------------------------------------------------------------------

    async def _load(self, runner: RunnerSpec) -> None:
        place = self._runners.get(runner) or _Runner()
        for sink in list(place.sinks):
            sink.runner_loading()
        started_ns = self._clock.time_ns()
        said = await self._errands.load(runner, place.keep_alive_s)
        outcome, error = (None, said) if isinstance(said, UnisonoError) else (said, None)
        for sink in list(place.sinks):
            sink.runner_loaded(started_ns, outcome, error)
        now = self._clock.monotonic_s()
        if isinstance(said, UnisonoError):
            self._carry_out(self._arbiter.load_failed(runner, said, now))
            return
        # As long as the arbiter remembers the runner itself.
        self._contexts.remember(runner, said.context_tokens, self._arbiter.runners())
        self._limit_tokens(runner)
        self._carry_out(self._arbiter.loaded(runner, now, slots=said.slots, was_loaded=said.was_loaded))

    async def _probe(self) -> None:
        error = await self._errands.probe()
        if error is None:
            self.found(is_silent=False)
        self._carry_out(self._arbiter.probed(self._clock.monotonic_s(), error))

    # -- Time ----------------------------------------------------------------------------------------------

    def _set_alarm(self) -> None:
        if self._group is not None:
            self._alarm.set(self._arbiter.next_alarm())

    def _tick(self) -> None:
        self._carry_out(self._arbiter.tick(self._clock.monotonic_s()))
