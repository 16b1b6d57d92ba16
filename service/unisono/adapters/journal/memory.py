"""A journal in this process's memory: gone with it, and bounded by what is charged for its events."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from unisono.core.errors import BatchNotFoundError, SequenceOutOfRangeError
from unisono.core.events import Journalled, weight

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unisono.core.events import LastingEvent


@dataclass(slots=True)
class _Pages:
    """The events of one batch; the number of the first is `pruned + 1`."""

    entries: deque[Journalled] = field(default_factory=deque)
    # The highest number that was forgotten, and the highest that was given.
    pruned: int = 0
    last: int = 0
    size_bytes: int = 0
    on_visible: Callable[[], None] = lambda: None


class MemoryJournal:
    """Keeps the events of batches until they are pruned or the batch is forgotten. See `app.ports.Journal`."""

    def __init__(self) -> None:
        self._batches: dict[str, _Pages] = {}

    def create(
        self, batch_id: str, on_visible: Callable[[], None], on_lost: Callable[[Exception], None] | None = None
    ) -> None:
        """Begins the journal of a batch, or goes on with it. Memory is never lost."""
        del on_lost
        self._batches.setdefault(batch_id, _Pages()).on_visible = on_visible

    def append(self, batch_id: str, event: LastingEvent, at_ns: int) -> None:
        """Adds an event and gives it the next number; it is visible at once."""
        pages = self._pages(batch_id)
        pages.last += 1
        pages.entries.append(Journalled(sequence=pages.last, at_ns=at_ns, event=event))
        pages.size_bytes += weight(event)
        pages.on_visible()

    def read(self, batch_id: str, after: int, limit: int) -> Sequence[Journalled]:
        """Up to `limit` events with numbers above `after`; raises as the port says."""
        pages = self._pages(batch_id)
        if after < pages.pruned:
            raise SequenceOutOfRangeError(
                f"events up to {pages.pruned} of batch {batch_id} are no longer kept; attach after {pages.pruned}",
                metadata={"batch_id": batch_id, "first_kept": str(pages.pruned + 1)},
            )
        if after > pages.last:
            raise SequenceOutOfRangeError(
                f"batch {batch_id} has no event {after} yet; its last is {pages.last}",
                metadata={"batch_id": batch_id, "last": str(pages.last)},
            )
        start = after - pages.pruned
        if start == len(pages.entries):
            return ()
        # A deque is slow in its middle; readers are near its end, or start at its beginning.
        if len(pages.entries) - start <= limit:
            tail = list(islice(reversed(pages.entries), len(pages.entries) - start))
            tail.reverse()
            return tail
        return list(islice(pages.entries, start, start + limit))

    def last_sequence(self, batch_id: str) -> int:
        """The highest number given; 0 for none."""
        return self._pages(batch_id).last

    def is_settled(self, batch_id: str) -> bool:
        """It always is."""
        del batch_id
        return True

    def size_bytes(self, batch_id: str) -> int:
        """Bytes that the kept events are charged for."""
        return self._pages(batch_id).size_bytes

    @property
    def can_prune(self) -> bool:
        """It does: memory is what there is."""
        return True

    def prune(self, batch_id: str, up_to: int) -> None:
        """Forgets events with numbers up to this one."""
        pages = self._pages(batch_id)
        while pages.entries and pages.entries[0].sequence <= up_to:
            entry = pages.entries.popleft()
            pages.pruned = entry.sequence
            pages.size_bytes -= weight(entry.event)

    def forget(self, batch_id: str) -> None:
        """Forgets the batch."""
        self._batches.pop(batch_id, None)

    def _pages(self, batch_id: str) -> _Pages:
        pages = self._batches.get(batch_id)
        if pages is None:
            raise BatchNotFoundError(f"there is no batch {batch_id!r}, or it is no longer kept")
        return pages
