"""The ping before each slot: every request asks its runner's /health, one after the other.

Read in Ollama's source (server/sched.go, needsReload()): a request that finds its runner loaded pings it before it
may use it, and holds the runner's mutex meanwhile. Go's mutex does not serve strictly in turn: one that arrives just
when it is freed may take it before those that wait. So order at the socket is not quite order at the runner, and of
n requests that come together the last is n pings late. (A second ping follows once the slot is there; those run side
by side, and are left out here.)
"""

from __future__ import annotations

import asyncio
from collections import deque

# Of so many that wait, one is overtaken by the newest. Invented; a real server's number depends on its load.
_OVERTAKEN_EVERY = 5


class Pings:
    """The mutex of one runner. Which request overtakes is the same in every run."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turns = 0

    async def ping(self, lasts_s: float) -> None:
        """Returns when the runner has answered this request's ping."""
        if self._is_taken:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._next()
                raise
        self._is_taken = True
        try:
            await asyncio.sleep(lasts_s)
        finally:
            self._next()

    def _next(self) -> None:
        """Gives the turn on, without letting it go free in between."""
        while self._waiting:
            self._turns += 1
            turn = self._waiting.pop() if self._turns % _OVERTAKEN_EVERY == 0 else self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False
