"""The machine that runs one runner: which item goes when, and what becomes of it. No input or output happens here.

Theory of operation. Things happen (`add`, `staged`, `spoke`, `failed`, `tick`, …), each with the time at which it
did; the conductor changes its state and returns commands (`Stage`, `Release`, `Abort`, `Retry`, `End`), which the
application carries out. Every item that was added gets exactly one `End`.

The schedule of a runner, in the order of the decisions in `_go_on`:

1. *Stage ahead*: as many requests as may be in flight are held ready, all but their last byte sent, so that a
   release costs one byte.
2. *The wave*: while nothing is in flight, wait until all that fit are staged, then release them in one go, so that
   they share their passes from the first on. A straggler is not waited for longer than `hold_patience_s`.
3. *Refill*: while something is in flight, whatever falls free is filled at once with what is staged.

How many may be in flight: the slots (or what is tried while they are unknown, see `capacity.py`); one more where the
slots are known, and one for each item that is about to reach its `num_predict`, since a successor that waits at
the backend when a slot falls free misses no pass.

An attempt that went wrong comes in with the serial number of its staging; news of an older one is ignored, so
that an aborted request cannot speak for its successor.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.core import retry
from unisono.core.commands import Abort, Command, End, Release, Retry, Stage, Work
from unisono.core.errors import (
    BackendStalledError,
    BatchDeadlineError,
    ItemTimeoutError,
    QueueTimeoutError,
    UnisonoError,
)
from unisono.core.lifecycle import IN_FLIGHT, Phase, Step, after
from unisono.core.model import ItemState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from unisono.core.capacity import Capacity, Held

# A successor is released when so many tokens are left to an item's num_predict: the time of a release and of the
# backend's own way from the socket to the slot, which is less than two passes of the fastest models measured.
NEAR_END_TOKENS = 2
# Stagings that may fail in a row without costing an attempt: a server that keeps closing held connections.
FREE_RESTAGES = 10

# Tickets in a row: a dictionary, since any of them may be taken out, and all of 50,000 at one time.
_Line = OrderedDict[int, None]


@dataclass(slots=True)
class _Entry:
    """An item on its way."""

    work: Work
    phase: Phase = Phase.QUEUED
    serial: int = 0
    # Times released; attempts used up; free stagings in a row.
    releases: int = 0
    charged: int = 0
    free: int = 0
    tokens: int = 0
    staged_at_s: float = 0.0
    heard_at_s: float = 0.0
    # Whether it has ever spoken: then its queue_timeout is met.
    has_spoken: bool = False
    is_near_end: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConductorSettings:
    """How patient a conductor is."""

    # A wave does not wait longer than this for a straggler that is still being staged.
    hold_patience_s: float = 0.25
    # A held request is staged anew after this long: some servers and proxies close an unfinished request.
    hold_limit_s: float = 60.0
    # Requests are in flight, and none of them has been answered anything for so long: they are given up.
    stall_s: float = 600.0


@dataclass(slots=True)
class _Queue:
    """What is ready to be staged: batches in turn, each batch's items in the order in which they came."""

    lines: OrderedDict[int, _Line] = field(default_factory=OrderedDict)
    # Batches that must not go on for now; their lines stand aside.
    parked: dict[int, _Line] = field(default_factory=dict)

    def put(self, entry: _Entry, *, first: bool = False) -> None:
        batch = entry.work.batch
        line = self.parked[batch] if batch in self.parked else self.lines.setdefault(batch, _Line())
        line[entry.work.ticket] = None
        line.move_to_end(entry.work.ticket, last=not first)

    def take(self) -> int:
        batch, line = next(iter(self.lines.items()))
        ticket, _ = line.popitem(last=False)
        if line:
            self.lines.move_to_end(batch)
        else:
            del self.lines[batch]
        return ticket

    def drop(self, entry: _Entry) -> None:
        batch = entry.work.batch
        line = self.parked[batch] if batch in self.parked else self.lines[batch]
        del line[entry.work.ticket]
        if not line:
            self.lines.pop(batch, None)


class Conductor:
    """Runs the items of one runner."""

    def __init__(self, capacity: Capacity, settings: ConductorSettings | None = None) -> None:
        self.capacity = capacity
        self._settings = settings or ConductorSettings()
        self._entries: dict[int, _Entry] = {}
        self._queue = _Queue()
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

    # -- What it is like ---------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether it has no item at all."""
        return not self._entries

    @property
    def has_work(self) -> bool:
        """Whether it has an item that wants the backend now: not only ones that wait for their next attempt."""
        return bool(self._queue.lines or self._staging or self._staged or self._flying)

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
        """How many may be in flight at this moment."""
        slots = self.capacity.slots.count
        if slots == 0:
            return self.capacity.limit
        ending = sum(1 for entry in self._flying.values() if entry.is_near_end)
        return slots + max(1, min(ending, slots))

    def phase(self, ticket: int) -> Phase:
        """Where an item is; ENDED for one that it does not have (any more)."""
        entry = self._entries.get(ticket)
        return entry.phase if entry else Phase.ENDED

    # -- What happens ------------------------------------------------------------------------------------------

    def add(self, works: Iterable[Work], now: float) -> list[Command]:
        """Items want to be run."""
        for work in works:
            entry = self._entries[work.ticket] = _Entry(work)
            self._queue.put(entry)
            for moment in (work.speak_by_s, work.end_by_s):
                if moment is not None:
                    heapq.heappush(self._alarms, (moment, work.ticket))
        return self._go_on(now)

    def open(self, now: float) -> list[Command]:
        """The runner is ready: items may go."""
        self._is_open = True
        self._heard_at_s = now
        return self._go_on(now)

    def shut(self) -> list[Command]:
        """The runner is not ready any more, or another's turn has come: nothing more goes; what is held goes back.

        What is in flight stays there, and ends or fails by itself.
        """
        self._is_open = False
        return self._recall([*self._staged.values(), *self._staging.values()])

    def staged(self, ticket: int, serial: int, now: float) -> list[Command]:
        """All but its last byte is sent."""
        entry = self._current(ticket, serial, Phase.STAGING)
        if entry is None:
            return []
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
        if entry.phase is Phase.RELEASED:
            entry.phase = after(entry.phase, Step.SPEAK)
            entry.has_spoken = True
        entry.tokens += 1
        entry.heard_at_s = self._heard_at_s = now
        bound = entry.work.num_predict
        if entry.is_near_end or bound is None or not 0 < bound <= entry.tokens + NEAR_END_TOKENS:
            return []
        entry.is_near_end = True
        return self._go_on(now)

    def finished(self, ticket: int, serial: int, now: float, held: Held | None) -> list[Command]:
        """Its answer is whole. `held`: when it had a slot, where the backend said it."""
        entry = self._current(ticket, serial, Phase.RELEASED, Phase.SPEAKING)
        if entry is None:
            return []
        self._heard_at_s = now
        if held is not None:
            others = (other for other in self._flying.values() if other is not entry)
            self.capacity.observe(held, speaking=sum(1 for other in others if other.phase is Phase.SPEAKING))
        return [self._end(entry, ItemState.COMPLETED, None), *self._go_on(now)]

    def failed(self, ticket: int, serial: int, error: UnisonoError, now: float) -> list[Command]:
        """The attempt went wrong: while staging, while held, or at the backend."""
        entry = self._current(ticket, serial, Phase.STAGING, Phase.STAGED, Phase.RELEASED, Phase.SPEAKING)
        return [*self._fail(entry, error, now), *self._go_on(now)] if entry else []

    def stop(self, tickets: Iterable[int], state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        """These items end now, wherever they are. Those that ended before are passed over."""
        commands: list[Command] = []
        for ticket in tickets:
            entry = self._entries.get(ticket)
            if entry is not None:
                commands += self._stop(entry, state, error)
        return [*commands, *self._go_on(now)]

    def park(self, batch: int) -> None:
        """Nothing more of this batch goes; what is staged or in flight does."""
        if batch not in self._queue.parked:
            self._queue.parked[batch] = self._queue.lines.pop(batch, _Line())

    def unpark(self, batch: int, now: float) -> list[Command]:
        """The batch goes on."""
        line = self._queue.parked.pop(batch, None)
        if line:
            self._queue.lines[batch] = line
        return self._go_on(now)

    def stop_all(self, state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        """All items end now."""
        return self.stop(list(self._entries), state, error, now)

    def stop_waiting(self, state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        """All items end now but those at the backend, which may still be answered."""
        return self.stop([ticket for ticket in self._entries if ticket not in self._flying], state, error, now)

    def tick(self, now: float) -> list[Command]:
        """Time has passed: limits are met, retries fall due, a wave has waited long enough."""
        commands: list[Command] = []
        while self._alarms and self._alarms[0][0] <= now:
            _, ticket = heapq.heappop(self._alarms)
            commands += self._look_at(ticket, now)
        for entry in list(self._flying.values()):
            limit_s = entry.work.silence_s
            if limit_s is not None and entry.phase is Phase.SPEAKING and now >= entry.heard_at_s + limit_s:
                error = ItemTimeoutError(f"said nothing for {limit_s:g} s after its first token (item_timeout)")
                commands += self._stop(entry, ItemState.EXPIRED, error)
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
        if self._flying:
            moments.append(self._heard_at_s + self._settings.stall_s)
        if self._staged:
            oldest = min(entry.staged_at_s for entry in self._staged.values())
            moments.append(oldest + self._settings.hold_limit_s)
            if not self._flying and self._staging:
                moments.append(oldest + self._settings.hold_patience_s)
        return min(moments, default=None)

    # -- The schedule ------------------------------------------------------------------------------------------

    def _go_on(self, now: float) -> list[Command]:
        """Stages and releases all that may go at this moment."""
        if not self._is_open:
            return []
        return [*self._stage_ahead(), *self._release(now)]

    def _stage_ahead(self) -> Iterator[Command]:
        while self._queue.lines and len(self._staging) + len(self._staged) < self.limit:
            ticket = self._queue.take()
            entry = self._entries[ticket]
            entry.phase = after(entry.phase, Step.STAGE)
            self._serial += 1
            entry.serial = self._serial
            self._staging[ticket] = entry
            yield Stage(ticket=ticket, serial=entry.serial, attempt=entry.releases + 1)

    def _release(self, now: float) -> Iterator[Command]:
        room = self.limit - len(self._flying)
        if room <= 0 or not self._staged:
            return
        is_first_of_wave = not self._flying
        if is_first_of_wave:
            # As many as have a slot; what is to wait at the backend follows them.
            room = min(room, self.capacity.limit)
        if is_first_of_wave and self._staging and len(self._staged) < room:
            oldest = min(entry.staged_at_s for entry in self._staged.values())
            if now < oldest + self._settings.hold_patience_s:
                return
        if is_first_of_wave:
            self._heard_at_s = now
        chosen = list(self._staged.values())[:room]
        for entry in chosen:
            del self._staged[entry.work.ticket]
            entry.phase = after(entry.phase, Step.RELEASE)
            entry.releases += 1
            entry.free = 0
            entry.tokens = 0
            entry.is_near_end = False
            self._flying[entry.work.ticket] = entry
        yield Release(tickets=tuple(entry.work.ticket for entry in chosen), wave=self._wave)
        self._wave += 1
        # What was released made room for the next to be held ready.
        yield from self._stage_ahead()
        if is_first_of_wave:
            yield from self._release(now)

    # -- Steps of one item -------------------------------------------------------------------------------------

    def _current(self, ticket: int, serial: int, *phases: Phase) -> _Entry | None:
        entry = self._entries.get(ticket)
        if entry is None or entry.serial != serial or entry.phase not in phases:
            return None
        return entry

    def _leave(self, entry: _Entry) -> None:
        """Takes an item out of wherever it is kept by its phase."""
        ticket = entry.work.ticket
        if entry.phase is Phase.QUEUED:
            self._queue.drop(entry)
        for place in (self._staging, self._staged, self._flying):
            place.pop(ticket, None)

    def _requeue(self, entry: _Entry) -> list[Command]:
        self._leave(entry)
        entry.phase = after(entry.phase, Step.REQUEUE)
        self._queue.put(entry, first=True)
        return []

    def _fail(self, entry: _Entry, error: UnisonoError, now: float) -> list[Command]:
        """An attempt went wrong.

        1. It cost nothing (the backend was away, or a held connection closed): back to the head of its line.
        2. Otherwise it used up an attempt, and `retry.decide` says what follows.
        """
        ticket = entry.work.ticket
        was_held = entry.phase not in IN_FLIGHT and error.is_retryable and entry.free < FREE_RESTAGES
        if was_held or not error.costs_attempt:
            entry.free += 1
            return self._requeue(entry)
        entry.charged += 1
        entry.free = 0
        verdict = retry.decide(error, charged=entry.charged, max_attempts=entry.work.max_attempts, key=str(ticket))
        if isinstance(verdict, retry.GiveUp):
            return [self._end(entry, ItemState.FAILED, error)]
        self._leave(entry)
        entry.phase = after(entry.phase, Step.BACK_OFF)
        heapq.heappush(self._alarms, (now + verdict.after_s, ticket))
        entry.heard_at_s = now + verdict.after_s
        return [Retry(ticket=ticket, attempt=max(1, entry.releases), error=error, again_in_s=verdict.after_s)]

    def _recall(self, entries: Sequence[_Entry]) -> list[Command]:
        """Closes held connections and puts their items back into the queue, in the order in which they were."""
        for entry in reversed(entries):
            self._requeue(entry)
        return [Abort(ticket=entry.work.ticket, serial=entry.serial) for entry in entries]

    def _end(self, entry: _Entry, state: ItemState, error: UnisonoError | None) -> End:
        self._leave(entry)
        entry.phase = after(entry.phase, Step.END)
        del self._entries[entry.work.ticket]
        while self._alarms and self._alarms[0][1] not in self._entries:
            heapq.heappop(self._alarms)
        return End(ticket=entry.work.ticket, state=state, attempts=entry.releases, error=error)

    def _stop(self, entry: _Entry, state: ItemState, error: UnisonoError) -> list[Command]:
        has_connection = entry.phase in IN_FLIGHT or entry.phase in (Phase.STAGING, Phase.STAGED)
        abort = [Abort(ticket=entry.work.ticket, serial=entry.serial)] if has_connection else []
        return [*abort, self._end(entry, state, error)]

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
            return self._stop(entry, ItemState.EXPIRED, BatchDeadlineError("the batch's deadline has passed"))
        if work.speak_by_s is not None and now >= work.speak_by_s and not entry.has_spoken:
            error = QueueTimeoutError("had not been answered anything in time (queue_timeout)")
            return self._stop(entry, ItemState.EXPIRED, error)
        if entry.phase is Phase.WAITING and now >= entry.heard_at_s:
            return self._requeue(entry)
        return []

    def _give_up_stalled(self, now: float) -> list[Command]:
        error = BackendStalledError(
            f"the backend held {len(self._flying)} requests and answered none of them anything for "
            f"{self._settings.stall_s:g} s"
        )
        commands: list[Command] = []
        for entry in list(self._flying.values()):
            commands.append(Abort(ticket=entry.work.ticket, serial=entry.serial))
            commands += self._fail(entry, error, now)
        return commands
