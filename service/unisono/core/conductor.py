"""The machine that runs one runner: which item goes when, and what becomes of it. No input or output happens here.

Theory of operation. Things happen (`add`, `staged`, `spoke`, `failed`, `tick`, …), each with the time at which it
did; the conductor changes its state and returns commands (`Stage`, `Release`, `Abort`, `Retry`, `End`), which the
application carries out. Every item that was added gets exactly one `End`.

Which item goes into which slot is decided by `schedule.py`. The conductor carries it out, in `_go_on`:

1. *Stage ahead*: for every slot the next request is held ready, all but its last byte sent, so that a release costs
   one byte.
2. *The wave*: while nothing is in flight, wait until all that fit are staged, then release them in one go, so that
   they share their passes from the first on. A straggler is not waited for longer than `hold_patience_s`.
3. *Refill*: while something is in flight, a slot that falls free is filled at once.

An attempt that went wrong comes in with the serial number of its staging; news of an older one is ignored, so
that an aborted request cannot speak for its successor.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.core import retry
from unisono.core.commands import Abort, Command, End, Release, Retry, Stage, Work
from unisono.core.errors import (
    BackendStalledError,
    BatchDeadlineError,
    ConnectionLostError,
    ItemTimeoutError,
    QueueTimeoutError,
    RunnerDiedError,
    UnisonoError,
)
from unisono.core.lifecycle import IN_FLIGHT, Phase, Step, after
from unisono.core.model import ItemState
from unisono.core.report import IdleReason, RunnerFigures
from unisono.core.schedule import Schedule, WindowSettings
from unisono.core.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from unisono.core.capacity import Capacity, Held
    from unisono.core.model import Usage
    from unisono.core.schedule import Seat

# A successor is released when so many tokens are left to an item's num_predict: the time of a release and of the
# backend's own way from the socket to the slot, which is less than two passes of the fastest models measured.
NEAR_END_TOKENS = 2
# Requests for slots that hold their prefixes have about a pass to get there, before others come that any free slot
# would take; at least and at most so long, in seconds.
APART_S = (0.005, 0.025)
# Stagings that may fail in a row without costing an attempt: a server that keeps closing held connections.
FREE_RESTAGES = 10


@dataclass(slots=True)
class _Entry:
    """An item on its way."""

    work: Work
    item: Waiting
    phase: Phase = Phase.QUEUED
    serial: int = 0
    # Times released; of these, broken off by another item's attempt; attempts used up; free stagings in a row.
    releases: int = 0
    disturbed: int = 0
    charged: int = 0
    free: int = 0
    staged_at_s: float = 0.0
    heard_at_s: float = 0.0
    # Whether it has ever spoken: then its queue_timeout is met.
    has_spoken: bool = False
    # It fell, and it is not yet known whether alone.
    has_fallen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConductorSettings:
    """How patient a conductor is."""

    # A wave does not wait longer than this for a straggler that is still being staged.
    hold_patience_s: float = 0.25
    # A held request is staged anew after this long: some servers and proxies close an unfinished request.
    hold_limit_s: float = 60.0
    # Requests are in flight, and none of them has been answered anything for so long: they are given up.
    stall_s: float = 600.0
    window: WindowSettings = field(default_factory=WindowSettings)


class Conductor:
    """Runs the items of one runner."""

    def __init__(self, capacity: Capacity, settings: ConductorSettings | None = None) -> None:
        self.capacity = capacity
        self._settings = settings or ConductorSettings()
        self._schedule = Schedule(capacity, self._settings.window)
        self._entries: dict[int, _Entry] = {}
        # Staging, staged and in flight, in the order in which they got there.
        self._staging: dict[int, _Entry] = {}
        self._staged: dict[int, _Entry] = {}
        self._flying: dict[int, _Entry] = {}
        # (when, ticket): what must be looked at then. Entries that are gone by then are passed over.
        self._alarms: list[tuple[float, int]] = []
        self._is_open = False
        self._heard_at_s = 0.0
        self._serial = 0
        self._wave = 0
        # When a wave goes without its stragglers, or behind another; None: no wave waits.
        self._wave_due_s: float | None = None
        # Until then, only who goes to a slot that holds its prefix.
        self._apart_until_s = 0.0
        # Slots × seconds that were idle, by reason, up to `_counted_s`.
        self._idle: defaultdict[IdleReason, float] = defaultdict(float)
        self._counted_s = 0.0
        self._deaths = 0

    # -- What it is like ---------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether it has no item at all."""
        return not self._entries

    @property
    def has_work(self) -> bool:
        """Whether it has an item that wants the backend now: not only ones that wait for their next attempt."""
        return bool(self._flying or self._staging or self._staged or self._schedule.has_waiting)

    @property
    def queued(self) -> int:
        """Items that are not at the backend."""
        return len(self._entries) - len(self._flying)

    @property
    def in_flight(self) -> int:
        """Items at the backend."""
        return len(self._flying)

    @property
    def limit(self) -> int:
        """The most that may be in flight at this moment."""
        return self._schedule.most

    @property
    def figures(self) -> RunnerFigures:
        """What was seen of the runner, up to the last thing that happened."""
        meter = self._schedule.meter
        return RunnerFigures(
            idle_s=dict(self._idle), deaths=self._deaths, costs=meter.costs, bytes_per_token=meter.bytes_per_token
        )

    def phase(self, ticket: int) -> Phase:
        """Where an item is; ENDED for one that it does not have (any more)."""
        entry = self._entries.get(ticket)
        return entry.phase if entry else Phase.ENDED

    def is_flying(self, ticket: int, serial: int) -> bool:
        """Whether this attempt of an item is at the backend."""
        return self._current(ticket, serial, *IN_FLIGHT) is not None

    # -- What happens ------------------------------------------------------------------------------------------

    def add(self, works: Iterable[Work], now: float) -> list[Command]:
        """Items want to be run."""
        self._count_idle(now)
        meter, room = self._schedule.meter, self._schedule.room
        for work in works:
            if work.batch not in room.batches and room.batches:
                # Somebody new: who was to follow is decided anew.
                self._schedule.reconsider()
            room.batch(work.batch, work.terms)
            family = work.prefix.key if work.prefix is not None else 0
            item = Waiting(
                work.ticket,
                work.batch,
                work.prefix,
                work.prompt_bytes,
                work.terms,
                meter.expected_length(work.num_predict, family),
            )
            self._entries[work.ticket] = _Entry(work, item)
            self._schedule.add(item, is_single=work.is_single and self._is_open, now=now)
            for moment in (work.speak_by_s, work.end_by_s):
                if moment is not None:
                    heapq.heappush(self._alarms, (moment, work.ticket))
        return self._go_on(now)

    def open(self, now: float, *, is_fresh: bool = False) -> list[Command]:
        """The runner is ready: items may go. `is_fresh`: it was loaded anew, and its slots hold nothing."""
        self._count_idle(now)
        self._is_open = True
        self._heard_at_s = now
        if is_fresh:
            self._schedule.forget_caches()
        return self._go_on(now)

    def shut(self, now: float) -> list[Command]:
        """The runner is not ready any more, or another's turn has come: nothing more goes; what is held goes back.

        What is in flight stays there, and ends or fails by itself.
        """
        self._count_idle(now)
        self._is_open = False
        self._wave_due_s = None
        self._schedule.reconsider()
        return self._recall([*self._staged.values(), *self._staging.values()])

    def staged(self, ticket: int, serial: int, now: float) -> list[Command]:
        """All but its last byte is sent."""
        entry = self._current(ticket, serial, Phase.STAGING)
        if entry is None:
            return []
        self._count_idle(now)
        del self._staging[ticket]
        entry.phase = after(entry.phase, Step.STAGED)
        entry.staged_at_s = now
        self._staged[ticket] = entry
        return self._go_on(now)

    def spoke(self, ticket: int, serial: int, now: float) -> list[Command]:
        """It got a token."""
        entry = self._current(ticket, serial, Phase.RELEASED, Phase.SPEAKING)
        if entry is None:
            return []
        item = entry.item
        is_first = entry.phase is Phase.RELEASED
        if is_first:
            entry.phase = after(entry.phase, Step.SPEAK)
            entry.has_spoken = True
        item.tokens += 1
        entry.heard_at_s = self._heard_at_s = now
        is_told = self._schedule.spoke(ticket, now)
        bound = entry.work.num_predict
        if not item.is_near_end and bound is not None and 0 < bound <= item.tokens + NEAR_END_TOKENS:
            item.is_near_end = is_told = True
        if not is_told:
            return []
        self._count_idle(now)
        return self._go_on(now)

    def finished(
        self, ticket: int, serial: int, now: float, held: Held | None, usage: Usage | None = None
    ) -> list[Command]:
        """Its answer is whole. `held`: when it had a slot, and `usage`: its tokens, where the backend said it."""
        entry = self._current(ticket, serial, Phase.RELEASED, Phase.SPEAKING)
        if entry is None:
            return []
        self._count_idle(now)
        self._heard_at_s = now
        if held is not None:
            others = (other for other in self._flying.values() if other is not entry)
            self.capacity.observe(held, speaking=sum(1 for other in others if other.phase is Phase.SPEAKING))
        if usage is not None:
            meter, work = self._schedule.meter, entry.work
            meter.counted(prompt_tokens=usage.prompt_tokens, prompt_bytes=work.prompt_bytes)
            meter.answered(usage.completion_tokens, work.num_predict, entry.item.family)
        return [self._end(entry, ItemState.COMPLETED, None, now), *self._go_on(now)]

    def failed(self, ticket: int, serial: int, error: UnisonoError, now: float) -> list[Command]:
        """The attempt went wrong: while staging, while held, or at the backend."""
        entry = self._current(ticket, serial, Phase.STAGING, Phase.STAGED, Phase.RELEASED, Phase.SPEAKING)
        if entry is None:
            return []
        self._count_idle(now)
        return [*self._fail(entry, error, now), *self._go_on(now)]

    def stop(self, tickets: Iterable[int], state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        """These items end now, wherever they are. Those that ended before are passed over."""
        self._count_idle(now)
        commands: list[Command] = []
        for ticket in tickets:
            entry = self._entries.get(ticket)
            if entry is not None:
                commands += self._stop(entry, state, error, now)
        return [*commands, *self._go_on(now)]

    def park(self, batch: int) -> None:
        """Nothing more of this batch goes; what is in flight does."""
        self._schedule.park(batch, is_parked=True)

    def unpark(self, batch: int, now: float) -> list[Command]:
        """The batch goes on."""
        self._schedule.park(batch, is_parked=False)
        return self._go_on(now)

    def limit_tokens(self, tokens: float | None) -> None:
        """Items at the backend may reserve so many tokens together, from the next decision on; None: any number."""
        self._schedule.token_limit = tokens

    def stop_all(self, state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        """All items end now."""
        return self.stop(list(self._entries), state, error, now)

    def stop_waiting(self, state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        """All items end now but those at the backend, which may still be answered."""
        return self.stop([ticket for ticket in self._entries if ticket not in self._flying], state, error, now)

    def tick(self, now: float) -> list[Command]:
        """Time has passed: limits are met, retries fall due, a wave has waited long enough."""
        self._count_idle(now)
        commands: list[Command] = []
        while self._alarms and self._alarms[0][0] <= now:
            _, ticket = heapq.heappop(self._alarms)
            commands += self._look_at(ticket, now)
        for entry in list(self._flying.values()):
            limit_s = entry.work.silence_s
            if limit_s is not None and entry.phase is Phase.SPEAKING and now >= entry.heard_at_s + limit_s:
                error = ItemTimeoutError(f"said nothing for {limit_s:g} s after its first token (item_timeout)")
                self.capacity.stumbled()
                commands += self._stop(entry, ItemState.EXPIRED, error, now)
        if self._flying and now >= self._heard_at_s + self._settings.stall_s:
            commands += self._give_up_stalled(now)
        limit_s = self._settings.hold_limit_s
        commands += self._recall([entry for entry in self._staged.values() if now >= entry.staged_at_s + limit_s])
        return [*commands, *self._go_on(now)]

    def next_alarm(self) -> float | None:
        """When `tick` must be called at the latest; None: not before something happens."""
        moments = [self._alarms[0][0]] if self._alarms else []
        moments += [
            entry.heard_at_s + entry.work.silence_s
            for entry in self._flying.values()
            if entry.work.silence_s is not None and entry.phase is Phase.SPEAKING
        ]
        moment = self._schedule.next_moment()
        if moment is not None:
            moments.append(moment)
        if self._flying:
            moments.append(self._heard_at_s + self._settings.stall_s)
        if self._staged:
            oldest = min(entry.staged_at_s for entry in self._staged.values())
            moments.append(oldest + self._settings.hold_limit_s)
        if self._wave_due_s is not None:
            moments.append(self._wave_due_s)
        return min(moments, default=None)

    # -- The schedule ------------------------------------------------------------------------------------------

    def _go_on(self, now: float) -> list[Command]:
        """Stages and releases all that may go at this moment."""
        commands = self._judge(now)
        self._schedule.gather(now)
        if not self._is_open:
            return commands
        return [*commands, *self._fill(now), *self._stage_ahead(now), *self._send_to_door(now), *self._trim()]

    def _fill(self, now: float) -> Iterator[Command]:
        """Fills the lanes that are free: with what is staged, and stages the rest.

        While nothing is in flight, all that are decided go together, or when the first has been held long enough.
        """
        seats = self._schedule.plan(now)
        self._wave_due_s = None
        yield from self._stage(seats)
        ready = [seat for seat in seats if seat.item.ticket in self._staged]
        if not ready:
            return
        ready = self._without_waves_that_wait(seats, ready, now)
        at_home = [seat for seat in ready if seat.held_bytes]
        if at_home:
            costs = self._schedule.meter.costs
            least_s, most_s = APART_S
            pass_s = most_s if costs is None else costs.pass_s + costs.token_s
            self._apart_until_s = now + min(max(pass_s, least_s), most_s)
        elif now < self._apart_until_s:
            # Else one of these might take the slot that the ones before it were sent to.
            self._wave_due_s = self._apart_until_s
            return
        if ready:
            yield self._release(at_home or ready, now)
        if at_home and len(at_home) < len(ready):
            self._wave_due_s = self._apart_until_s

    def _without_waves_that_wait(self, seats: list[Seat], ready: list[Seat], now: float) -> list[Seat]:
        """Takes out who has to wait until all that go together are staged.

        While nothing is in flight, all go together; else those who came out of the window together.
        """
        waves = [seat for seat in seats if not self._flying or seat.item.is_gathered]
        held = [seat for seat in waves if seat.item.ticket in self._staged]
        if held and len(held) < len(waves):
            due_s = min(self._staged[seat.item.ticket].staged_at_s for seat in held) + self._settings.hold_patience_s
            if now < due_s:
                self._wave_due_s = due_s
                return [seat for seat in ready if seat not in held]
        return ready

    def _stage_ahead(self, now: float) -> Iterator[Command]:
        yield from self._stage(self._schedule.ahead(now))

    def _send_to_door(self, now: float) -> Iterator[Command]:
        seats = self._schedule.door(now, self._staged)
        if seats:
            yield self._release(seats, now)
            # What was released made room for the next to be held ready.
            yield from self._stage_ahead(now)

    def _stage(self, seats: Iterable[Seat]) -> Iterator[Command]:
        for seat in seats:
            entry = self._entries[seat.item.ticket]
            if entry.phase is Phase.QUEUED:
                entry.phase = after(entry.phase, Step.STAGE)
                self._serial += 1
                entry.serial = self._serial
                self._staging[seat.item.ticket] = entry
                yield Stage(ticket=seat.item.ticket, serial=entry.serial, attempt=entry.releases + 1)

    def _release(self, seats: Sequence[Seat], now: float) -> Release:
        if not self._flying:
            self._heard_at_s = now
        held: list[int | None] = []
        for seat in seats:
            entry = self._staged.pop(seat.item.ticket)
            entry.phase = after(entry.phase, Step.RELEASE)
            entry.releases += 1
            entry.free = 0
            self._flying[seat.item.ticket] = entry
            held.append(self._schedule.go(seat, now))
        release = Release(
            tickets=tuple(seat.item.ticket for seat in seats),
            wave=self._wave,
            reasons=tuple(seat.reason for seat in seats),
            lanes=tuple(None if place is None else seat.lane.number for seat, place in zip(seats, held, strict=True)),
            held_bytes=tuple(held),
        )
        self._wave += 1
        return release

    def _trim(self) -> list[Command]:
        """What is held though others were chosen since is held no more, beyond as many as there are lanes."""
        if len(self._staged) + len(self._staging) <= 2 * self._schedule.lanes:
            return []
        return self._recall([e for e in self._staged.values() if not self._schedule.is_decided(e.work.ticket)])

    def _count_idle(self, now: float) -> None:
        """Adds up the slot time that was not used since something last happened."""
        if self._entries and now > self._counted_s > 0:
            idle = self._schedule.idle if self._is_open else {IdleReason.NOT_READY: self.capacity.limit}
            for reason, lanes in idle.items():
                self._idle[reason] += lanes * (now - self._counted_s)
        self._counted_s = now

    # -- Steps of one item -------------------------------------------------------------------------------------

    def _current(self, ticket: int, serial: int, *phases: Phase) -> _Entry | None:
        entry = self._entries.get(ticket)
        if entry is None or entry.serial != serial or entry.phase not in phases:
            return None
        return entry

    def _leave(self, entry: _Entry, now: float) -> None:
        """Takes an item out of wherever it is kept by its phase."""
        ticket = entry.work.ticket
        self._schedule.drop(ticket, now)
        for place in (self._staging, self._staged, self._flying):
            place.pop(ticket, None)

    def _requeue(self, entry: _Entry, now: float) -> list[Command]:
        self._leave(entry, now)
        entry.phase = after(entry.phase, Step.REQUEUE)
        self._schedule.come_back(entry.item)
        return []

    def _fail(self, entry: _Entry, error: UnisonoError, now: float) -> list[Command]:
        """An attempt went wrong.

        1. It cost nothing (the backend was away, or a held connection closed): back to the head of its line.
        2. It fell as if the runner had died: nothing is judged until it is known whether others fell with it.
        3. Otherwise it used up an attempt, and `retry.decide` says what follows.
        """
        was_held = entry.phase not in IN_FLIGHT and error.is_retryable and entry.free < FREE_RESTAGES
        if was_held or not error.costs_attempt:
            entry.free += 1
            self._schedule.suspects.left(entry.work.ticket)
            return self._requeue(entry, now)
        if error.lowers_load:
            self.capacity.stumbled()
        if entry.phase in IN_FLIGHT and isinstance(error, (RunnerDiedError, ConnectionLostError)):
            return self._fall(entry, error, now)
        self._schedule.suspects.left(entry.work.ticket)
        return self._charge(entry, error, now)

    def _charge(self, entry: _Entry, error: UnisonoError, now: float) -> list[Command]:
        """An attempt is used up."""
        ticket = entry.work.ticket
        entry.charged += 1
        entry.free = 0
        verdict = retry.decide(error, charged=entry.charged, max_attempts=entry.work.max_attempts, key=str(ticket))
        if isinstance(verdict, retry.GiveUp):
            return [self._end(entry, ItemState.FAILED, error, now)]
        return [self._back_off(entry, error, verdict.after_s, now)]

    def _back_off(self, entry: _Entry, error: UnisonoError, pause_s: float, now: float) -> Retry:
        ticket = entry.work.ticket
        if entry.phase is not Phase.WAITING:
            self._leave(entry, now)
            entry.phase = after(entry.phase, Step.BACK_OFF)
        heapq.heappush(self._alarms, (now + pause_s, ticket))
        entry.heard_at_s = now + pause_s
        return Retry(ticket=ticket, attempt=max(1, entry.releases), error=error, again_in_s=pause_s)

    def _fall(self, entry: _Entry, error: UnisonoError, now: float) -> list[Command]:
        """It fell as if the runner had died; it waits until that is judged."""
        ticket = entry.work.ticket
        self._schedule.suspects.fell(ticket, error, self._flying, now)
        self._leave(entry, now)
        entry.phase = after(entry.phase, Step.BACK_OFF)
        entry.has_fallen = True
        return []

    def _judge(self, now: float) -> list[Command]:
        """Who fell, and whether alone, is known: one alone is charged, several are run again in halves."""
        suspects = self._schedule.suspects
        fallen = suspects.judged(now)
        if fallen is None:
            return []
        self._deaths += any(isinstance(error, RunnerDiedError) for error in fallen.values())
        entries = [self._entries[ticket] for ticket in fallen]
        for entry in entries:
            entry.has_fallen = False
        commands: list[Command] = []
        if len(entries) == 1:
            entry, error = entries[0], fallen[entries[0].work.ticket]
            commands = self._charge(entry, error, now)
            is_culprit = isinstance(error, RunnerDiedError) or entry.work.ticket in suspects.on_trial
            if is_culprit and entry.phase is Phase.WAITING:
                suspects.isolate(entry.work.ticket)
            return commands
        for entry in entries:
            error = fallen[entry.work.ticket]
            entry.disturbed += 1
            commands.append(
                Retry(ticket=entry.work.ticket, attempt=entry.releases, error=error, again_in_s=0.0, is_free=True)
            )
            entry.phase = after(entry.phase, Step.REQUEUE)
            self._schedule.come_back(entry.item)
        suspects.halve(fallen)
        return commands

    def _recall(self, entries: Sequence[_Entry]) -> list[Command]:
        """Closes held connections and puts their items back into the queue, in the order in which they were."""
        for entry in reversed(entries):
            self._requeue(entry, self._counted_s)
        return [Abort(ticket=entry.work.ticket, serial=entry.serial) for entry in entries]

    def _end(self, entry: _Entry, state: ItemState, error: UnisonoError | None, now: float) -> End:
        self._leave(entry, now)
        self._schedule.suspects.forget(entry.work.ticket)
        entry.phase = after(entry.phase, Step.END)
        del self._entries[entry.work.ticket]
        while self._alarms and self._alarms[0][1] not in self._entries:
            heapq.heappop(self._alarms)
        return End(
            ticket=entry.work.ticket,
            state=state,
            attempts=entry.releases - entry.disturbed,
            error=error,
            disturbed=entry.disturbed,
        )

    def _stop(self, entry: _Entry, state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        has_connection = entry.phase in IN_FLIGHT or entry.phase in (Phase.STAGING, Phase.STAGED)
        abort = [Abort(ticket=entry.work.ticket, serial=entry.serial)] if has_connection else []
        return [*abort, self._end(entry, state, error, now)]

    def _look_at(self, ticket: int, now: float) -> list[Command]:
        """An item's alarm rang.

        1. It is gone: nothing.
        2. Its batch's deadline has passed, or it has not spoken in time: it expires.
        3. Its pause after a failure is over: back into the queue.
        """
        entry = self._entries.get(ticket)
        if entry is None:
            return []
        work = entry.work
        if work.end_by_s is not None and now >= work.end_by_s:
            return self._stop(entry, ItemState.EXPIRED, BatchDeadlineError("the batch's deadline has passed"), now)
        if work.speak_by_s is not None and now >= work.speak_by_s and not entry.has_spoken:
            error = QueueTimeoutError("had not been answered anything in time (queue_timeout)")
            return self._stop(entry, ItemState.EXPIRED, error, now)
        if entry.phase is Phase.WAITING and not entry.has_fallen and now >= entry.heard_at_s:
            return self._requeue(entry, now)
        return []

    def _give_up_stalled(self, now: float) -> list[Command]:
        error = BackendStalledError(
            f"the backend held {len(self._flying)} requests and answered none of them anything for "
            f"{self._settings.stall_s:g} s"
        )
        commands: list[Command] = []
        self.capacity.stumbled()
        for entry in list(self._flying.values()):
            commands.append(Abort(ticket=entry.work.ticket, serial=entry.serial))
            commands += self._fail(entry, error, now)
        return commands
