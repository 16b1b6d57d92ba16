"""What was seen of a runner → how many slots it has, and how many of our items may hold one now.

Theory of operation. A backend never tells how many sequences it computes side by side (llama.cpp's server does). But
each finished item tells when it held a slot, and how long it waited for one (`slot_history.py`).

*Lower bound.* The most items that held a slot at one time were that many slots: `at_least`.

*Learned.* It is their number once items waited for a slot while that many held one, twice, and got it from one of
ours. Until then the limit is 8 and doubles while nobody waits though about as many are there.

*Too low.* Now and then the limit is one higher than the number: a probe. If the item too many waits, the number is
confirmed. If it holds a slot beside the others, the number was wrong, and is withdrawn: what is known is "at least so
many", and the limit goes to twice that, and doubles further while nobody waits. A number remembered from an earlier
run of the service is used and probed from the first item on; one from before a load or an outage, 16 items later.

*Too high.* A server that was started again with fewer slots looks from outside like one that others use too. So while
items wait beside fewer than the number, first only the limit falls to what was seen (three waits in a row), and it
rises again when items stop waiting or hold more slots. The number itself falls only where nothing speaks for others:
each wait in a long row was beside the same number of ours, and each slot came from one of ours. Foreign requests
break such a row when they give up a slot, or take one. Those who hold the same slots all the time leave the very
same times as fewer slots, whatever is tried, so how long the row must be is how long they are given the benefit of
the doubt: 60 s and 16 waits for a number that was proven of this process. After that they are mistaken for fewer
slots; the next probe after they have left puts it right.

A runner that was loaded anew may have other slots, and nobody else's requests were there before ours: its number is
only remembered, and falls after 8 waits in 32 items.

*Trouble.* Time-outs or an item that ran out of memory halves the limit; each row of `limit` items that end well
raises it by one, until it is where it was.

A configured number wins, and so does one that the backend tells: of these only trouble lowers the limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unisono.core.model import Slots, SlotSource
from unisono.core.slot_history import SLACK_S, WAIT_S, Held, SlotHistory, Wait

__all__ = ["FIRST_LIMIT", "SLACK_S", "WAIT_S", "Capacity", "Held", "SlotMemo"]

# In flight at first, while nothing is known.
FIRST_LIMIT = 8
# From this limit on it is raised only if half as many were seen to hold a slot: others wait too briefly to show it.
_UNSEEN = 16
# Waits that prove a number: one alone can be an accident of a busy machine.
PROOFS = 2
# Waits in a row beside fewer than the number that lower the limit.
SHORT_WAITS = 3
# Items between two probes: at first, and at most.
FIRST_PROBE = 16
LAST_PROBE = 64
# The limit doubles only where this share of it was at the backend together: that nobody waits tells nothing else.
_FULL = 0.75
# A probe is given up after so many items for each slot: there was too little to do.
_PROBE_PATIENCE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """How long a row must be until a number falls."""

    waits: int
    items: int
    span_s: float


# A number that was proven of this process; one that is only remembered.
PROVEN_FALLS = _Row(waits=16, items=32, span_s=60.0)
REMEMBERED_FALLS = _Row(waits=8, items=32, span_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotMemo:
    """What is worth remembering of a runner's slots; 0: not known."""

    count: int = 0
    at_least: int = 0


@dataclass(slots=True)
class _Fewer:
    """Waits in a row beside the same number, which is less than the known one."""

    beside: int
    since_s: float
    waits: int = 1
    items: int = 0


class Capacity:
    """How many of our items may hold a slot of one runner."""

    def __init__(self, *, configured: int | None = None, ceiling: int = 64) -> None:
        self._ceiling = max(1, ceiling)
        self._slots = Slots()
        if configured is not None:
            self._slots = Slots(count=configured, source=SlotSource.CONFIGURED)
        self._history = SlotHistory()
        self._at_least = 0
        # What is tried while the number is not known.
        self._search = min(FIRST_LIMIT, self._ceiling)
        # Where the search begins: the most that held a slot at another time.
        self._hint = 0
        # Items that ended without having waited, since one had to or the limit was raised.
        self._calm = 0
        self._proofs = 0
        # Whether one more than the number is tried; items since that began or ended, and until the next.
        self._is_probing = False
        self._since_probe = 0
        self._next_probe = FIRST_PROBE
        # Waits beside fewer than the number: the last ones, and the row that would make it fall.
        self._short: list[int] = []
        self._fewer: _Fewer | None = None
        # What foreign load leaves to us, since when; what is dared after trouble. None: no less than otherwise.
        self._left: int | None = None
        self._left_since_s = 0.0
        self._dared: int | None = None
        self._well = 0
        # Ends that still belong to the trouble for which the limit was halved.
        self._same_trouble = 0

    # -- What is known -----------------------------------------------------------------------------------------

    @property
    def slots(self) -> Slots:
        """What is known of the runner's slots."""
        return self._slots

    @property
    def at_least(self) -> int:
        """The most of our items that were seen to hold a slot at one time; the number, where that was said."""
        return max(self._at_least, self._slots.count if self._is_given else 0)

    @property
    def limit(self) -> int:
        """How many of our items may hold a slot now: all slots, or what is tried, or what others leave."""
        limit = self._wanted
        for lower in (self._left, self._dared):
            if lower is not None:
                limit = min(limit, lower)
        return limit

    @property
    def known(self) -> int:
        """How many of our items may hold a slot where one too many would do harm.

        The number, or what was seen of it; one more at the very beginning of a probe, until an item has ended.
        """
        known = self._slots.count or max(FIRST_LIMIT, self._at_least)
        return min(self.limit, known + (self._is_probing and self._since_probe == 0))

    @property
    def memory(self) -> SlotMemo | None:
        """What to keep for the next time; None: nothing, or nothing that has to be learned."""
        if self._is_given or not (self._slots.count or self._at_least):
            return None
        return SlotMemo(count=self._slots.count, at_least=self._at_least)

    @property
    def _is_given(self) -> bool:
        return self._slots.source in (SlotSource.CONFIGURED, SlotSource.TOLD)

    @property
    def _wanted(self) -> int:
        """The limit where neither others nor trouble lower it."""
        count = self._slots.count
        if self._is_given or not count:
            return count or self._search
        return min(count + self._is_probing, max(count, self._ceiling))

    # -- What is said ------------------------------------------------------------------------------------------

    def told(self, count: int) -> None:
        """The backend itself says how many slots it has; a configured number still wins."""
        if self._slots.source is not SlotSource.CONFIGURED:
            self._slots = Slots(count=count, source=SlotSource.TOLD)
            self._left = None

    def seed(self, count: int, at_least: int = 0) -> None:
        """What was learned at another time: used until it is confirmed or put right; no news where more is known."""
        if self._slots.source is not SlotSource.UNKNOWN or self._at_least:
            return
        if count > 0:
            self._slots = Slots(count=min(count, self._ceiling), source=SlotSource.REMEMBERED)
            self._is_probing = True
        self._hint = at_least
        self._search = min(self._ceiling, max(self._search, at_least))

    def forget(self) -> None:
        """The runner is, or may be, another process: what was learned holds no more, but may still be so."""
        count, hint = self._slots.count, max(self._hint, self._at_least)
        if not self._is_given:
            self._slots = Slots()
        self._history.clear()
        self._at_least = self._calm = self._proofs = 0
        self._search = min(FIRST_LIMIT, self._ceiling)
        self._next_probe = FIRST_PROBE
        self._settle_probe()
        self._trust()
        self.seed(count, hint)
        # It is as likely as ever to be right, and the first wave is not to have one item too many.
        self._settle_probe()

    def missed(self) -> None:
        """An item left the backend without telling when it held a slot: failed, or cancelled."""
        self._history.missed()

    def stumbled(self) -> None:
        """An item timed out or ran out of memory: the limit is halved.

        Once for what was in flight together: the ends of as many items as the limit was belong to the same trouble.
        """
        if self._same_trouble:
            self._same_trouble -= 1
            return
        self._same_trouble = self.limit - 1
        self._dared = max(1, self.limit // 2)
        self._well = 0

    def observe(self, held: Held, *, speaking: int = 0) -> None:
        """An item ended, and tells when it held its slot.

        `speaking`: other items that hold a slot while this one ends. Their times are not in the history yet, so where
        the item does not say what is settled, nothing is as long as somebody speaks.
        """
        self._dare()
        if self._is_given:
            return
        self._history.add(held)
        self._since_probe += 1
        if not held.has_waited:
            self._calm += 1
        if self._fewer is not None:
            self._fewer.items += 1
        self._see_together(held)
        is_settled = not speaking or held.settled_s < math.inf
        for wait in self._history.settle(held.settled_s if is_settled else -math.inf):
            self._weigh(wait)
        self._raise_limit()
        self._probe()

    # -- What follows ------------------------------------------------------------------------------------------

    def _see_together(self, held: Held) -> None:
        """More than ever held a slot at one time, or more than others seemed to leave."""
        together = self._history.overlap(held.start_s, held.end_s)
        if together > self._at_least:
            self._at_least = together
            self._proofs = 0
            if 0 < self._slots.count < together:
                self._withdraw()
        if self._left is not None:
            now = self._history.overlap(max(held.start_s, self._left_since_s), held.end_s)
            if now > self._left:
                self._left = now if now < self._slots.count else None
                self._short.clear()
        if self._fewer is not None:
            now = self._history.overlap(max(held.start_s, self._fewer.since_s), held.end_s)
            if now > self._fewer.beside:
                self._fewer = None

    def _withdraw(self) -> None:
        """The number was too low: what is known is only "at least so many", and more is tried at once."""
        self._slots = Slots()
        self._search = min(self._ceiling, 2 * self._at_least)
        self._calm = 0
        self._next_probe = FIRST_PROBE
        self._settle_probe()
        self._trust()

    def _weigh(self, wait: Wait) -> None:
        """An item had to wait.

        1. Beside as many as the number, or the most ever seen: that proves it, if one of ours made room.
        2. Beside fewer: others hold slots, or there are fewer than was thought.
        """
        self._calm = 0
        full = max(self._slots.count, self._at_least)
        if wait.beside >= full:
            self._trust()
            self._proofs = self._proofs + 1 if wait.is_handed_over else 0
            if self._proofs >= PROOFS:
                self._learn(full)
            return
        if self._slots.count:
            self._lower_limit(wait)
        self._count_fewer(wait)

    def _learn(self, count: int) -> None:
        """So many slots it has."""
        if self._is_probing and self._slots.source is SlotSource.LEARNED:
            self._next_probe = min(LAST_PROBE, 2 * self._next_probe)
        self._slots = Slots(count=count, source=SlotSource.LEARNED)
        self._proofs = 0
        if self._is_probing:
            self._settle_probe()

    def _lower_limit(self, wait: Wait) -> None:
        """Three waits in a row beside fewer than may run: for the moment, there is room for no more."""
        if wait.beside >= self.limit:
            return
        self._short.append(wait.beside)
        if len(self._short) >= SHORT_WAITS:
            self._left = max(1, *self._short)
            self._left_since_s = wait.start_s
            self._short.clear()

    def _count_fewer(self, wait: Wait) -> None:
        """Sees whether a row of waits is long enough for the number to fall."""
        if not wait.is_handed_over:
            self._fewer = None
            return
        if self._fewer is None or self._fewer.beside != wait.beside:
            self._fewer = _Fewer(wait.beside, wait.start_s)
            return
        row = self._fewer
        row.waits += 1
        least = REMEMBERED_FALLS if self._slots.source is SlotSource.REMEMBERED else PROVEN_FALLS
        span_s = wait.start_s - row.since_s
        if row.waits >= least.waits and row.items >= least.items and span_s >= least.span_s:
            self._at_least = row.beside
            self._trust()
            self._next_probe = FIRST_PROBE
            self._learn(row.beside)

    def _trust(self) -> None:
        """Nothing speaks against the number any more."""
        self._short.clear()
        self._fewer = self._left = None

    def _raise_limit(self) -> None:
        """Nobody had to wait for a while: there is room for more."""
        if self._left is not None and self._calm >= self._left:
            self._left += 1
            self._calm = 0
            if self._left >= self._slots.count:
                self._left = None
        elif not self._slots.count and self._calm >= self._search:
            self._calm = 0
            # Prompts that wait for each other show fewer that hold a slot than do: so that is asked for late.
            together = max(self._at_least, self._history.under_way(2 * self._search))
            is_seen = self._search < _UNSEEN or self._at_least >= self._search / 2
            if together >= _FULL * self._search and is_seen:
                self._search = min(self._ceiling, 2 * self._search)

    def _probe(self) -> None:
        """Begins a probe when it is time, and gives up one that nothing answers."""
        if self._is_given or not self._slots.count or self._left is not None or self._dared is not None:
            return
        patience = _PROBE_PATIENCE * (self._slots.count + 1)
        if self._since_probe >= (patience if self._is_probing else self._next_probe):
            self._is_probing = not self._is_probing
            self._since_probe = 0

    def _settle_probe(self) -> None:
        self._is_probing = False
        self._since_probe = 0

    def _dare(self) -> None:
        """An item ended well: after as many as the limit, one more is dared."""
        self._same_trouble = max(0, self._same_trouble - 1)
        if self._dared is None:
            return
        self._well += 1
        if self._well >= self._dared:
            self._well = 0
            self._dared += 1
            if self._dared >= (self._slots.count or self._search):
                self._dared = None
