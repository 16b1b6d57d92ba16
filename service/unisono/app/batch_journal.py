"""One batch's part of the journal, and those who follow it.

Readers follow the journal and never hold the work back: a slow one delays only its own events. What bounds the
memory is the journal's limit in bytes: beyond it, what every reader was given is forgotten; if that is not enough (a
reader is slow, or there is none), the work pauses until it is.

What a reader was given may still be on its way when its connection is cut, and it will ask for it again. So the last
of it is kept, up to a quarter of the limit.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unisono.core.events import weight

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unisono.app.ports import Clock, Journal
    from unisono.core.events import Journalled, LastingEvent

# The share of the limit that is kept of what readers were given: what connections hold is a few megabytes.
_KEPT_SHARE = 4
# Events that are looked at together.
_PAGE = 64


@dataclass(slots=True, eq=False)
class Reader:
    """Somebody who follows a batch."""

    # Called when an event was written, and when an item (by index) spoke; must not raise or wait.
    on_event: Callable[[], None]
    on_speech: Callable[[int], None] | None = None
    # The last event that it was given.
    has_read: int = 0


class BatchJournal:
    """Writes a batch's events, lets readers follow, and keeps to a limit in bytes."""

    def __init__(
        self,
        journal: Journal,
        batch_id: str,
        clock: Clock,
        *,
        max_bytes: int,
        on_full: Callable[[], None],
        on_room: Callable[[], None],
        on_lost: Callable[[Exception], None],
    ) -> None:
        """`on_full` is told that the work must pause, and `on_room` that it may go on; `on_lost`: see the port."""
        self._journal = journal
        self._batch_id = batch_id
        self._clock = clock
        self._max_bytes = max_bytes
        self._on_full = on_full
        self._on_room = on_room
        self._readers: list[Reader] = []
        self._listeners: list[Reader] = []
        # The newest events that every reader was given, by number and weight, and their bytes together.
        self._given: deque[tuple[int, int]] = deque()
        self._given_bytes = 0
        self._pruned = 0
        self.is_full = False
        self._is_closed = False
        journal.create(batch_id, self._on_visible, on_lost)

    @property
    def size_bytes(self) -> int:
        """Bytes that the kept events are charged for."""
        return self._journal.size_bytes(self._batch_id)

    @property
    def last_sequence(self) -> int:
        """The number of the newest event."""
        return self._journal.last_sequence(self._batch_id)

    @property
    def has_readers(self) -> bool:
        """Whether anybody follows."""
        return bool(self._readers)

    @property
    def is_settled(self) -> bool:
        """Whether all that was written can be read."""
        return self._journal.is_settled(self._batch_id)

    def write(self, event: LastingEvent) -> None:
        """Adds an event; readers are told when they can read it."""
        if self._is_closed:
            return
        self._journal.append(self._batch_id, event, self._clock.time_ns())
        if self.size_bytes > self._max_bytes:
            self._relieve()

    def close(self) -> None:
        """What happens from now on happens to nobody's knowledge: another run of the batch will tell it."""
        self._is_closed = True
        for reader in self._readers:
            reader.on_event()

    def read(self, after: int, limit: int) -> Sequence[Journalled]:
        """Up to `limit` events with numbers above `after`; raises SequenceOutOfRangeError."""
        return self._journal.read(self._batch_id, after, limit)

    def spoke(self, index: int) -> None:
        """An item spoke: passed on to those who want to hear it."""
        for reader in self._listeners:
            if reader.on_speech is not None:
                reader.on_speech(index)

    def attach(self, reader: Reader) -> None:
        """Somebody follows from now on."""
        self._readers.append(reader)
        if reader.on_speech is not None:
            self._listeners.append(reader)

    def detach(self, reader: Reader) -> None:
        """That reader has gone."""
        self._readers.remove(reader)
        if reader in self._listeners:
            self._listeners.remove(reader)
        if self.is_full:
            self._relieve()

    def consumed(self, reader: Reader, sequence: int) -> None:
        """The reader was given all up to this event."""
        reader.has_read = sequence
        if self.is_full:
            self._relieve()

    def _on_visible(self) -> None:
        if self.is_full:
            self._relieve()
        for reader in self._readers:
            reader.on_event()

    def let_go(self) -> None:
        """The batch is forgotten: see RunningBatch."""
        self._on_full = self._on_room = lambda: None

    def _relieve(self) -> None:
        if self._readers and self._journal.can_prune:
            self._forget_given(min(reader.has_read for reader in self._readers))
        is_full = self.size_bytes > (self._max_bytes // 2 if self.is_full else self._max_bytes)
        if is_full != self.is_full:
            self.is_full = is_full
            (self._on_full if is_full else self._on_room)()

    def _forget_given(self, up_to: int) -> None:
        """Forgets what every reader was given, which is all up to this event, but for the newest of it."""
        # A reader that has come back is behind those that were here.
        while self._given and self._given[-1][0] > up_to:
            self._given_bytes -= self._given.pop()[1]
        counted = self._given[-1][0] if self._given else self._pruned
        while counted < up_to:
            for entry in self.read(counted, min(_PAGE, up_to - counted)):
                counted, size = entry.sequence, weight(entry.event)
                self._given.append((counted, size))
                self._given_bytes += size
        while self._given_bytes > self._max_bytes // _KEPT_SHARE:
            self._pruned, size = self._given.popleft()
            self._given_bytes -= size
        self._journal.prune(self._batch_id, self._pruned)
