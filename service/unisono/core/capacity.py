"""What was seen of a runner → how many slots it has, and how many requests may be in flight.

Theory of operation. A backend never tells how many sequences it computes side by side (llama.cpp's server does).
But each finished item tells when it held a slot, and how long it waited for one. The largest number of items that
held a slot at one time is a lower bound; it *is* the number of slots once an item was seen waiting while so many
held one. Until then the limit starts at 8 and doubles while nobody waits. A configured number wins, and so does
one that the backend tells.

Checked against servers with 1, 4 and 8 slots: the largest overlap was 1, 4 and 8.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from unisono.core.model import Slots, SlotSource

# In flight at first, while nothing is known.
FIRST_LIMIT = 8
# A wait shorter than this is the backend's own bookkeeping, not a queue.
WAIT_S = 0.030
# The times of two items agree to this much: a slot goes from one to the next without being held by both.
SLACK_S = 0.010
# Finished items whose time in a slot is remembered.
_REMEMBERED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """When an item held a slot, by one clock, in seconds, and how long it had waited for it."""

    start_s: float
    end_s: float
    waited_s: float


class Capacity:
    """How many requests may be in flight on one runner."""

    def __init__(self, *, configured: int | None = None, ceiling: int = 64) -> None:
        self._ceiling = max(1, ceiling)
        self._slots = Slots()
        if configured is not None:
            self._slots = Slots(count=configured, source=SlotSource.CONFIGURED)
        self._limit = min(FIRST_LIMIT, self._ceiling)
        self._history: deque[Held] = deque(maxlen=_REMEMBERED)
        # The largest overlap seen.
        self._overlap = 0
        # Items in a row that ended without having waited.
        self._calm = 0

    @property
    def slots(self) -> Slots:
        """What is known of the runner's slots."""
        return self._slots

    @property
    def limit(self) -> int:
        """How many items may be in flight for the slots to be full: their number, or what is tried while unknown."""
        return self._slots.count or self._limit

    def told(self, count: int) -> None:
        """The backend itself says how many slots it has; a configured number still wins."""
        if self._slots.source is not SlotSource.CONFIGURED:
            self._slots = Slots(count=count, source=SlotSource.TOLD)

    def forget(self) -> None:
        """The server was restarted or the model changed: what was learned holds no more."""
        if self._slots.source is SlotSource.LEARNED:
            self._slots = Slots()
        self._limit = min(FIRST_LIMIT, self._ceiling)
        self._history.clear()
        self._overlap = 0
        self._calm = 0

    def observe(self, held: Held, *, speaking: int = 0) -> None:
        """An item ended, and tells when it held its slot.

        1. Known from outside: there is nothing to learn.
        2. More held one at one time than were known of: there are as many slots.
        3. It waited, or it shows what others had waited for: as many slots as held one during such a wait, if that
           was the most ever seen at one time.
        4. It did not wait: if nobody has, for as many items as the limit, the limit doubles.

        `speaking`: other items that hold a slot while this one ends. Their times are not in the history yet, so fewer
        slots than these must not be learned from it.
        """
        if self._slots.source in (SlotSource.CONFIGURED, SlotSource.TOLD):
            return
        self._history.append(held)
        known = self._overlap
        self._overlap = max(known, self._overlap_during(held.start_s, held.end_s))
        if 0 < self._slots.count < self._overlap:
            self._slots = Slots(count=self._overlap, source=SlotSource.LEARNED)
        waits = [one for one in (self._history if self._overlap > known else [held]) if one.waited_s >= WAIT_S]
        least = max(self._overlap, speaking + 1)
        if any(self._overlap_during(one.start_s - one.waited_s, one.start_s) >= least for one in waits):
            self._slots = Slots(count=self._overlap, source=SlotSource.LEARNED)
        if held.waited_s >= WAIT_S:
            self._calm = 0
            return
        self._calm += 1
        if self._slots.count == 0 and self._calm >= self._limit:
            self._limit = min(self._ceiling, self._limit * 2)
            self._calm = 0

    def _overlap_during(self, start_s: float, end_s: float) -> int:
        """The most items that held a slot at one moment between two."""
        edges: list[tuple[float, int]] = []
        for held in self._history:
            held_s = min(held.start_s + SLACK_S, (held.start_s + held.end_s) / 2)
            if held_s < end_s and held.end_s > start_s:
                edges += [(max(held_s, start_s), 1), (min(held.end_s, end_s), -1)]
        # At one moment an end comes before a start: the slot went from one to the other.
        edges.sort()
        most = now = 0
        for _, step in edges:
            now += step
            most = max(most, now)
        return most
