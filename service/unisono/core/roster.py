"""Who is where: the items of one runner, each in the place that its phase says, and when to look at whom.

Theory of operation. An item is in at most one of three places: being staged, staged, or at the backend. `move` is the
only way from one to another, and takes a step of `lifecycle.py`, so that a phase and a place cannot disagree. Each
place keeps its items in the order in which they got there.

An alarm is a moment and a ticket; one whose item has ended by then is passed over.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unisono.core.lifecycle import Phase, Step, after

if TYPE_CHECKING:
    from collections.abc import Iterator

    from unisono.core.commands import Work
    from unisono.core.waiting import Waiting


@dataclass(slots=True)
class Entry:
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
    # It fell, and it is not yet known whether alone; when that was.
    has_fallen: bool = False
    fell_at_s: float = 0.0
    # It ended the runner by itself: its next attempt runs apart.
    is_culprit: bool = False


class Roster:
    """The items of one runner that have not ended."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        # Staging, staged and in flight, in the order in which they got there.
        self.staging: dict[int, Entry] = {}
        self.staged: dict[int, Entry] = {}
        self.flying: dict[int, Entry] = {}
        # Of those in flight, who has begun to speak.
        self.speaking: dict[int, Entry] = {}
        self._place_of = {
            Phase.STAGING: self.staging,
            Phase.STAGED: self.staged,
            Phase.RELEASED: self.flying,
            Phase.SPEAKING: self.flying,
        }
        self._alarms: list[tuple[float, int]] = []
        self._serial = 0

    def add(self, entry: Entry) -> None:
        """An item is here from now on, and is looked at when one of its limits is met."""
        work = entry.work
        self.entries[work.ticket] = entry
        for moment in (work.speak_by_s, work.end_by_s):
            if moment is not None:
                self.set_alarm(moment, work.ticket)

    def current(self, ticket: int, serial: int, *phases: Phase) -> Entry | None:
        """The item, if this is its attempt and it is in one of these phases; news of any other comes too late."""
        entry = self.entries.get(ticket)
        if entry is None or entry.serial != serial or entry.phase not in phases:
            return None
        return entry

    def move(self, entry: Entry, step: Step) -> None:
        """Takes a step: the item is in its next phase, and in the place that belongs to it."""
        ticket = entry.work.ticket
        before = self._place_of.get(entry.phase)
        entry.phase = after(entry.phase, step)
        if step is Step.STAGE:
            self._serial += 1
            entry.serial = self._serial
        place = self._place_of.get(entry.phase)
        # One that begins to speak keeps its turn among those at the backend.
        if before is not None and before is not place:
            del before[ticket]
            _ = self.speaking.pop(ticket, None)
        if place is not None and place is not before:
            place[ticket] = entry
        if step is Step.SPEAK:
            self.speaking[ticket] = entry

    def forget(self, entry: Entry) -> None:
        """It has ended."""
        del self.entries[entry.work.ticket]
        while self._alarms and self._alarms[0][1] not in self.entries:
            heapq.heappop(self._alarms)

    # -- Alarms ------------------------------------------------------------------------------------------------

    def set_alarm(self, moment: float, ticket: int) -> None:
        """The item must be looked at then."""
        heapq.heappush(self._alarms, (moment, ticket))

    def due(self, now: float) -> Iterator[Entry]:
        """Who must be looked at now; an item may be named twice."""
        while self._alarms and self._alarms[0][0] <= now:
            _, ticket = heapq.heappop(self._alarms)
            entry = self.entries.get(ticket)
            if entry is not None:
                yield entry

    @property
    def next_alarm(self) -> float | None:
        """When somebody must be looked at next."""
        return self._alarms[0][0] if self._alarms else None
