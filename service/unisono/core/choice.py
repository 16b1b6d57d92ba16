"""Which item goes next into a free slot, and why; or why the slot is better left idle.

Theory of operation. All slots share one processor: time is about a · passes + c · tokens + p · prompt tokens computed
(`costs.py`). The tokens are what they are; the passes are as many as the fullest lane has tokens to do, and the
prompt tokens computed depend on which slot gets which prompt. So for a free lane, in this order:

1. *Held*: the longest of the family whose prefix the lane holds: its prefix costs nothing here.
2. *New*: a family of which no lane holds anything, or an item that shares nothing; whichever has most to do.
3. *Join*: a family that other lanes hold. Its prefix is computed once more, for fewer passes: where
   a · passes saved > 1.25 · p · prefix tokens (lengths are tokens, of which a pass gives each item one, or as many
   as the model drafts), and more easily for what keeps coming back. Several families that are equally far behind are
   looked at together, since helping only one of them saves nothing.
4. *Idle*: joining would cost more than it saves; or what it costs is not known yet, because the first of the family
   is still having the prefix computed. That tells the price before the others are spread.

Before all these comes the *tail*: an item as long as all the remaining work per lane, wherever its family is held.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import hypot
from typing import TYPE_CHECKING

from unisono.core.commands import ReleaseReason
from unisono.core.idle import IdleReason
from unisono.core.makespan import grain, passes
from unisono.core.prefixes import MIN_SHARED_BYTES, common_bytes
from unisono.core.returns import MOST_RETURNS, Returns
from unisono.core.waiting import ALONE

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

    from unisono.core.costs import CostMeter
    from unisono.core.lanes import Lane, Lanes
    from unisono.core.prefixes import Prefix
    from unisono.core.waiting import Batch, Family, Waiting, WaitingRoom


# A family joins another lane where that saves more than so many times what it costs. Near the best number of lanes
# the time hardly depends on it, and costs are estimates: a prefix computed for nothing is lost.
JOIN_MARGIN = 1.25
# Where a family was spread over lanes before, that has been decided: costs must have changed, not their estimate.
SETTLED_MARGIN = 2.0


@dataclass(frozen=True, slots=True)
class Choice:
    """An item, and why it is the next."""

    item: Waiting
    reason: ReleaseReason


@dataclass(frozen=True, slots=True)
class Look:
    """What is looked at for one free lane."""

    lane: Lane
    lanes: Lanes
    room: WaitingRoom
    # Batches that may go now; at least one item of theirs waits.
    allowed: list[Batch]
    meter: CostMeter
    # Tells, for each lane that is taken, by its number, the tokens that it still has to do; asked only where needed.
    tell_left: Callable[[], Mapping[int, float]]
    # Tells the families of which a prefix is being computed somewhere.
    tell_spreading: Callable[[], Container[int]] = frozenset
    returns: Returns = field(default_factory=Returns)

    def extra_bytes(self, prefix: Prefix | None) -> int:
        """Bytes that this lane would compute of a prefix, and another lane would not."""
        return self.lanes.best_held(prefix) - common_bytes(self.lane.holds, prefix)

    def expected(self, prefix: Prefix | None, lane: Lane) -> int:
        """How often it will serve that a lane computes this: once, where it would lose what others return for."""
        return 1 if self.returns.has_returned(lane.holds) else self.returns.expected(self.lanes.held_step(prefix))

    @property
    def left(self) -> dict[int, float]:
        """For each other lane that is taken, by its number, the tokens that it still has to do."""
        return {number: tokens for number, tokens in self.tell_left().items() if number != self.lane.number}


@dataclass(slots=True)
class _Family:
    """A family that lanes hold, and what they have to do for it."""

    family: Family
    # Its longest item that may go; None: none of it may.
    item: Waiting | None
    # The size of its pieces, in tokens; and for each lane that holds it the passes for which that has other work.
    grain: float
    busy: list[float]
    # How many passes these lanes need.
    passes: float = 0.0

    def count(self) -> None:
        """Counts the passes."""
        longest = self.item.length if self.item is not None else 0.0
        self.passes = passes(self.family.work, longest, self.grain, self.busy)


def choose(look: Look) -> Choice | IdleReason:
    """The next for a free lane, or why there is none."""
    choice = _held(look) or _new(look) or _join(look)
    longest = look.room.longest(look.allowed)
    if longest is None or (isinstance(choice, Choice) and choice.item is longest):
        return choice
    if isinstance(choice, IdleReason):
        # Whether it should join this lane has been asked.
        return choice
    work_left = look.room.work + sum(look.left.values())
    if longest.length * len(look.lanes.all) >= work_left and _is_worth(longest, look):
        return Choice(longest, ReleaseReason.TAIL)
    return choice


def _held(look: Look) -> Choice | None:
    """The family that the lane holds; else the one of which it holds most, if no other lane holds more."""
    lane, room = look.lane, look.room
    if lane.holds is None:
        return None
    own = room.families.get(lane.holds.key)
    if own is not None and (item := room.top(own, look.allowed)) is not None:
        return Choice(item, ReleaseReason.PREFIX_HELD)
    best: tuple[int, float] = (MIN_SHARED_BYTES - 1, 0.0)
    found: Waiting | None = None
    for family in room.compared():
        held = common_bytes(lane.holds, family.prefix)
        if (held, family.work) > best and not look.extra_bytes(family.prefix):
            item = room.top(family, look.allowed)
            if item is not None:
                best, found = (held, family.work), item
    return Choice(found, ReleaseReason.PREFIX_HELD) if found is not None else None


def _new(look: Look) -> Choice | None:
    """A family of which no lane holds anything worth it, or an item that shares nothing: the one with most to do."""
    room = look.room
    best, reason = 0.0, ReleaseReason.LONGEST
    found: Waiting | None = None
    alone = room.families.get(ALONE)
    if alone is not None and (item := room.top(alone, look.allowed)) is not None:
        best, found = item.length, item
    for family in room.compared():
        if look.extra_bytes(family.prefix) >= MIN_SHARED_BYTES or (family.work <= best and found is not None):
            continue
        item = room.top(family, look.allowed)
        if item is not None:
            best, found = family.work, item
            reason = ReleaseReason.NEW_FAMILY if family.count > 1 else ReleaseReason.LONGEST
    return Choice(found, reason) if found is not None else None


def _join(look: Look) -> Choice | IdleReason:
    """One lane more for a family that others hold, where that is worth it.

    The lanes that are free are given, one after the other, to the family that would be done last: if after some of
    them the passes that are saved are worth the prefixes that are computed, the first of them goes. What keeps coming
    back saves them each time (`returns.py`).
    """
    left, prompt_token_s = look.left, look.meter.prompt_token_s
    costs = look.meter.costs_to_join(len(left))
    if costs is None or prompt_token_s is None:
        return IdleReason.PREFIX_PRICE
    families = _families(look, left)
    still = max(left.values(), default=0.0)
    before = max(still, *(one.passes for one in families))
    spreading = look.tell_spreading()
    is_settled = any(len(one.busy) > 1 and one.family.key not in spreading for one in families)
    margin = SETTLED_MARGIN if is_settled else JOIN_MARGIN
    first: Waiting | None = None
    cost_s, times = 0.0, MOST_RETURNS
    free = sorted((one for one in look.lanes.all if one.is_open or one is look.lane), key=lambda one: one.used)
    for lane in free:
        last = max(families, key=lambda one: one.passes)
        if last.item is None:
            break
        first = first or last.item
        last.busy.append(0.0)
        last.count()
        cost_s += prompt_token_s * look.meter.tokens(look.extra_bytes(last.family.prefix))
        after = max(still, *(one.passes for one in families))
        times = min(times, look.expected(last.family.prefix, lane))
        saved_s = times * costs.pass_s * (before - after) / look.meter.tokens_a_pass
        if saved_s > (JOIN_MARGIN if times > 1 else margin) * cost_s:
            return Choice(first, ReleaseReason.JOINS_FAMILY)
    return IdleReason.PREFIX_COST


def _families(look: Look, left: Mapping[int, float]) -> list[_Family]:
    """Every family that waits, and the lanes that hold it; a lane that holds several has a part of each to do."""
    lanes = look.lanes.all
    load = {lane.number: left.get(lane.number, 0.0) for lane in lanes}
    found: list[tuple[Family, list[int]]] = []
    for family in look.room.compared():
        held = look.lanes.best_held(family.prefix)
        holders = [one.number for one in lanes if common_bytes(one.holds, family.prefix) > held - MIN_SHARED_BYTES]
        for number in holders:
            load[number] += family.work / len(holders)
        found.append((family, holders))
    families: list[_Family] = []
    for family, holders in found:
        part, mean = family.work / len(holders), family.work / family.count
        size = grain(mean, hypot(family.deviation, mean * look.meter.surprise(family.key)))
        busy = [load[number] - part for number in holders]
        families.append(_Family(family, look.room.top(family, look.allowed), size, busy))
        families[-1].count()
    return families


def _is_worth(item: Waiting, look: Look) -> bool:
    """Whether an item of the tail should go into this lane now, though others hold more of its prefix."""
    extra = look.extra_bytes(item.prefix)
    if extra < MIN_SHARED_BYTES:
        return True
    costs, prompt_token_s = look.meter.costs, look.meter.prompt_token_s
    if costs is None or prompt_token_s is None:
        return False
    held = look.lanes.best_held(item.prefix)
    holders = (lane for lane in look.lanes.all if common_bytes(lane.holds, item.prefix) == held)
    left = look.left
    until = min(left.get(lane.number, 0.0) for lane in holders)
    return costs.pass_s * until / look.meter.tokens_a_pass > JOIN_MARGIN * prompt_token_s * look.meter.tokens(extra)
