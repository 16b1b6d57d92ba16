"""Lanes: what we believe of a runner's slots. Who sits in which, and which prompt each holds in its cache.

Theory of operation. A backend does not tell which slot answers a request, but it chooses in a known way: of the slots
that are free, the one whose last prompt has most in common with the new one, if that is more than a tenth of it; else
the one that was used least recently (llama.cpp, `get_available_slot`). Whoever knows what was sent can follow that.
A wrong guess costs time, never an answer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unisono.core.prefixes import MIN_SHARED_BYTES, common_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from unisono.core.prefixes import Prefix

# A slot is chosen for what it holds where that is more than this share of the prompt. Source: llama.cpp's
# slot_prompt_similarity.
SIMILARITY = 0.1


@dataclass(slots=True, eq=False)
class Lane:
    """A slot, as far as we know it."""

    number: int
    # Who sits in it; None: it is free.
    ticket: int | None = None
    # What the prompt that is, or was last, in it begins with; None: nothing that others begin with.
    holds: Prefix | None = None
    # Who is to be next. While the lane is free, it may count as sitting there: `before` is what the lane holds then.
    successor: int | None = None
    before: Prefix | None = None
    # Grows whenever a request comes or goes: the least recently used lane has the smallest.
    used: int = 0

    @property
    def is_open(self) -> bool:
        """Whether nobody sits in it, or is about to."""
        return self.ticket is None and self.successor is None


class Lanes:
    """The lanes of one runner."""

    def __init__(self) -> None:
        self.all: list[Lane] = []
        self._uses = 0
        # Every step of what the lanes hold, and how many lanes hold it.
        self._steps: Counter[int] = Counter()

    def resize(self, count: int) -> None:
        """As many lanes as slots. A lane that is taken, or about to be, stays until it is free."""
        while len(self.all) < count:
            taken = {lane.number for lane in self.all}
            self.all.append(Lane(next(number for number in range(count) if number not in taken)))
        if len(self.all) > count:
            # The ones that hold nothing go first, then the ones that were not used for longest.
            spare = sorted(self.open(), key=lambda lane: (lane.holds is not None, lane.used))
            for lane in spare[: len(self.all) - count]:
                self.hold(lane, None)
                self.all.remove(lane)

    def open(self) -> list[Lane]:
        """Lanes in which nobody sits, nor is about to, the least recently used first."""
        return sorted((lane for lane in self.all if lane.is_open), key=lambda lane: lane.used)

    def choose(self, prefix: Prefix | None, prompt_bytes: int, free: Iterable[Lane]) -> Lane:
        """The lane that the backend will take, of those that are free."""
        ranked = list(free)
        if prefix is not None:
            best = max(ranked, key=lambda lane: common_bytes(lane.holds, prefix))
            if common_bytes(best.holds, prefix) > SIMILARITY * prompt_bytes:
                return best
        return min(ranked, key=lambda lane: lane.used)

    def best_held(self, prefix: Prefix | None) -> int:
        """The most bytes of a prompt's beginning that any lane holds."""
        if prefix is None:
            return 0
        # A lane that holds a step holds all before it.
        held = bisect_left(prefix.digests, x=True, key=lambda digest: digest not in self._steps)
        return prefix.sizes[held - 1] if held else 0

    def held_step(self, prefix: Prefix | None) -> int | None:
        """The digest of as much of a prompt's beginning as any lane holds; None for less than matters."""
        held = self.best_held(prefix)
        if prefix is None or held < MIN_SHARED_BYTES:
            return None
        return prefix.digests[bisect_left(prefix.sizes, held)]

    def is_held(self, prefix: Prefix | None) -> bool:
        """Whether any lane holds as much of it as matters."""
        return self.best_held(prefix) >= MIN_SHARED_BYTES

    def is_held_by_few(self, prefix: Prefix | None, enough: int) -> bool:
        """Whether some lanes hold as much of it as matters, but fewer than so many, and not all."""
        held = self.best_held(prefix)
        if prefix is None or held < MIN_SHARED_BYTES:
            return False
        # The first step of those that only they hold who hold about as much as the one that holds most.
        step = bisect_right(prefix.sizes, held - MIN_SHARED_BYTES)
        return self._steps[prefix.digests[step]] < min(enough, len(self.all))

    def hold(self, lane: Lane, prefix: Prefix | None) -> None:
        """The lane holds this from now on."""
        if lane.holds is not None:
            self._steps.subtract(lane.holds.digests)
            for digest in lane.holds.digests:
                if not self._steps[digest]:
                    del self._steps[digest]
        lane.holds = prefix
        if prefix is not None:
            self._steps.update(prefix.digests)

    def sit(self, lane: Lane, ticket: int, prefix: Prefix | None, held: Prefix | None) -> int:
        """A request takes the lane; answers with the bytes of its beginning that the lane, holding `held`, has."""
        self._uses += 1
        self.hold(lane, prefix)
        lane.ticket, lane.used = ticket, self._uses
        return common_bytes(held, prefix)

    def stand_up(self, lane: Lane) -> None:
        """The request has left the lane; its prompt has not."""
        self._uses += 1
        lane.ticket, lane.used = None, self._uses

    def forget(self) -> None:
        """The runner was loaded anew: its slots are empty."""
        for lane in self.all:
            self.hold(lane, None)
            lane.before = None
