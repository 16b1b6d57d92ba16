"""One batch's part of the journal, and those who follow it.

Readers follow the journal and never hold the work back: a slow one delays only its own events. What bounds the memory
is the journal's limit in bytes: beyond it, what every reader has is forgotten; if that is not enough (a reader is
slow, or there is none), the work pauses until it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unisono.app.ports import Clock, Journal
    from unisono.core.events import Journalled, LastingEvent


@dataclass(slots=True, eq=False)
class Reader:
    """Somebody who follows a batch."""

    # Called when an event was written, and when an item (by index) spoke; must not raise or wait.
    on_event: Callable[[], None]
    on_speech: Callable[[int], None] | None = None
    # The last event that it needs no more.
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
    ) -> None:
        """`on_full` is told that the work must pause, and `on_room` that it may go on."""
        self._journal = journal
        self._batch_id = batch_id
        self._clock = clock
        self._max_bytes = max_bytes
        self._on_full = on_full
        self._on_room = on_room
        self._readers: list[Reader] = []
        self._listeners: list[Reader] = []
        self.is_full = False
        journal.create(batch_id)

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

    def write(self, event: LastingEvent) -> None:
        """Adds an event, and tells the readers."""
        self._journal.append(self._batch_id, event, self._clock.time_ns())
        if self.size_bytes > self._max_bytes:
            self._relieve()
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
        """The reader needs nothing up to this event any more."""
        reader.has_read = sequence
        if self.is_full:
            self._relieve()

    def _relieve(self) -> None:
        if self._readers:
            self._journal.prune(self._batch_id, min(reader.has_read for reader in self._readers))
        is_full = self.size_bytes > (self._max_bytes // 2 if self.is_full else self._max_bytes)
        if is_full != self.is_full:
            self.is_full = is_full
            (self._on_full if is_full else self._on_room)()
