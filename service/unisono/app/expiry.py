"""What of a batch is given up for lack of time: what has not ended at its deadline, and what waited for too long."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.core.errors import BatchDeadlineError, QueueTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unisono.app.ports import Clock
    from unisono.app.timers import Timers
    from unisono.core.errors import UnisonoError


class Expiry:
    """The limits in time of one batch, but for those that its items have at a backend's driver."""

    def __init__(
        self,
        timers: Timers,
        clock: Clock,
        *,
        queue_timeout_s: float,
        queued: Callable[[], Sequence[tuple[int, int]]],
        expire: Callable[[Sequence[int], UnisonoError], None],
        on_deadline: Callable[[UnisonoError], None],
    ) -> None:
        """`queue_timeout_s`: 0 for none. `queued`: items that no driver has, each with when the batch had it, in
        nanoseconds since 1970. `expire` ends some of them; `on_deadline`, the batch.
        """
        self._timers = timers
        self._clock = clock
        self._queue_timeout_s = queue_timeout_s
        self._queued = queued
        self._expire = expire
        self._on_deadline = on_deadline

    def set_deadline(self, moment_s: float) -> None:
        """The batch ends at that moment of the monotonic clock."""
        self._timers.start("deadline", max(0.0, moment_s - self._clock.monotonic_s()), self._meet_deadline)

    def watch_queue(self) -> None:
        """Something waits, which it may not do for ever."""
        if self._queue_timeout_s and "queue" not in self._timers:
            self._timers.start("queue", self._queue_timeout_s, self._expire_queued)

    def let_go(self) -> None:
        """The batch is forgotten: see RunningBatch."""
        self._timers.stop_all()
        self._queued, self._expire, self._on_deadline = list, lambda _indexes, _error: None, lambda _error: None

    def _meet_deadline(self) -> None:
        self._on_deadline(BatchDeadlineError("the batch's deadline has passed"))

    def _expire_queued(self) -> None:
        """Keeps the queue_timeout of items that no driver has yet."""
        now_ns = self._clock.time_ns()
        waited_s = {index: (now_ns - accepted_ns) / 1e9 for index, accepted_ns in self._queued()}
        late = [index for index, seconds in waited_s.items() if seconds >= self._queue_timeout_s]
        in_time = [seconds for seconds in waited_s.values() if seconds < self._queue_timeout_s]
        if in_time:
            # Before the others end: the batch may end with them, and its timers.
            self._timers.start("queue", self._queue_timeout_s - max(in_time), self._expire_queued)
        self._expire(late, QueueTimeoutError("had not been answered anything in time (queue_timeout)"))
