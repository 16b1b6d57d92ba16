"""What takes too long is given up: items past their limits, answers that fell silent, a backend that stalled.

Theory of operation. `tick` carries out all that is due, and `next_moment` says when it must be called next; each
limit is in both.

1. *Deadline and queue_timeout* are moments of an item, known from the beginning: they are alarms of the roster. So
   is the end of a pause after a failure.
2. *item_timeout* runs from an item's last token: who speaks is gone through, which is no more than there are slots.
   It lowers what is in flight where many are silent, and not where one is while others speak.
3. *A stall* concerns all: requests are in flight, and none of them was answered anything for a long time. Those of
   which nothing can be heard before they have ended, or whose callers decide for themselves, are left out.
4. *A held request* grows stale: some servers and proxies close an unfinished one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.core.commands import Abort, Command
from unisono.core.errors import BackendStalledError, BatchDeadlineError, ItemTimeoutError, QueueTimeoutError
from unisono.core.lifecycle import Phase
from unisono.core.model import ItemState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.core.capacity import Capacity
    from unisono.core.exits import Exits
    from unisono.core.roster import Entry, Roster


class Patience:
    """How long the items of one runner are waited for."""

    def __init__(
        self, roster: Roster, exits: Exits, capacity: Capacity, *, hold_limit_s: float, stall_s: float
    ) -> None:
        self._roster = roster
        self._exits = exits
        self._capacity = capacity
        self._hold_limit_s = hold_limit_s
        self._stall_s = stall_s
        self._heard_at_s = 0.0

    def heard(self, now: float) -> None:
        """The backend said something to somebody, or has only now been asked anything."""
        self._heard_at_s = now

    def tick(self, now: float) -> list[Command]:
        """Gives up what has taken too long, and takes up what has paused long enough."""
        commands: list[Command] = []
        for entry in self._roster.due(now):
            commands += self._look_at(entry, now)
        for entry in list(self._roster.speaking.values()):
            limit_s = entry.work.silence_s
            if limit_s is not None and now >= entry.heard_at_s + limit_s:
                if self._are_many_silent(now):
                    self._capacity.stumbled()
                error = ItemTimeoutError(f"said nothing for {limit_s:g} s after its first token (item_timeout)")
                commands += self._exits.stop(entry, ItemState.EXPIRED, error, now)
        if now >= self._heard_at_s + self._stall_s and (stalled := self._impatient()):
            commands += self._give_up_stalled(stalled, now)
        stale = [entry for entry in self._roster.staged.values() if now >= entry.staged_at_s + self._hold_limit_s]
        return [*commands, *self._exits.recall(stale, now)]

    def next_moment(self) -> float | None:
        """When `tick` must be called at the latest; None: nothing has a limit now."""
        alarm = self._roster.next_alarm
        moments = [alarm] if alarm is not None else []
        moments += [
            entry.heard_at_s + entry.work.silence_s
            for entry in self._roster.speaking.values()
            if entry.work.silence_s is not None
        ]
        if self._impatient():
            moments.append(self._heard_at_s + self._stall_s)
        if self._roster.staged:
            # They stand in the order in which they were staged.
            oldest = next(iter(self._roster.staged.values()))
            moments.append(oldest.staged_at_s + self._hold_limit_s)
        return min(moments, default=None)

    def _are_many_silent(self, now: float) -> bool:
        """Whether half of those that spoke say nothing, for half of their own limit: the backend has too much to do.

        One that falls silent while others speak has stalled by itself; fewer in flight would only cost the others.
        """
        speaking = self._roster.speaking.values()
        limits = [(entry.heard_at_s, entry.work.silence_s) for entry in speaking]
        silent = sum(limit_s is not None and now >= heard_s + limit_s / 2 for heard_s, limit_s in limits)
        return 2 * silent >= len(speaking)

    def _look_at(self, entry: Entry, now: float) -> list[Command]:
        """An item's alarm rang.

        1. Its batch's deadline has passed, or it has not spoken in time: it expires.
        2. Its pause after a failure is over: back into the queue.
        """
        work = entry.work
        if work.end_by_s is not None and now >= work.end_by_s:
            error = BatchDeadlineError("the batch's deadline has passed")
            return self._exits.stop(entry, ItemState.EXPIRED, error, now)
        if work.speak_by_s is not None and now >= work.speak_by_s and not entry.has_spoken:
            late = QueueTimeoutError("had not been answered anything in time (queue_timeout)")
            return self._exits.stop(entry, ItemState.EXPIRED, late, now)
        if entry.phase is Phase.WAITING and not entry.has_fallen and now >= entry.heard_at_s:
            self._exits.requeue(entry, now)
        return []

    def _impatient(self) -> list[Entry]:
        """Those in flight that are not waited for as long as it takes."""
        return [entry for entry in self._roster.flying.values() if not entry.work.is_patient]

    def _give_up_stalled(self, stalled: Sequence[Entry], now: float) -> list[Command]:
        error = BackendStalledError(
            f"the backend held {len(stalled)} requests and answered none of them anything for {self._stall_s:g} s"
        )
        commands: list[Command] = []
        self._capacity.stumbled()
        for entry in stalled:
            commands.append(Abort(ticket=entry.work.ticket, serial=entry.serial))
            commands += self._exits.fail(entry, error, now)
        return commands
