"""Whether a backend can be reached: since when it is away, when it is asked again, and when nobody waits any more.

Theory of operation. An *outage* begins when no connection can be had, and ends only when an item has got one: a
backend that answers probes, but then gives no item a connection, has been away all the while. Within an outage the
backend is *away* until a probe is answered; meanwhile it is probed at growing intervals, as long as somebody waits.
All patience is counted from the beginning of the outage. Others are told of it once when it begins and once when it
ends, however often the backend seems to come back meanwhile.

A proxy before the backend takes every connection, and says by its answers that the backend is away. Where one has
said so, a connection proves nothing, and only what the backend itself says to an item ends the outage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.core import retry
from unisono.core.errors import BackendUnavailableError

if TYPE_CHECKING:
    from unisono.core.errors import UnisonoError

# The pause between two probes grows no more after so many.
_GROWING_PROBES = 5


class Outage:
    """What is known of the way to one backend."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        # Since when no item has got a connection, or what a connection is there for; None: the last one did, or none
        # has tried.
        self._since_s: float | None = None
        # Whether a connection proves nothing.
        self._is_behind_proxy = False
        # Away: since when, and when it is probed next (None: a probe is under way, or nobody waits).
        self._away_since_s: float | None = None
        self._error: UnisonoError | None = None
        self._probe_at_s: float | None = None
        self._probes = 0
        # Since when it is away by what others were told; None: they were told nothing, or that it is back.
        self._told_since_s: float | None = None

    @property
    def is_away(self) -> bool:
        """Whether the backend was last found not to answer."""
        return self._away_since_s is not None

    @property
    def error(self) -> BackendUnavailableError:
        """What those are told who have waited too long."""
        said = self._error.message if self._error else "the backend cannot be reached"
        return BackendUnavailableError(f"{said} (waited {self._patience_s:g} s for it)")

    def is_too_long(self, now: float) -> bool:
        """Whether who waits has waited long enough."""
        return self._away_since_s is not None and now >= self._away_since_s + self._patience_s

    def next_moment(self, *, is_awaited: bool) -> float | None:
        """When it must be looked at again, though nothing happens."""
        if self._away_since_s is None:
            return None
        moments = [self._probe_at_s] if self._probe_at_s is not None else []
        if is_awaited:
            moments.append(self._away_since_s + self._patience_s)
        return min(moments, default=None)

    # -- What happens ------------------------------------------------------------------------------------------

    def somebody_came(self, now: float) -> None:
        """Nobody waited for the backend any more. Now somebody does, from now on."""
        self._since_s = None
        self._is_behind_proxy = False
        if self._away_since_s is not None:
            self._since_s = self._away_since_s = now
            if self._probes == 0:
                self._probe_at_s = now

    def connected(self, now: float) -> float | None:
        """An item has got a connection. Answers with how long none could, where that is news."""
        return None if self._is_behind_proxy else self._end(now)

    def heard(self, now: float) -> float | None:
        """The backend has said something to an item. Answers as `connected`."""
        if not self._is_behind_proxy:
            return None
        self._is_behind_proxy = False
        return self._end(now)

    def lost(self, error: UnisonoError, now: float, *, was_connected: bool = False) -> bool:
        """No connection could be had. The first probe of an outage goes at once, the others after a pause.

        `was_connected`: there was one, and whoever answered said that the backend is away. Answers whether all this
        is news.
        """
        self._is_behind_proxy = self._is_behind_proxy or was_connected
        is_news = self._told_since_s is None
        if is_news:
            self._told_since_s = now
        if self._since_s is None:
            self._since_s = now
            self._probes = 0
        self._away_since_s = self._since_s
        self._error = error
        self._probe_at_s = now + (self._pause_s() if self._probes else 0.0)
        return is_news

    def silent(self, error: UnisonoError, now: float) -> None:
        """A probe was not answered."""
        self._error = error
        self._probe_at_s = now + self._pause_s()

    def answered(self) -> None:
        """A probe was answered. Whether an item gets a connection is still to be seen."""
        self._away_since_s = self._error = self._probe_at_s = None

    def probe(self, now: float, *, is_awaited: bool) -> bool:
        """Whether a probe is due; it is under way then."""
        if self._probe_at_s is None or now < self._probe_at_s:
            return False
        self._probe_at_s = None
        if not is_awaited:
            # Nobody waits: the next who comes will ask.
            self._probes = 0
            return False
        self._probes += 1
        return True

    def _pause_s(self) -> float:
        return retry.backoff_s(min(self._probes, _GROWING_PROBES), "probe")

    def _end(self, now: float) -> float | None:
        """The outage is over."""
        self._since_s = None
        since_s, self._told_since_s = self._told_since_s, None
        return None if since_s is None else now - since_s
