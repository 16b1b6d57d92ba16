"""A runner that dies takes all that it was answering with it: finds out which of them ended it.

Theory of operation. When the runner ends, everything in flight fails at about the same time. The first such
failure opens a *wake*: until everything that was in flight has failed too, or has been answered all the same, or a
second has passed, nothing is judged. Then:

- Several fell: one of them may be the culprit, the others are innocent. None is charged. They are run again in
  two halves, each apart from everything else, and a half that falls is halved again.
- One fell alone: it was the culprit, or its connection was cut. It is charged an attempt; if it ended the runner, it
  is tried again by itself.

Whoever gets further than it was when it fell is *cleared*: what ends a runner does so at the same place, mostly. It
goes on, and the next half need not wait for its end. Should the runner die all the same, those on trial are suspected
first, and the cleared ones wait with everybody else.

So of n items, a single culprit is found after at most log2(n) + 1 more deaths, and no innocent one fails.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.core.errors import RunnerDiedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from unisono.core.errors import UnisonoError

# How long the others' failures are waited for.
WAKE_S = 1.0


@dataclass(slots=True)
class Wake:
    """The time after a death, until it is known whom it took."""

    until_s: float
    # In flight at the death, and neither failed nor answered yet.
    alive: set[int]
    # Who fell, in order, and by which error.
    fallen: dict[int, UnisonoError] = field(default_factory=dict)

    @property
    def is_grave(self) -> bool:
        """Whether it is more than one cut connection: nobody goes until it is judged."""
        return len(self.fallen) > 1 or any(isinstance(error, RunnerDiedError) for error in self.fallen.values())


class Suspects:
    """Runs those that fell together in halves, until the culprit is alone."""

    def __init__(self) -> None:
        self.wake: Wake | None = None
        self._trials: deque[tuple[int, ...]] = deque()
        self._on_trial: set[int] = set()
        # Still at the backend, and further than when they fell.
        self._cleared: set[int] = set()

    @property
    def is_active(self) -> bool:
        """Whether only suspects may go."""
        return bool(self._on_trial or self._trials)

    @property
    def on_trial(self) -> frozenset[int]:
        """Who may go now, where only suspects may."""
        if not self._on_trial and self._trials:
            self._on_trial = set(self._trials.popleft())
        return frozenset(self._on_trial)

    @property
    def at_large(self) -> frozenset[int]:
        """Who may be at the backend while others are tried: those on trial, and those that are cleared."""
        return self.on_trial | self._cleared

    def fell(self, ticket: int, error: UnisonoError, flying: Iterable[int], now: float) -> None:
        """An attempt fell as if the runner had died. `flying`: who else is in flight."""
        if self.wake is None:
            self.wake = Wake(now + WAKE_S, set(flying) - {ticket})
        self.wake.alive.discard(ticket)
        self.wake.fallen[ticket] = error

    def clear(self, ticket: int) -> bool:
        """It got further than when it fell. Answers whether it was on trial."""
        if ticket not in self._on_trial:
            return False
        self._on_trial.discard(ticket)
        self._cleared.add(ticket)
        return True

    def left(self, ticket: int) -> None:
        """It was answered, stopped, or failed for a reason of its own: it is no suspect any more."""
        self._on_trial.discard(ticket)
        self._cleared.discard(ticket)
        if self.wake is not None:
            self.wake.alive.discard(ticket)
            self.wake.fallen.pop(ticket, None)

    def judged(self, now: float) -> dict[int, UnisonoError] | None:
        """Who fell, once that is known; the wake is over then."""
        wake = self.wake
        if wake is None or (wake.alive and now < wake.until_s):
            return None
        self.wake = None
        return wake.fallen

    def halve(self, fallen: Iterable[int]) -> None:
        """These fell together: each half is run apart. If some of them were on trial, it was one of these."""
        everybody = tuple(fallen)
        suspects = tuple(ticket for ticket in everybody if ticket in self._on_trial) or everybody
        self._on_trial.difference_update(everybody)
        self._cleared.difference_update(everybody)
        middle = (len(suspects) + 1) // 2
        self._trials.extendleft(half for half in (suspects[middle:], suspects[:middle]) if half)

    def isolate(self, ticket: int) -> None:
        """It fell alone, and may be tried again: by itself."""
        self._on_trial.discard(ticket)
        self._trials.appendleft((ticket,))

    def forget(self, ticket: int) -> None:
        """It has ended."""
        self.left(ticket)
        if any(ticket in trial for trial in self._trials):
            rest = (tuple(one for one in trial if one != ticket) for trial in self._trials)
            self._trials = deque(trial for trial in rest if trial)
