"""Requests of single callers, gathered for a moment so that they can go as one wave, or as one request.

Theory of operation. The first who waits opens the window. It closes when as many wait as there are lanes (or as the
settings say), or some milliseconds later; then all of them may go, together. Who finds the runner idle does not wait
at all: that is seen to by `schedule.py`. While a slot is free, whoever waits misses passes; so nobody does then,
unless a time was asked for.

Texts to embed are gathered before they come to the runner, since they go in one request (`bundles.py`). While such a
request waits for its turn, the next could only wait behind it, and may as well grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unisono.core.waiting import Waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSettings:
    """How requests of single callers are gathered."""

    # For so long at most; 0: not at all.
    window_s: float = 0.010
    # Until there are so many; None: as many as lanes.
    size: int | None = None
    # Whether nobody is gathered while a slot is free.
    yields_to_slots: bool = False


def bundle_goes_s(
    settings: WindowSettings, *, texts: int, most_texts: int, since_s: float, has_waiting: bool, has_flying: bool
) -> float | None:
    """From when on texts of single callers that were gathered since then may go, as one request.

    `has_waiting`: an earlier request of theirs has not been released; `has_flying`: one is at the backend.

    1. None: one waits, and they would have to wait for it.
    2. At once: there is none that they could have gathered behind, or they are enough.
    3. When the window closes.
    """
    if has_waiting:
        return None
    if not has_flying or texts >= min(settings.size or most_texts, most_texts):
        return since_s
    return since_s + settings.window_s


class Window:
    """Those who are being gathered on one runner."""

    def __init__(self, settings: WindowSettings) -> None:
        self._settings = settings
        self._gathered: dict[int, Waiting] = {}
        self._since_s = 0.0

    def __len__(self) -> int:
        return len(self._gathered)

    @property
    def is_on(self) -> bool:
        """Whether anybody is gathered at all."""
        return self._settings.window_s > 0

    def closes_s(self, *, has_room: bool) -> float | None:
        """When those who wait may go, though no more come; None: nobody waits. `has_room`: a slot is free."""
        if not self._gathered:
            return None
        is_open = not (has_room and self._settings.yields_to_slots)
        return self._since_s + self._settings.window_s if is_open else self._since_s

    def add(self, item: Waiting, now: float) -> None:
        """Somebody waits for company."""
        if not self._gathered:
            self._since_s = now
        self._gathered[item.ticket] = item

    def drop(self, ticket: int) -> Waiting | None:
        """Whoever it is waits no more; None: it did not."""
        return self._gathered.pop(ticket, None)

    def close(self, now: float, lanes: int, *, has_room: bool) -> list[Waiting]:
        """Those who may go now, if they are enough or it was long enough; else nobody."""
        closes_s = self.closes_s(has_room=has_room)
        if closes_s is None or (len(self._gathered) < (self._settings.size or lanes) and now < closes_s):
            return []
        gathered, self._gathered = list(self._gathered.values()), {}
        for item in gathered:
            item.is_gathered = len(gathered) > 1
        return gathered
