"""Slot time that was not used: slots × seconds, by reason.

Theory of operation. Idle are the slots of a runner, not the lanes that are tried: one lane more than the slots, while
their number is probed, is none. As long as the number is not known, nobody can say how many are idle. So it is kept
which lanes were: those above so many that were taken, up to so many that there were. Once the number is known, that
counts as far as it lies below it, and so does all that follows.
"""

from __future__ import annotations

from collections import defaultdict
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class IdleReason(Enum):
    """Why a slot was idle."""

    NO_ITEMS = "no_items"
    REFILL = "refill"
    PREFIX_COST = "prefix_cost"
    PREFIX_PRICE = "prefix_price"
    TOGETHER = "together"
    BATCH_LIMIT = "batch_limit"
    WINDOW = "window"
    SUSPECTS = "suspects"
    NOT_READY = "not_ready"
    MEMORY = "memory"
    YIELD = "yield"


# Lanes above the first number, up to the second, and why they were idle.
Span = tuple[IdleReason, int, int]


class IdleTime:
    """What one runner's slots were idle."""

    def __init__(self) -> None:
        self._counted: defaultdict[IdleReason, float] = defaultdict(float)
        # Seconds for which lanes were idle since the number of slots is not known.
        self._open: defaultdict[Span, float] = defaultdict(float)

    @property
    def counted(self) -> dict[IdleReason, float]:
        """Slots × seconds while their number was known, or until it became so."""
        return dict(self._counted)

    @property
    def open(self) -> dict[Span, float]:
        """Seconds that count as soon as the number is known."""
        return dict(self._open)

    def add(self, idle: Mapping[IdleReason, int], *, taken: int, slots: int, seconds: float) -> None:
        """So many lanes were idle for so long, above those that were taken. `slots`: their number; 0: not known."""
        first = taken
        for reason, lanes in idle.items():
            self._open[reason, first, first + lanes] += seconds
            first += lanes
        if slots:
            for reason, idle_s in slot_seconds(self._open, slots).items():
                self._counted[reason] += idle_s
            self._open.clear()


def slot_seconds(spans: Mapping[Span, float], slots: int) -> dict[IdleReason, float]:
    """Slots × seconds, where there are so many slots."""
    found: defaultdict[IdleReason, float] = defaultdict(float)
    for (reason, first, past), seconds in spans.items():
        idle = min(past, slots) - min(first, slots)
        if idle:
            found[reason] += idle * seconds
    return dict(found)
