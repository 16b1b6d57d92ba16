"""The machine that runs one runner: what happens to its items, and what is to be done. It does no input or output.

Theory of operation. Things happen (`add`, `staged`, `spoke`, `failed`, `tick`, …), each with the time at which it
did; the conductor changes its state and returns commands (`Stage`, `Release`, `Abort`, `Retry`, `End`), which the
application carries out. Every item that was added gets exactly one `End`.

Which item goes into which slot is decided by `schedule.py`. The conductor carries it out, in `_go_on`:

1. *Stage ahead*: for every slot the next request is held ready, all but its last byte sent, so that a release costs
   one byte.
2. *The wave*: while nothing is in flight, wait until all that fit are staged, then release them in one go, so that
   they share their passes from the first on. A straggler is not waited for longer than `hold_patience_s`.
3. *Refill*: while something is in flight, a slot that falls free is filled at once.

Where an item is stands in `roster.py`; how it leaves again, with its outcome or for another attempt, in `exits.py`;
what is given up because it takes too long, in `patience.py`.

News of an attempt comes in with the serial number of its staging; that of an older one is ignored, so that an
aborted request cannot speak for its successor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.core.commands import Command, Release, Stage, Work
from unisono.core.exits import Exits
from unisono.core.idle import IdleReason, IdleTime
from unisono.core.lifecycle import IN_FLIGHT, Phase, Step
from unisono.core.model import ItemState
from unisono.core.patience import Patience
from unisono.core.report import RunnerFigures
from unisono.core.roster import Entry, Roster
from unisono.core.schedule import Schedule
from unisono.core.waiting import Waiting
from unisono.core.window import WindowSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from unisono.core.capacity import Capacity, Held
    from unisono.core.errors import UnisonoError
    from unisono.core.model import Usage
    from unisono.core.seats import Seat

# A successor is released when so many tokens are left to an item's num_predict: the time of a release and of the
# backend's own way from the socket to the slot, which is less than two passes of the fastest models measured.
NEAR_END_TOKENS = 2
# Requests for slots that hold their prefixes have about a pass to get there, before others come that any free slot
# would take; at least and at most so long, in seconds.
APART_S = (0.005, 0.025)


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
        self._roster = Roster()
        self._exits = Exits(self._roster, self._schedule, capacity)
        self._patience = Patience(
            self._roster,
            self._exits,
            capacity,
            hold_limit_s=self._settings.hold_limit_s,
            stall_s=self._settings.stall_s,
        )
        self._is_open = False
        # Why nothing goes, while it is not open.
        self._why_shut = IdleReason.NOT_READY
        self._wave = 0
        # When a wave goes without its stragglers, or behind another; None: no wave waits.
        self._wave_due_s: float | None = None
        # Until then, only who goes to a slot that holds its prefix.
        self._apart_until_s = 0.0
        # What slots were idle, up to `_counted_s`.
        self._idle = IdleTime()
        self._counted_s = 0.0

    # -- What it is like ---------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether it has no item at all."""
        return not self._roster.entries

    @property
    def has_work(self) -> bool:
        """Whether it has an item that wants the backend now: not only ones that wait for their next attempt."""
        roster = self._roster
        return bool(roster.flying or roster.staging or roster.staged or self._schedule.has_waiting)

    @property
    def queued(self) -> int:
        """Items that are not at the backend."""
        return len(self._roster.entries) - len(self._roster.flying)

    @property
    def in_flight(self) -> int:
        """Items at the backend."""
        return len(self._roster.flying)

    @property
    def limit(self) -> int:
        """The most that may be in flight at this moment."""
        return self._schedule.most

    @property
    def figures(self) -> RunnerFigures:
        """What was seen of the runner, up to the last thing that happened."""
        meter = self._schedule.meter
        return RunnerFigures(
            idle_s=self._idle.counted,
            idle_open=self._idle.open,
            deaths=self._exits.deaths,
            costs=meter.measured,
            timed=meter.timed,
            bytes_per_token=meter.bytes_per_token,
        )

    def phase(self, ticket: int) -> Phase:
        """Where an item is; ENDED for one that it does not have (any more)."""
        entry = self._roster.entries.get(ticket)
        return entry.phase if entry else Phase.ENDED

    def is_flying(self, ticket: int, serial: int) -> bool:
        """Whether this attempt of an item is at the backend."""
        return self._roster.current(ticket, serial, *IN_FLIGHT) is not None

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
                bound=work.num_predict,
            )
            self._roster.add(Entry(work, item))
            self._schedule.add(item, is_single=work.is_single and self._is_open, now=now)
        return self._go_on(now)

    def open(self, now: float, *, is_fresh: bool = False) -> list[Command]:
        """The runner is ready: items may go. `is_fresh`: it was loaded anew, and its slots hold nothing."""
        self._count_idle(now)
        self._is_open = True
        self._patience.heard(now)
        if is_fresh:
            self._schedule.forget_caches()
        return self._go_on(now)

    def shut(self, now: float, why: IdleReason = IdleReason.NOT_READY) -> list[Command]:
        """The runner is not ready any more, or others' turn has come: nothing more goes; what is held goes back.

        What is in flight stays there, and ends or fails by itself.
        """
        self._count_idle(now)
        self._is_open, self._why_shut = False, why
        self._wave_due_s = None
        self._schedule.reconsider()
        return self._exits.recall([*self._roster.staged.values(), *self._roster.staging.values()], now)

    def staged(self, ticket: int, serial: int, now: float) -> list[Command]:
        """All but its last byte is sent."""
        entry = self._roster.current(ticket, serial, Phase.STAGING)
        if entry is None:
            return []
        self._count_idle(now)
        self._roster.move(entry, Step.STAGED)
        entry.staged_at_s = now
        return self._go_on(now)

    def spoke(self, ticket: int, serial: int, now: float, *, is_drafted: bool = False) -> list[Command]:
        """It got a token. `is_drafted`: from the pass that gave its last one."""
        entry = self._roster.current(ticket, serial, Phase.RELEASED, Phase.SPEAKING)
        if entry is None:
            return []
        item = entry.item
        is_first = entry.phase is Phase.RELEASED
        if is_first:
            self._roster.move(entry, Step.SPEAK)
            entry.has_spoken = True
        item.tokens += 1
        entry.heard_at_s = now
        self._patience.heard(now)
        is_told = self._schedule.spoke(item, now, is_drafted=is_drafted)
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
        entry = self._roster.current(ticket, serial, Phase.RELEASED, Phase.SPEAKING)
        if entry is None:
            return []
        self._count_idle(now)
        self._patience.heard(now)
        if held is not None:
            others = len(self._roster.speaking) - (entry.phase is Phase.SPEAKING)
            self.capacity.observe(held, speaking=others)
        if usage is not None:
            meter, work = self._schedule.meter, entry.work
            meter.counted(prompt_tokens=usage.prompt_tokens, prompt_bytes=work.prompt_bytes)
            meter.answered(usage.completion_tokens, work.num_predict, entry.item.family)
        return [self._exits.end(entry, ItemState.COMPLETED, None, now), *self._go_on(now)]

    def failed(self, ticket: int, serial: int, error: UnisonoError, now: float) -> list[Command]:
        """The attempt went wrong: while staging, while held, or at the backend."""
        entry = self._roster.current(ticket, serial, Phase.STAGING, Phase.STAGED, Phase.RELEASED, Phase.SPEAKING)
        if entry is None:
            return []
        self._count_idle(now)
        return [*self._exits.fail(entry, error, now), *self._go_on(now)]

    def stop(self, tickets: Iterable[int], state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        """These items end now, wherever they are. Those that ended before are passed over."""
        self._count_idle(now)
        commands: list[Command] = []
        for ticket in tickets:
            entry = self._roster.entries.get(ticket)
            if entry is not None:
                commands += self._exits.stop(entry, state, error, now)
        return [*commands, *self._go_on(now)]

    def park(self, batch: int) -> None:
        """Nothing more of this batch goes; what is in flight does."""
        self._schedule.park(batch, is_parked=True)

    def unpark(self, batch: int, now: float) -> list[Command]:
        """The batch goes on."""
        self._count_idle(now)
        self._schedule.park(batch, is_parked=False)
        return self._go_on(now)

    def limit_tokens(self, tokens: float | None) -> None:
        """Items at the backend may reserve so many tokens together, from the next decision on; None: any number."""
        self._schedule.token_limit = tokens

    def stop_all(self, state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        """All items end now."""
        return self.stop(list(self._roster.entries), state, error, now)

    def stop_waiting(self, state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        """All items end now but those at the backend, which may still be answered."""
        roster = self._roster
        return self.stop([one for one in roster.entries if one not in roster.flying], state, error, now)

    def tick(self, now: float) -> list[Command]:
        """Time has passed: limits are met, retries fall due, a wave has waited long enough."""
        self._count_idle(now)
        return [*self._patience.tick(now), *self._go_on(now)]

    def next_alarm(self) -> float | None:
        """When `tick` must be called at the latest; None: not before something happens."""
        moments = (self._patience.next_moment(), self._schedule.next_moment(), self._wave_due_s)
        return min((moment for moment in moments if moment is not None), default=None)

    # -- The schedule ------------------------------------------------------------------------------------------

    def _go_on(self, now: float) -> list[Command]:
        """Stages and releases all that may go at this moment."""
        commands = self._exits.judge(now)
        self._schedule.gather(now)
        if not self._is_open:
            return commands
        return [*commands, *self._fill(now), *self._stage_ahead(now), *self._send_to_door(now), *self._trim(now)]

    def _fill(self, now: float) -> Iterator[Command]:
        """Fills the lanes that are free: with what is staged, and stages the rest.

        While nothing is in flight, all that are decided go together, or when the first has been held long enough.
        """
        seats = self._schedule.plan(now)
        self._wave_due_s = None
        yield from self._stage(seats)
        ready = [seat for seat in seats if seat.item.ticket in self._roster.staged]
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
        staged = self._roster.staged
        waves = [seat for seat in seats if not self._roster.flying or seat.item.is_gathered]
        held = [seat for seat in waves if seat.item.ticket in staged]
        if held and len(held) < len(waves):
            due_s = min(staged[seat.item.ticket].staged_at_s for seat in held) + self._settings.hold_patience_s
            if now < due_s:
                self._wave_due_s = due_s
                return [seat for seat in ready if seat not in held]
        return ready

    def _stage_ahead(self, now: float) -> Iterator[Command]:
        yield from self._stage(self._schedule.ahead(now))

    def _send_to_door(self, now: float) -> Iterator[Command]:
        seats = self._schedule.door(now, self._roster.staged)
        if seats:
            yield self._release(seats, now)
            # What was released made room for the next to be held ready.
            yield from self._stage_ahead(now)

    def _stage(self, seats: Iterable[Seat]) -> Iterator[Command]:
        for seat in seats:
            entry = self._roster.entries[seat.item.ticket]
            if entry.phase is Phase.QUEUED:
                self._roster.move(entry, Step.STAGE)
                yield Stage(ticket=seat.item.ticket, serial=entry.serial, attempt=entry.releases + 1)

    def _release(self, seats: Sequence[Seat], now: float) -> Release:
        if not self._roster.flying:
            self._patience.heard(now)
        held: list[int | None] = []
        for seat in seats:
            entry = self._roster.staged[seat.item.ticket]
            self._roster.move(entry, Step.RELEASE)
            entry.releases += 1
            entry.free = 0
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

    def _trim(self, now: float) -> list[Command]:
        """What is held though others were chosen since is held no more, beyond as many as there are lanes."""
        staged = self._roster.staged
        if len(staged) + len(self._roster.staging) <= 2 * self._schedule.lanes:
            return []
        return self._exits.recall([e for e in staged.values() if not self._schedule.is_decided(e.work.ticket)], now)

    def _count_idle(self, now: float) -> None:
        """Adds up the slot time that was not used since something last happened."""
        if self._roster.entries and now > self._counted_s > 0:
            if self._is_open:
                idle = self._schedule.idle
                taken = self._schedule.lanes - sum(idle.values())
            else:
                taken = len(self._roster.flying)
                idle = {self._why_shut: max(0, self.capacity.limit - taken)}
            slots = self.capacity.slots.count
            self._idle.add(idle, taken=taken, slots=slots, seconds=now - self._counted_s)
        self._counted_s = now
