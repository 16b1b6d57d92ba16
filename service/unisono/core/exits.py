"""How an item leaves where it is: it ends, goes back into the queue, or pauses before its next attempt.

Theory of operation. Whoever leaves gives up its seat in the schedule and its place in the roster, both in `_leave`.
What becomes of an attempt that went wrong (`fail`):

0. *Part of its answer has left this house*: nothing can be tried again, and it ends with what went wrong.
1. *It cost nothing*, because the backend was away or a held connection closed: back to its old place in the queue.
2. *It fell* as if the runner had died: it waits until it is known who else fell with it (`suspects.py`), and then
   `judge` charges one that fell alone, and sends several back, free of charge.
3. *It is charged*: an attempt is used up, and `retry.py` says whether another follows, and after which pause.

What is recalled was not even sent: its connection is closed, and it takes its old place again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.core import retry
from unisono.core.commands import Abort, Command, End, Retry
from unisono.core.errors import ConnectionLostError, RunnerDiedError
from unisono.core.lifecycle import IN_FLIGHT, Phase, Step
from unisono.core.model import ItemState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.core.capacity import Capacity
    from unisono.core.errors import UnisonoError
    from unisono.core.roster import Entry, Roster
    from unisono.core.schedule import Schedule

# Stagings that may fail in a row without costing an attempt: a server that keeps closing held connections.
FREE_RESTAGES = 10


class Exits:
    """The ways out, for the items of one runner."""

    def __init__(self, roster: Roster, schedule: Schedule, capacity: Capacity) -> None:
        self._roster = roster
        self._schedule = schedule
        self._capacity = capacity
        # Times that the runner ended while it was answering.
        self.deaths = 0

    # -- For good ----------------------------------------------------------------------------------------------

    def end(self, entry: Entry, state: ItemState, error: UnisonoError | None, now: float) -> End:
        """It has its outcome."""
        self._leave(entry, Step.END, now)
        self._schedule.suspects.forget(entry.work.ticket)
        self._roster.forget(entry)
        return End(
            ticket=entry.work.ticket,
            state=state,
            attempts=entry.releases - entry.disturbed,
            error=error,
            disturbed=entry.disturbed,
        )

    def stop(self, entry: Entry, state: ItemState, error: UnisonoError, now: float) -> list[Command]:
        """It ends, wherever it is."""
        has_connection = entry.phase in IN_FLIGHT or entry.phase in (Phase.STAGING, Phase.STAGED)
        abort = [Abort(ticket=entry.work.ticket, serial=entry.serial)] if has_connection else []
        return [*abort, self.end(entry, state, error, now)]

    # -- Back into the queue -----------------------------------------------------------------------------------

    def requeue(self, entry: Entry, now: float) -> None:
        """It takes its old place in the queue; one that ended the runner runs apart."""
        self._leave(entry, Step.REQUEUE, now)
        self._schedule.come_back(entry.item)
        if entry.is_culprit:
            entry.is_culprit = False
            self._schedule.suspects.isolate(entry.work.ticket)

    def recall(self, entries: Sequence[Entry], now: float) -> list[Command]:
        """Closes held connections and puts their items back into the queue, in the order in which they were."""
        for entry in reversed(entries):
            self.requeue(entry, now)
        return [Abort(ticket=entry.work.ticket, serial=entry.serial) for entry in entries]

    # -- After an attempt that went wrong ----------------------------------------------------------------------

    def fail(self, entry: Entry, error: UnisonoError, now: float) -> list[Command]:
        """An attempt went wrong.

        0. Its caller has part of the answer: that is the end of it.
        1. It cost nothing (the backend was away, or a held connection closed): back to the head of its line.
        2. It fell as if the runner had died: nothing is judged until it is known whether others fell with it.
        3. Otherwise it used up an attempt, and `retry.decide` says what follows.
        """
        if error.is_final:
            if error.lowers_load:
                self._capacity.stumbled()
            self._schedule.suspects.left(entry.work.ticket)
            return [self.end(entry, ItemState.FAILED, error, now)]
        was_held = entry.phase not in IN_FLIGHT and error.is_retryable and entry.free < FREE_RESTAGES
        if was_held or not error.costs_attempt:
            entry.free += 1
            self._schedule.suspects.left(entry.work.ticket)
            self.requeue(entry, now)
            return []
        if error.lowers_load:
            self._capacity.stumbled()
        if entry.phase in IN_FLIGHT and isinstance(error, (RunnerDiedError, ConnectionLostError)):
            self._fall(entry, error, now)
            return []
        self._schedule.suspects.left(entry.work.ticket)
        return self._charge(entry, error, now)

    def judge(self, now: float) -> list[Command]:
        """Who fell, and whether alone, is known: one alone is charged, several are run again in halves."""
        suspects = self._schedule.suspects
        fallen = suspects.judged(now)
        if fallen is None:
            return []
        self.deaths += any(isinstance(error, RunnerDiedError) for error in fallen.values())
        entries = [self._roster.entries[ticket] for ticket in fallen]
        for entry in entries:
            entry.has_fallen = False
        commands: list[Command] = []
        if len(entries) == 1:
            entry, error = entries[0], fallen[entries[0].work.ticket]
            commands = self._charge(entry, error, now)
            is_culprit = isinstance(error, RunnerDiedError) or entry.work.ticket in suspects.on_trial
            # It runs by itself when its pause is over; until then others may go.
            suspects.left(entry.work.ticket)
            entry.is_culprit = is_culprit and entry.phase is Phase.WAITING
            return commands
        for entry in entries:
            error = fallen[entry.work.ticket]
            entry.disturbed += 1
            commands.append(
                Retry(
                    ticket=entry.work.ticket,
                    attempt=entry.releases,
                    error=error,
                    again_in_s=0.0,
                    is_free=True,
                    ago_s=now - entry.fell_at_s,
                )
            )
            # It left when it fell.
            self._roster.move(entry, Step.REQUEUE)
            self._schedule.come_back(entry.item)
        suspects.halve(fallen)
        return commands

    def _fall(self, entry: Entry, error: UnisonoError, now: float) -> None:
        """It fell as if the runner had died; it waits until that is judged."""
        self._schedule.suspects.fell(entry.work.ticket, error, self._roster.flying, now)
        entry.item.fell_at = entry.item.tokens
        self._leave(entry, Step.BACK_OFF, now)
        entry.has_fallen = True
        entry.fell_at_s = now

    def _charge(self, entry: Entry, error: UnisonoError, now: float) -> list[Command]:
        """An attempt is used up."""
        ticket = entry.work.ticket
        entry.charged += 1
        entry.free = 0
        verdict = retry.decide(error, charged=entry.charged, max_attempts=entry.work.max_attempts, key=str(ticket))
        if isinstance(verdict, retry.GiveUp):
            return [self.end(entry, ItemState.FAILED, error, now)]
        return [self._back_off(entry, error, verdict.after_s, now)]

    def _back_off(self, entry: Entry, error: UnisonoError, pause_s: float, now: float) -> Retry:
        ticket = entry.work.ticket
        ago_s = 0.0
        if entry.phase is Phase.WAITING:
            # One that fell waits already.
            ago_s = now - entry.fell_at_s
        else:
            self._leave(entry, Step.BACK_OFF, now)
        self._roster.set_alarm(now + pause_s, ticket)
        entry.heard_at_s = now + pause_s
        return Retry(ticket=ticket, attempt=max(1, entry.releases), error=error, again_in_s=pause_s, ago_s=ago_s)

    def _leave(self, entry: Entry, step: Step, now: float) -> None:
        """Takes an item out of wherever it is."""
        self._schedule.drop(entry.work.ticket, now)
        self._roster.move(entry, step)
