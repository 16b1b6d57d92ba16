"""Batches of which nobody can say whether they are kept: their submit failed, or its caller went away meanwhile.

Theory of operation. Their callers were not told that they are kept, so nobody runs them, and they are deleted with
the next change. But the same request may have been sent again meanwhile, and have found the batch: then somebody was
told of it, and it stays. The two happen on different threads, and whichever comes first counts.
"""

from __future__ import annotations

import threading


class Doubts:
    """Which batches are doubtful, and which submits may leave one behind. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._doubtful: set[str] = set()
        # Submits that have not been answered, and whether another one has found their batch.
        self._found: dict[str, bool] = {}

    def begin(self, batch_id: str) -> None:
        """A submit begins."""
        with self._lock:
            self._found[batch_id] = False

    def end(self, batch_id: str, *, is_doubtful: bool = False) -> None:
        """It ended: whoever asked was told how, or is gone and it may have been kept."""
        with self._lock:
            if not self._found.pop(batch_id) and is_doubtful:
                self._doubtful.add(batch_id)

    def vouch(self, batch_id: str) -> bool:
        """Another submit has found the batch: whether its caller may be told of it."""
        with self._lock:
            if batch_id in self._found:
                self._found[batch_id] = True
            return batch_id not in self._doubtful

    def all(self) -> list[str]:
        """Those that are to be deleted."""
        with self._lock:
            return sorted(self._doubtful)

    def settle(self, batch_ids: list[str]) -> None:
        """These are deleted."""
        with self._lock:
            self._doubtful.difference_update(batch_ids)
