"""Attempts that are under way at one backend: each item has one at a time, from its staging to its answer's end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from unisono.app.ports import HeldCall


@dataclass(slots=True)
class Attempt:
    """A staging and what follows it."""

    serial: int
    task: asyncio.Task[None]
    call: HeldCall | None = None
    is_released: bool = False
    released_s: float = 0.0

    def break_off(self) -> None:
        """Nobody waits for its answer any more."""
        if self.call is not None:
            self.call.abort()
        _ = self.task.cancel()


class Attempts:
    """Those of one backend, by the tickets of their items."""

    def __init__(self) -> None:
        self._attempts: dict[int, Attempt] = {}

    def __getitem__(self, ticket: int) -> Attempt:
        return self._attempts[ticket]

    def begin(self, ticket: int, attempt: Attempt) -> None:
        """An item has this one from now on."""
        self._attempts[ticket] = attempt

    def find(self, ticket: int, serial: int) -> Attempt | None:
        """That very attempt; None: it is over, and another may have begun."""
        attempt = self._attempts.get(ticket)
        return attempt if attempt is not None and attempt.serial == serial else None

    def end(self, ticket: int, serial: int) -> Attempt | None:
        """As `find`; it is over with that."""
        found = self.find(ticket, serial)
        if found is not None:
            del self._attempts[ticket]
        return found

    def end_any(self, ticket: int) -> Attempt | None:
        """Whichever the item has is over; None: it has none."""
        return self._attempts.pop(ticket, None)

    @property
    def tasks(self) -> Sequence[asyncio.Task[None]]:
        """What carries them out."""
        return [attempt.task for attempt in self._attempts.values()]

    @property
    def first_release_s(self) -> float:
        """When the earliest of them was released that has been; infinite where none was."""
        return min((one.released_s for one in self._attempts.values() if one.is_released), default=math.inf)
