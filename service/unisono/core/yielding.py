"""Now and then the backend is left alone for a moment, so that it can serve somebody else.

Theory of operation. A backend that loads models on demand gives a request whose runner is loaded to that runner at
once. Who wants another model, or another context, waits until no request at all is at a runner that has to make
room, and nothing on the wire tells that anybody waits. A runner whose slots are filled again at once is never without
a request: whoever waits would do so until our last item, or for ever.

So after `every_s` of work without a pause nothing more goes, on any runner of the backend, until all that is there
has ended and `NOTICE_S` have passed. Whoever waits has the room by then, and is in front of us when we ask for ours
back. Where nobody waited, the runner is still there.
"""

from __future__ import annotations

# From the end of a request, as we see it, until the server has counted it off and taken up who waits, which it does
# in other threads than the one that answered us: less than a millisecond as a rule, and on a machine all of whose
# cores compute, a few slices of its scheduler. A load of ours that came sooner would get the runner as if nobody
# waited, and its keep_alive would take back the word that the runner is to go.
NOTICE_S = 0.05


class Yielding:
    """When one backend is left to others."""

    def __init__(self, every_s: float) -> None:
        """`every_s`: work without a pause after which one follows; 0: never."""
        self._every_s = every_s
        self._is_on = False
        # Without a pause since then.
        self._working_since_s = 0.0
        # Nothing of ours is there since then; None: something is.
        self._quiet_since_s: float | None = -NOTICE_S

    @property
    def is_on(self) -> bool:
        """Whether nothing may go now."""
        return self._is_on

    def see(self, in_flight: int, now: float) -> None:
        """So many requests of ours are at the backend. To be said whenever that may have changed, or time passed."""
        if in_flight:
            if self._quiet_since_s is not None and now >= self._quiet_since_s + NOTICE_S:
                self._working_since_s = now
            self._quiet_since_s = None
            self._is_on = self._is_on or (self._every_s > 0 and now >= self._working_since_s + self._every_s)
            return
        if self._quiet_since_s is None:
            self._quiet_since_s = now
        if now >= self._quiet_since_s + NOTICE_S:
            self._is_on = False

    def next_moment(self) -> float | None:
        """When it must be seen to, though nothing happens; None: not before something does."""
        if self._is_on:
            return None if self._quiet_since_s is None else self._quiet_since_s + NOTICE_S
        if self._quiet_since_s is None and self._every_s > 0:
            return self._working_since_s + self._every_s
        return None
