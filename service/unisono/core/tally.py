"""What is added up for the report of a group: families, context, its runner, how long one at a time takes."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unisono.core.prefixes import MIN_SHARED_BYTES
from unisono.core.report import FamilyReport, RunnerFigures

if TYPE_CHECKING:
    from unisono.core.idle import IdleReason
    from unisono.core.prefixes import Prefix
    from unisono.core.report import Costs

# Families that a report lists, and that are counted at most.
MOST_REPORTED = 100
_MOST_COUNTED = 10_000


@dataclass(slots=True)
class _Family:
    """What happened to the items of one family."""

    prefix_bytes: int
    items: int = 0
    computed: int = 0


class FamilyTally:
    """How many items each family has, and how often its prefix was computed."""

    def __init__(self) -> None:
        self._families: dict[int, _Family] = {}

    def joined(self, prefix: Prefix | None) -> None:
        """An item of the family is part of the group."""
        if prefix is None:
            return
        known = self._families.get(prefix.key)
        if known is None and len(self._families) < _MOST_COUNTED:
            known = self._families[prefix.key] = _Family(prefix.size)
        if known is not None:
            known.items += 1

    def left(self, prefix: Prefix | None) -> None:
        """An item of the family is not part of the group any more."""
        known = self._families.get(prefix.key) if prefix is not None else None
        if known is not None:
            known.items -= 1

    def released(self, prefix: Prefix | None, held_bytes: int | None) -> None:
        """One was released, into a lane that held so much of its beginning; None: it waits for any lane."""
        if prefix is None or held_bytes is None or held_bytes > prefix.size - MIN_SHARED_BYTES:
            return
        known = self._families.get(prefix.key)
        if known is not None:
            known.computed += 1

    def reusable_tokens(self, bytes_per_token: float) -> float:
        """Prompt tokens that need not be computed where each family's items follow each other on one slot."""
        return sum(max(0, one.items - 1) * one.prefix_bytes for one in self._families.values()) / bytes_per_token

    def report(self, bytes_per_token: float) -> tuple[FamilyReport, ...]:
        """The largest families of two items or more."""
        largest = heapq.nlargest(
            MOST_REPORTED, self._families.values(), key=lambda one: (one.items, one.prefix_bytes)
        )
        return tuple(
            FamilyReport(
                prefix_tokens=round(one.prefix_bytes / bytes_per_token), item_count=one.items, computed=one.computed
            )
            for one in largest
            if one.items > 1
        )


class ContextTally:
    """The most tokens of context that items in flight used at one time, each counted with its final size."""

    def __init__(self) -> None:
        # Of each answered item: when it was released and when it ended, in nanoseconds, and its tokens.
        self._spans = array("q")

    def answered(self, released_ns: int, ended_ns: int, tokens: int) -> None:
        """An item with so many tokens of prompt and answer was in flight from then till then."""
        self._spans.extend((released_ns, ended_ns, tokens))

    @property
    def most(self) -> int:
        """The most tokens at one time."""
        spans = self._spans
        steps = [
            step
            for place in range(0, len(spans), 3)
            for step in ((spans[place], spans[place + 2]), (spans[place + 1], -spans[place + 2]))
        ]
        # At one moment an end comes before a beginning.
        steps.sort()
        most = now = 0
        for _, tokens in steps:
            now += tokens
            most = max(most, now)
        return most


@dataclass(slots=True)
class _Stay:
    """A time from a group's first release to its last end."""

    began_ns: int
    before: RunnerFigures
    # So far.
    ended_ns: int | None = None
    after: RunnerFigures | None = None


class RunnerTally:
    """What was seen of a runner from a group's first release to its last end.

    Where all its items leave for another backend, it is over; it begins anew where some come back.
    """

    def __init__(self) -> None:
        self._stays: list[_Stay] = []
        self._is_there = False

    def released(self, figures: RunnerFigures, at_ns: int) -> None:
        """Items of the group were released."""
        if not self._is_there:
            self._is_there = True
            self._stays.append(_Stay(at_ns, figures))

    def ended(self, figures: RunnerFigures, at_ns: int) -> None:
        """The last item that it had has ended; more may come."""
        if self._is_there:
            self._stays[-1].after, self._stays[-1].ended_ns = figures, at_ns

    def left(self, figures: RunnerFigures, at_ns: int) -> None:
        """The last item that it had has left."""
        self.ended(figures, at_ns)
        self._is_there = False

    @property
    def duration_s(self) -> float | None:
        """How long that was; None where nothing was released, or nothing has ended."""
        spans = [(stay.ended_ns - stay.began_ns) / 1e9 for stay in self._stays if stay.ended_ns is not None]
        return sum(spans) if spans else None

    @property
    def last(self) -> RunnerFigures:
        """The figures at the last end."""
        found = [stay.after for stay in self._stays if stay.after is not None]
        return found[-1] if found else RunnerFigures()

    @property
    def deaths(self) -> int:
        """Times that the runner ended while it answered."""
        return sum(stay.after.deaths - stay.before.deaths for stay in self._stays if stay.after is not None)

    def idle_s(self, slots: int) -> dict[IdleReason, float]:
        """Slots × seconds that were not used, where there are so many slots."""
        found: Counter[IdleReason] = Counter()
        for stay in self._stays:
            if stay.after is not None:
                found.update(stay.after.idle_since(stay.before, slots))
        return dict(found)


def one_at_a_time_s(costs: Costs | None, *, prompt_tokens: int, completion_tokens: int) -> float | None:
    """How long these tokens would take one item after the other; None where a single stream was not measured.

    `prompt_tokens` are the ones that were computed: those in a cache would be in a cache then too.
    """
    if costs is None or costs.single_stream_token_s is None or costs.prompt_token_s is None:
        return None
    return completion_tokens * costs.single_stream_token_s + prompt_tokens * costs.prompt_token_s
