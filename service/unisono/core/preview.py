"""In which order the items of a group would go, and why each of them: the schedule itself, played through.

Theory of operation. The same `Schedule` that will run the items decides for lanes in which time is counted in tokens:
whoever has the least left to do is the next to end. Lengths are those that `num_predict` allows, and nothing is
known yet of what passes and prompts cost, so a family stays on the slot on which it begins. The real order differs
as soon as answers end early and costs are measured; the beginning does not.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from unisono.core.capacity import Capacity
from unisono.core.commands import ReleaseReason, Terms
from unisono.core.limits import text_bytes
from unisono.core.schedule import Schedule
from unisono.core.waiting import Waiting
from unisono.core.window import WindowSettings

if TYPE_CHECKING:
    from unisono.core.plan import Group

# Items that are played through; those behind them follow in the order in which they were given.
MOST_PLAYED = 2_000


def order_of(group: Group, *, lanes: int, is_together: bool = False) -> list[tuple[int, ReleaseReason]]:
    """The places of a group's items, in the order in which they would go into so many slots, each with the reason."""
    schedule = Schedule(Capacity(configured=max(1, lanes)), WindowSettings(window_s=0.0))
    terms = Terms(is_together=is_together)
    places = range(min(len(group.items), MOST_PLAYED))
    for place in places:
        item, prefix = group.items[place], group.prefixes[place] if group.prefixes else None
        length = schedule.meter.expected_length(item.options.num_predict, 0)
        waiting = Waiting(place, 0, prefix, text_bytes(item), terms, length)
        schedule.add(waiting, is_single=False, now=0.0)
    order: list[tuple[int, ReleaseReason]] = []
    # Who sits: when they will have ended, in tokens since the beginning.
    seated: list[tuple[float, int]] = []
    now = 0.0
    while True:
        for seat in schedule.plan(now):
            _ = schedule.go(seat, now)
            order.append((seat.item.ticket, seat.reason))
            heapq.heappush(seated, (now + seat.item.length, seat.item.ticket))
        if not seated:
            break
        now, ended = heapq.heappop(seated)
        schedule.drop(ended, now)
    order += [(place, ReleaseReason.LONGEST) for place in range(len(places), len(group.items))]
    return order
