"""Named timers on the event loop: starting one again moves it, and all can be stopped together."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


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
