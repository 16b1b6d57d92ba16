"""Timers on the event loop: named ones, of which starting one again moves it, and an alarm that keeps moving on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from unisono.app.ports import Clock

# An alarm never rings sooner than this, so that one a hair in the past cannot spin the loop.
_SHORTEST_S = 0.001


class Timers:
    """The timers of one owner."""

    def __init__(self) -> None:
        self._handles: dict[str, asyncio.TimerHandle] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def start(self, name: str, delay_s: float, action: Callable[[], object]) -> None:
        """Rings once after so many seconds, instead of when it would have."""
        self.stop(name)

        def ring() -> None:
            self._handles.pop(name, None)
            action()

        self._handles[name] = asyncio.get_running_loop().call_later(delay_s, ring)

    def stop(self, name: str) -> None:
        """Does not ring any more; nothing where it was not started."""
        handle = self._handles.pop(name, None)
        if handle is not None:
            handle.cancel()

    def stop_all(self) -> None:
        """None of them rings any more."""
        for name in list(self._handles):
            self.stop(name)


class Alarm:
    """Rings by a moment that moves on with every token; too early now and then, which costs less than moving it."""

    def __init__(self, clock: Clock, action: Callable[[], object]) -> None:
        self._clock = clock
        self._action = action
        self._handle: asyncio.TimerHandle | None = None
        self._moment_s = 0.0

    def set(self, moment_s: float | None) -> None:
        """Must ring by this moment of the clock; None: it need not ring."""
        if self._handle is not None and moment_s is not None and self._moment_s <= moment_s:
            return
        self.stop()
        if moment_s is not None:
            delay_s = max(_SHORTEST_S, moment_s - self._clock.monotonic_s())
            self._handle = asyncio.get_running_loop().call_later(delay_s, self._ring)
            self._moment_s = moment_s

    def stop(self) -> None:
        """Does not ring any more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _ring(self) -> None:
        self._handle = None
        self._action()
