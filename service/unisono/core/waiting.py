"""What waits for a slot of one runner: by batch, for the callers' shares, and by family, for the slots' caches.

Theory of operation. *Batches*: of those that may go at all, the highest priority goes first. Among these, a batch
that has nothing in a slot goes before one that has; otherwise the one that has had least for its weight, in tokens:
those of what has left, and those expected, by what is known now, of what is at the backend or about to go. One that
was idle does not save up: it begins where the others are. So a lone request beside a batch of 5,000 starts with the
next slot that falls free, or with the one after that, where somebody stood at the backend's door before it came.

*Families*: the items of a batch whose prompts begin alike stand in one line, the longest expected answer first; at
one length, in the order in which they came. Of several batches' first ones, too, the longest; at one length, that of
the batch that has had least. Items that share nothing stand in the line of family 0.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count, islice
from math import sqrt
from typing import TYPE_CHECKING

from unisono.core.commands import Terms
from unisono.core.idle import IdleReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from unisono.core.prefixes import Prefix

# Of items that share nothing.
ALONE = 0
# A batch may be ahead of another by as much as so many of its items, for the sake of what a slot holds.
_AHEAD_ITEMS = 2.0
# What one release weighs, of those by which expected lengths are put right; older ones fade.
_NEWEST = 0.1
# Families that are looked at for one decision.
MOST_COMPARED = 128


@dataclass(slots=True, eq=False)
class Waiting:
    """An item that waits."""

    ticket: int
    batch: int
    prefix: Prefix | None
    prompt_bytes: int
    # What its batch allows and asks for; None: nothing.
    terms: Terms | None
    # Expected tokens of its answer.
    length: float
    # Its place among equals, which it keeps whatever happens to it; and how often it was put into its line: an entry
    # of an older time counts no more.
    rank: int = 0
    version: int = 0
    # Of its present attempt: tokens so far, and whether it is about to reach its num_predict.
    tokens: int = 0
    is_near_end: bool = False
    # How many tokens it had when it last fell with the runner.
    fell_at: int = 0
    # It came out of the window with others, and goes with them.
    is_gathered: bool = False
    # Its num_predict, where it has one.
    bound: int | None = None
    # At the backend: the tokens that its batch was charged for it.
    charge: float = 0.0

    @property
    def family(self) -> int:
        """The key of its family."""
        return self.prefix.key if self.prefix is not None else ALONE

    @property
    def left(self) -> float:
        """Expected tokens that it has yet to be given."""
        return max(1.0, self.length - self.tokens)


# Heaps of what waits, by length and rank; whoever has left since is passed over.
_Entry = tuple[float, int, int, Waiting]
_Line = list[_Entry]


@dataclass(slots=True, eq=False)
class Family:
    """Items that begin alike, of all batches."""

    key: int
    prefix: Prefix | None
    lines: dict[int, _Line] = field(default_factory=dict)
    # Items that wait, and the tokens expected of them.
    count: int = 0
    work: float = 0.0
    # Their squares, for how much they differ.
    squares: float = 0.0

    @property
    def deviation(self) -> float:
        """How much the expected lengths differ, in tokens: their standard deviation."""
        mean = self.work / self.count
        return sqrt(max(0.0, self.squares / self.count - mean**2))


@dataclass(slots=True, eq=False)
class Batch:
    """A batch that has items on this runner."""

    number: int
    terms: Terms
    waiting: int = 0
    # In a slot, or on the way to one that is free.
    seated: int = 0
    is_parked: bool = False
    # Each ÷ weight: the tokens of what has left the backend; those expected of what is there, and of what is about to
    # sit in lanes that are free.
    served: float = 0.0
    flying: float = 0.0
    promised: float = 0.0
    # All that waits of it, for the longest; and the families in which it has a line.
    line: _Line = field(default_factory=list)
    families: set[int] = field(default_factory=set)

    @property
    def had(self) -> float:
        """What it has had for its weight, with what it is about to have."""
        return self.served + self.flying + self.promised


class WaitingRoom:
    """All that waits."""

    def __init__(self) -> None:
        self.batches: dict[int, Batch] = {}
        self.families: dict[int, Family] = {}
        self.work = 0.0
        self._items: dict[int, Waiting] = {}
        self._ranks = count(1)
        self._served = 0.0
        # Of what went lately: what it was charged with, by its expected length when it came.
        self._charged = self._expected = 1.0

    def __len__(self) -> int:
        return len(self._items)

    def get(self, ticket: int) -> Waiting | None:
        """The item, if it waits."""
        return self._items.get(ticket)

    # -- Coming and going --------------------------------------------------------------------------------------

    def batch(self, number: int, terms: Terms | None = None) -> Batch:
        """The batch; a new one begins where the others are."""
        known = self.batches.get(number)
        if known is None:
            known = self.batches[number] = Batch(number, terms or Terms(), served=self._served)
        elif terms is not None:
            known.terms = terms
        if not known.waiting and not known.seated:
            known.served = max(known.served, self._served)
        return known

    def put(self, item: Waiting) -> None:
        """It waits from now on, behind its equals; or again, in its old place."""
        item.rank = item.rank or next(self._ranks)
        batch = self.batch(item.batch, item.terms)
        family = self.families.get(item.family)
        if family is None:
            family = self.families[item.family] = Family(item.family, item.prefix)
        item.version += 1
        entry = (-item.length, item.rank, item.version, item)
        heapq.heappush(family.lines.setdefault(item.batch, []), entry)
        batch.families.add(item.family)
        heapq.heappush(batch.line, entry)
        batch.waiting += 1
        family.count += 1
        family.work += item.length
        family.squares += item.length**2
        self.work += item.length
        self._items[item.ticket] = item

    def take(self, item: Waiting) -> None:
        """It does not wait any more."""
        del self._items[item.ticket]
        item.version += 1
        batch, family = self.batches[item.batch], self.families[item.family]
        batch.waiting -= 1
        family.count -= 1
        family.work -= item.length
        family.squares -= item.length**2
        self.work -= item.length
        if not batch.waiting:
            batch.line.clear()
            for key in batch.families & self.families.keys():
                self.families[key].lines.pop(batch.number, None)
            batch.families.clear()
        if not family.count:
            del self.families[item.family]
        self.forget(batch)

    def forget(self, batch: Batch) -> None:
        """Forgets the batch if nothing is left of it."""
        if not batch.waiting and not batch.seated and not batch.is_parked:
            self.batches.pop(batch.number, None)

    def promise(self, item: Waiting, length: float) -> None:
        """An item is about to sit in a lane that is free: who is next is decided as if it had gone."""
        batch = self.batch(item.batch, item.terms)
        batch.promised += length / batch.terms.weight

    def unpromise(self, item: Waiting, length: float) -> None:
        """It has gone, or waits again."""
        batch = self.batch(item.batch, item.terms)
        batch.promised -= length / batch.terms.weight

    def charge(self, item: Waiting, length: float) -> None:
        """So many tokens more (or less) are expected of an item that has gone and has not left yet."""
        batch = self.batch(item.batch, item.terms)
        batch.flying += length / batch.terms.weight

    def served(self, item: Waiting, length: float) -> None:
        """An item has left, with so many tokens."""
        batch = self.batch(item.batch, item.terms)
        batch.served += length / batch.terms.weight
        # The clock by which newcomers begin goes on as fast as everybody is served who wants to be.
        active = (other for other in self.batches.values() if other.waiting or other.seated or other is batch)
        self._served += length / sum(other.terms.weight for other in active)

    def compare(self, length: float, expected: float) -> None:
        """An item has gone of which so many tokens are expected; and were, when it came."""
        self._charged += _NEWEST * (length - self._charged)
        self._expected += _NEWEST * (expected - self._expected)

    # -- Who may be next ---------------------------------------------------------------------------------------

    def allowed(
        self, now: float, flying: int, *, together: int | None = None, is_ahead: bool = False
    ) -> list[Batch] | IdleReason:
        """The batches of which an item may go now, or why none may.

        1. Parked ones, and ones at their own limits, may not.
        2. Only the highest priority.
        3. One that has nothing in a slot goes first; of these, the one that has had least.
        4. Else those that have had about as much as the one that has had least.
        5. A batch that runs in waves goes when nothing else is in flight: until then, nobody goes.

        `flying`: items at the backend. `together`: the batch whose wave is being made up. `is_ahead`: it is to be
        made ready for later, so that limits of the moment do not count.
        """
        waiting = [batch for batch in self.batches.values() if batch.waiting and not batch.is_parked]
        if not waiting:
            return IdleReason.NO_ITEMS
        free = waiting if is_ahead else [batch for batch in waiting if self.is_free(batch, now, together)]
        if together is not None:
            return [batch for batch in free if batch.number == together] or IdleReason.TOGETHER
        if not free:
            is_wave = all(batch.terms.is_together for batch in waiting)
            return IdleReason.TOGETHER if is_wave else IdleReason.BATCH_LIMIT
        if len(free) > 1:
            highest = max(batch.terms.priority for batch in free)
            free = [batch for batch in free if batch.terms.priority == highest]
            least = min(free, key=self.turn)
            if least.seated == 0:
                free = [least]
            else:
                mean = self._mean
                free = [each for each in free if each.had <= least.had + _AHEAD_ITEMS * mean]
            free = [each for each in free if not each.terms.is_together]
            free = [least] if least.terms.is_together else free
        if free[0].terms.is_together and flying and not is_ahead:
            return IdleReason.TOGETHER
        return free

    def is_free(self, batch: Batch, now: float, together: int | None = None, *, more: int = 0) -> bool:
        """Whether the batch's own limits let an item go now. `more`: how many are about to, and not counted yet."""
        terms = batch.terms
        if terms.max_concurrency is not None and terms.in_flight + more >= terms.max_concurrency:
            return False
        if terms.items_per_second is not None and (more or now < terms.next_release_s):
            return False
        return not terms.is_together or batch.seated == 0 or batch.number == together

    def turn(self, batch: Batch) -> tuple[float, int]:
        """Among batches of one priority, the smallest is next.

        Who has nothing in a slot is an item ahead, so that a newcomer goes to the next slot that falls free; no more
        than that, or a stream of newcomers would keep everybody else away.
        """
        mean = self._mean
        ahead = 0.0 if batch.seated else mean / batch.terms.weight
        return batch.had - ahead, batch.number

    @property
    def _mean(self) -> float:
        """Expected tokens of one that waits, by what is known now: most came when less was known."""
        mean = self.work / len(self._items) if self._items else 0.0
        return mean * self._charged / self._expected

    def next_moment(self, now: float) -> float | None:
        """When a batch's items_per_second, or another runner's items, may let one go that may not now."""
        moments = []
        for batch in self.batches.values():
            terms = batch.terms
            if not batch.waiting or batch.is_parked:
                continue
            if terms.items_per_second is not None and now < terms.next_release_s:
                moments.append(terms.next_release_s)
            elif terms.max_concurrency is not None and terms.in_flight >= terms.max_concurrency > batch.seated:
                # What it waits for ends on another backend, of which nobody tells this one.
                moments.append(now + 0.02)
        return min(moments, default=None)

    def top(self, family: Family, allowed: list[Batch]) -> Waiting | None:
        """The first of a family, of these batches."""
        found: list[tuple[Batch, _Entry]] = []
        for batch in allowed:
            line = family.lines.get(batch.number)
            if line is not None and (first := _first(line)) is not None:
                found.append((batch, first))
            elif line is not None:
                del family.lines[batch.number]
        return _foremost(found)

    def longest(self, allowed: list[Batch]) -> Waiting | None:
        """The longest of these batches."""
        return _foremost([(batch, first) for batch in allowed if (first := _first(batch.line)) is not None])

    def compared(self) -> Iterator[Family]:
        """Families with a common prefix; at most some."""
        return islice((family for key, family in self.families.items() if key != ALONE), MOST_COMPARED)


def _first(line: _Line) -> _Entry | None:
    """The first that has not left."""
    while line and line[0][3].version != line[0][2]:
        heapq.heappop(line)
    return line[0] if line else None


def _foremost(firsts: list[tuple[Batch, _Entry]]) -> Waiting | None:
    """Of several batches' first ones, the longest; at one length, that of the batch that has had least."""
    if not firsts:
        return None
    _, entry = min(firsts, key=lambda first: (first[1][0], first[0].had, first[1][1]))
    return entry[-1]
