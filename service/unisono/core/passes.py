"""Token arrivals → forward passes: how many the runner made for these items, and who took part in which.

Theory of operation. A forward pass gives every sequence in it one token. So walk the tokens of all items in time
order, and start a new pass whenever an item speaks that has already spoken in the current one, or when all who spoke
in it have ended before, or when it has as many members as the runner has slots. Against the runner's own counter
this was exact to about one pass in fifty, without the runner being asked anything.

What the walk cannot see is put right with the backend's own count of tokens, when an item ends:

1. A model that ends its answer spends a pass on the end token, whose text is nothing: the end itself speaks.
2. Tokens that no arrival showed (a parser held text back, or one character took several tokens) are *imputed*:
   the item took part in passes between its first token and its end in which it was silent.
3. Where there are too few of these, because nobody else spoke meanwhile, passes are added.

Passes that only computed prompts are invisible and not counted. Where a model drafts, a pass gives an item several
tokens: only the first of them is walked (core/drafts.py).

Tokens may arrive slightly out of order; they are sorted within a window (`REORDER_NS`) before they are walked, a
window's worth at a time.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter

from unisono.core.drafts import GAP_NS, Drafts, Speaker
from unisono.core.model import PassMethod

# Tokens are walked when they are this much older than the newest one, or when everything has ended.
REORDER_NS = 250_000_000
# Participations that the map keeps, about 16 MB; later passes are counted, but not mapped.
MAX_PARTICIPATIONS = 2_000_000
# Of one item's tokens that no arrival showed, so many passes are concluded at most: as many as fit into the time
# that it took, at a pass of 50 µs, but never more than a long answer has.
MAX_IMPUTED = 32_768
FASTEST_PASS_NS = 50_000
_ALWAYS_IMPUTED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCount:
    """A number of forward passes, and how sure it is."""

    count: int
    method: PassMethod
    # Share of all participations that was concluded instead of seen, 0 to 1.
    imputed_share: float
    # Share of the backend's own tokens that was seen as an arrival each, none so close upon the last that it may have
    # been of the same pass; 0 to 1.
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """One forward pass."""

    # Its number, from 0.
    number: int
    # When its first token was made, nanoseconds since 1970.
    at_ns: int
    # The items that took part, by index, in the order in which they spoke; imputed ones last.
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What an answer took part in."""

    # Other items that spoke while it did.
    shared_with: int
    # Its passes; None where a model drafts, and nothing tells how many tokens a pass gave.
    passes: int | None
    # Of these, the ones that are certain.
    at_least: int | None


class PassCounter:
    """Counts the passes of one group. Tokens go in as they arrive; the count is there at any time."""

    def __init__(
        self,
        method: PassMethod,
        *,
        drafted: int = 0,
        max_participations: int = MAX_PARTICIPATIONS,
    ) -> None:
        """`drafted`: tokens that the model is known to draft for a pass."""
        # The most members of a pass: the runner's slots, once they are known for certain; 0 until then.
        self.slots = 0
        self._method = method
        self._drafts = Drafts(drafted)
        self._room = max_participations
        # Walked passes, in the order of time: when, and who (None: no longer mapped).
        self._times: list[int] = []
        self._members: list[array[int] | None] = []
        self._unmapped = 0
        # The current pass, the last one: who spoke in it; when it began; whether it is over for certain.
        self._spoken: set[int] = set()
        self._began_ns = 0
        self._is_closed = True
        # The latest time of all that was walked.
        self._last_ns = 0
        # When each item last ended.
        self._over_ns: dict[int, int] = {}
        # Arrivals of another pass than the item's last that wait for stragglers: (at_ns, item); and the time from
        # which on some are walked again.
        self._pending: list[tuple[int, int]] = []
        self._due_ns = 0
        self._order = 0
        self._speaking: dict[int, Speaker] = {}
        # Ends whose tokens are to be put right once the walk has come so far:
        # (at_ns, order, item, passes seen, passes missing, first).
        self._ends: list[tuple[int, int, int, int, int, int]] = []
        self._seen = 0
        self._imputed = 0
        self._told_tokens = 0
        self._told_seen = 0
        self._told_hasty = 0

    def spoke(self, item: int, at_ns: int, *, is_drafted: bool | None = None) -> bool:
        """A token of the item arrived; `is_drafted`: see Drafts.hear. Answers whether its last one's pass gave it."""
        speaker = self._speaking.get(item)
        if speaker is None:
            for other in self._speaking.values():
                other.shared_with += 1
            speaker = self._speaking[item] = Speaker(at_ns, shared_with=len(self._speaking))
        if not self._drafts.hear(speaker, at_ns, is_drafted=is_drafted):
            return True
        self._arrive(item, at_ns)
        return False

    def ended(
        self, item: int, at_ns: int, *, tokens: int | None, has_end_token: bool, eval_s: float | None = None
    ) -> Part:
        """The item's answer is over, whole or not.

        `tokens` is the backend's own count, None where the answer broke off. `has_end_token`: the model itself
        ended it. `eval_s`: how long it generated, which tells the first token where none was seen.
        """
        speaker = self._speaking.pop(item, None) or Speaker(at_ns)
        self._over_ns[item] = at_ns
        if tokens is None:
            return self._part(speaker, speaker.passes)
        if has_end_token and speaker.tokens < tokens and self._drafts.hear(speaker, at_ns):
            self._arrive(item, at_ns)
        missing = max(0, tokens - speaker.tokens)
        self._told_tokens += tokens
        self._told_seen += tokens - missing
        self._told_hasty += min(speaker.hasty, tokens)
        passes = self._drafts.passes_of(missing)
        if missing:
            first_ns = min(at_ns - round((eval_s or 0.0) * 1e9), speaker.first_ns)
            self._order += 1
            unseen = missing if passes is None else passes
            heapq.heappush(self._ends, (at_ns, self._order, item, speaker.passes, unseen, first_ns))
        return self._part(speaker, None if passes is None else min(tokens, speaker.passes + passes))

    def _part(self, speaker: Speaker, passes: int | None) -> Part:
        doubtful = self._drafts.doubtful(speaker.hasty)
        at_least = None if passes is None else max(0, passes - doubtful)
        return Part(shared_with=speaker.shared_with, passes=passes, at_least=at_least)

    def settle(self) -> None:
        """Walks what still waits for stragglers; for when every item has ended."""
        self._walk(up_to_ns=None)

    @property
    def count(self) -> PassCount:
        """The passes so far."""
        certain = self._told_seen - self._drafts.doubtful(self._told_hasty)
        return PassCount(
            count=len(self._times),
            method=self._method,
            imputed_share=self._imputed / self.participations if self.participations else 0.0,
            confidence=certain / self._told_tokens if self._told_tokens else 1.0,
        )

    @property
    def so_far(self) -> int:
        """The passes at this moment, with those whose tokens still wait for stragglers.

        Of these there are at least as many as any one item has arrivals among them.
        """
        waiting = Counter(item for _, item in self._pending)
        return len(self._times) + max(waiting.values(), default=0)

    @property
    def participations(self) -> int:
        """How often an item took part in a pass, seen or concluded: what the map's size goes by."""
        return self._seen + self._imputed

    @property
    def unmapped(self) -> int:
        """Passes whose members are not known any more."""
        return self._unmapped

    def passes(self, start: int, limit: int) -> list[ForwardPass]:
        """Up to `limit` mapped passes from number `start` on; fewer only where there are no more.

        Numbers are final when every item has ended: until then, passes that nobody saw may come between.
        """
        mapped = (
            ForwardPass(number=number, at_ns=self._times[number], members=tuple(members))
            for number in range(start, len(self._times))
            if (members := self._members[number]) is not None
        )
        return list(islice(mapped, limit))

    # -- The walk ------------------------------------------------------------------------------------------

    def _arrive(self, item: int, at_ns: int) -> None:
        self._pending.append((at_ns, item))
        if at_ns >= self._due_ns:
            self._due_ns = at_ns + REORDER_NS
            self._walk(up_to_ns=at_ns - REORDER_NS)

    def _walk(self, up_to_ns: int | None) -> None:
        # By time, and at one time by arrival.
        self._pending.sort(key=itemgetter(0))
        end = len(self._pending) if up_to_ns is None else bisect_right(self._pending, up_to_ns, key=itemgetter(0))
        due, self._pending = self._pending[:end], self._pending[end:]
        for stamped_ns, item in due:
            # One that came too late to be sorted in speaks now.
            at_ns = max(stamped_ns, self._last_ns)
            is_next = item in self._spoken or 0 < self.slots <= len(self._spoken)
            if is_next or self._is_closed or (at_ns - self._last_ns >= GAP_NS and self._is_over(at_ns)):
                self._spoken.clear()
                self._is_closed = False
                self._began_ns = at_ns
                self._open(len(self._times), at_ns)
            self._join(len(self._times) - 1, item)
            self._seen += 1
            self._spoken.add(item)
            self._last_ns = at_ns
        while self._ends and (up_to_ns is None or self._ends[0][0] <= up_to_ns):
            at_ns, _, item, seen, missing, first_ns = heapq.heappop(self._ends)
            self._impute(item, seen, missing, first_ns, at_ns)

    def _is_over(self, at_ns: int) -> bool:
        """Whether all who spoke in the current pass have ended since; so it is before the first one."""
        return all(self._began_ns <= self._over_ns.get(item, 0) <= at_ns for item in self._spoken)

    def _open(self, number: int, at_ns: int) -> None:
        self._times.insert(number, at_ns)
        is_mapped = self._room > 0
        self._members.insert(number, array("I") if is_mapped else None)
        self._unmapped += not is_mapped

    def _join(self, number: int, item: int) -> None:
        members = self._members[number]
        if members is not None:
            members.append(item)
            self._room -= 1

    def _impute(self, item: int, seen: int, missing: int, first_ns: int, end_ns: int) -> None:
        """Gives an item the passes that its missing tokens came from.

        1. Passes between its first token and its end in which it was silent, the latest first.
        2. Such passes among those whose members are not known: all but the ones in which it must have spoken.
        3. Passes that nobody saw, spread evenly over that time.

        A backend may tell any number of tokens: no more are believed than could have been made in that time.
        """
        missing = min(missing, MAX_IMPUTED, max(_ALWAYS_IMPUTED, (end_ns - first_ns) // FASTEST_PASS_NS))
        self._imputed += missing
        start, end = bisect_left(self._times, first_ns), bisect_right(self._times, end_ns)
        unmapped = 0
        for number in range(end - 1, start - 1, -1):
            members = self._members[number]
            if missing == 0:
                return
            if members is None:
                unmapped += 1
            elif item in members:
                seen -= 1
            else:
                self._join(number, item)
                missing -= 1
                if number == len(self._times) - 1:
                    self._spoken.add(item)
        missing -= min(missing, max(0, unmapped - max(0, seen)))
        step_ns = (end_ns - first_ns) / (missing + 1)
        for k in range(missing):
            at_ns = round(first_ns + step_ns * (k + 1))
            number = bisect_right(self._times, at_ns)
            if number == len(self._times):
                self._is_closed = True
                self._last_ns = max(self._last_ns, at_ns)
            self._open(number, at_ns)
            self._join(number, item)
