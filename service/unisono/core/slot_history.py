"""When items held a slot → how many held one at a time, and what those that waited show.

Theory of operation. A request at the backend waits for one of three reasons, and only one tells of slots:

1. There is no slot for it. It begins when somebody gives one up.
2. It has a slot, but the prompts of others fill the passes: the runner takes up its prompt when theirs are computed.
   Then it begins when a prompt ends, and meanwhile somebody was in a prompt all the time. So of a wait only those
   stretches count in which none of ours was in its prompt: in such a stretch, an item with a slot would have begun.
3. It has a slot, and the pass under way must end first. So a stretch shorter than two passes does not count.

Of a wait that counts, the largest overlap in these stretches is kept, and whether the slot came from one of ours: one
of ours ended just before the item began. If not, somebody else held a slot, and the wait tells of foreign load.

Nothing is judged before it is settled: an item that is still being answered may have held a slot meanwhile. Each item
comes with a moment before which nothing of ours was sent that is unanswered yet; waits that ended before that moment
are settled. An item that ends without telling its times (`missed`) leaves a stretch in which nothing can be judged.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# A wait shorter than this is the backend's own bookkeeping, not a queue.
WAIT_S = 0.030
# The times of two items agree to this much: a slot goes from one to the next without being held by both.
SLACK_S = 0.010
# A stretch of so many passes in which an item does not begin: it has no slot.
_PASSES = 2.0
# Finished items whose time in a slot is remembered, and waits that are kept until they are settled. More come and are
# passed over: the first ones are settled first, and a few are enough.
_MOST_HELD = 512
_MOST_WAITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """When an item held a slot, by one clock, in seconds, and how long it had waited for it."""

    start_s: float
    end_s: float
    waited_s: float
    # When its prompt was computed; None: at once.
    spoke_s: float | None = None
    # How long one pass took, as far as it can tell; 0: no time that matters.
    pass_s: float = 0.0
    # Nothing of ours that was sent before this moment is unanswered (infinite: nothing at all is).
    settled_s: float = math.inf

    @property
    def has_waited(self) -> bool:
        """Whether it waited longer than the backend's bookkeeping and the pass under way explain."""
        return self.waited_s >= max(WAIT_S, _PASSES * self.pass_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """What an item that waited for a slot shows."""

    # When it began at last.
    start_s: float
    # The most that held a slot at one time while it had none.
    beside: int
    # Whether it got its slot from one of ours.
    is_handed_over: bool


class SlotHistory:
    """The finished items of one runner."""

    def __init__(self) -> None:
        self._held: deque[Held] = deque(maxlen=_MOST_HELD)
        # For each of these, when the last of it and those before it ended: items end about in the order in which they
        # are told of, so that whoever asks for a moment need look at the newest only.
        self._over_s: deque[float] = deque(maxlen=_MOST_HELD)
        self._waits: list[Held] = []
        # Before this moment, something that held a slot is not in the history.
        self._blind_until_s = -math.inf
        self._has_missed = False

    def add(self, held: Held) -> None:
        """An item ended."""
        if self._has_missed:
            # What was missed had ended before this one did.
            self._has_missed = False
            self._blind_until_s = max(self._blind_until_s, held.end_s)
        if len(self._held) == _MOST_HELD:
            self._blind_until_s = max(self._blind_until_s, self._held[0].end_s)
        self._over_s.append(max(held.end_s, self._over_s[-1]) if self._over_s else held.end_s)
        self._held.append(held)
        if held.has_waited and len(self._waits) < _MOST_WAITS:
            self._waits.append(held)

    def missed(self) -> None:
        """Something of ours left the backend, and nobody knows when it held a slot."""
        self._waits.clear()
        self._has_missed = True

    def clear(self) -> None:
        """Forgets all."""
        self._held.clear()
        self._over_s.clear()
        self._waits.clear()
        self._blind_until_s = -math.inf
        self._has_missed = False

    def settle(self, settled_s: float) -> list[Wait]:
        """The waits that can be judged now, each once; those that show nothing are left out."""
        settled = [held for held in self._waits if held.start_s <= settled_s]
        if not settled:
            return []
        self._waits = [held for held in self._waits if held.start_s > settled_s]
        return [wait for held in settled if (wait := self._judge(held)) is not None]

    def overlap(self, start_s: float, end_s: float) -> int:
        """The most items that held a slot at one moment between two."""
        return _most_at_once(map(_in_slot, self._since(start_s)), start_s, end_s)

    def under_way(self, last: int) -> int:
        """The most of so many, the last to end, that were at the backend at one moment, with a slot or without."""
        there = ((held.start_s - held.waited_s, held.end_s) for held in islice(reversed(self._held), last))
        return _most_at_once(there, -math.inf, math.inf)

    def _since(self, start_s: float) -> Iterator[Held]:
        """Those that ended after a moment, the newest first."""
        for held, over_s in zip(reversed(self._held), reversed(self._over_s), strict=True):
            if over_s <= start_s:
                return
            if held.end_s > start_s:
                yield held

    def _judge(self, waited: Held) -> Wait | None:
        """What a settled wait shows; None: nothing."""
        began_s, start_s = waited.start_s - waited.waited_s, waited.start_s
        if began_s < self._blind_until_s:
            return None
        beside = [held for held in self._since(began_s) if held.start_s < start_s]
        # Passes that others' prompts made longer say nothing of those in between: the quickest counts.
        pass_s = min((held.pass_s for held in beside if held.pass_s > 0), default=0.0)
        least_s = max(WAIT_S, _PASSES * pass_s)
        free = [(a_s, z_s) for a_s, z_s in _without_prompts(beside, began_s, start_s) if z_s - a_s >= least_s]
        if not free:
            return None
        earliest_s = start_s - WAIT_S - _PASSES * pass_s
        spans = [_in_slot(held) for held in beside]
        return Wait(
            start_s=start_s,
            beside=max(_most_at_once(spans, a_s, z_s) for a_s, z_s in free),
            is_handed_over=any(earliest_s <= held.end_s <= start_s + SLACK_S for held in beside),
        )


def _in_slot(held: Held) -> tuple[float, float]:
    """From when to when it certainly held its slot."""
    return min(held.start_s + SLACK_S, (held.start_s + held.end_s) / 2), held.end_s


def _most_at_once(spans: Iterable[tuple[float, float]], start_s: float, end_s: float) -> int:
    """The most of these spans that lie upon each other at one moment between two."""
    starts: list[float] = []
    ends: list[float] = []
    for from_s, until_s in spans:
        if from_s < end_s and until_s > start_s:
            starts.append(max(from_s, start_s))
            ends.append(min(until_s, end_s))
    starts.sort()
    ends.sort()
    most = over = 0
    for number, moment_s in enumerate(starts, 1):
        # At one moment an end comes before a start: the slot went from one to the other.
        while over < number and ends[over] <= moment_s:
            over += 1
        most = max(most, number - over)
    return most


def _without_prompts(beside: list[Held], began_s: float, start_s: float) -> list[tuple[float, float]]:
    """The stretches between two moments in which none of these items was in its prompt."""
    prompts = sorted((held.start_s, held.spoke_s) for held in beside if held.spoke_s is not None)
    free: list[tuple[float, float]] = []
    now_s = began_s
    for prompt_s, spoke_s in prompts:
        free.append((now_s, min(prompt_s, start_s)))
        now_s = max(now_s, spoke_s)
    return [*free, (now_s, start_s)]
