"""What of the journal's room is kept for the results of what was accepted: no new items may take it.

Theory of operation. After new items were written, and before that is committed, it is seen what room is left: free
pages of the file, and how far it may still grow. There must be some for each item that has not ended, so that each
can have a result, or at least be cancelled, and some for the changes of batches. Otherwise all of it is taken back.
Results are refused nothing, and deleting neither, which needs next to none.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

from unisono.adapters.journal import store
from unisono.core.errors import LimitExceededError

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Connection

# For each item that has not ended: several times what its result has without an answer, index and all.
RESULT_BYTES: Final = 1024
# For all else so much, or this share of what the file may have, whichever is less.
_SPARE_BYTES: Final = 32 * 1024 * 1024
_SPARE_SHARE: Final = 32
_RETRY_AFTER_S: Final = 5.0


class Reserve:
    """The reserve of one file. For the thread that writes to it."""

    def __init__(self, path: Path, *, max_bytes: int | None) -> None:
        """`max_bytes`: the file grows no larger; None: as far as the disk has room."""
        self._path = path
        self._max_bytes = max_bytes

    def check(self, connection: Connection) -> None:
        """Raises LimitExceededError where what this transaction has written leaves less than the reserve."""
        size, pages, free = (
            int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
            for name in ("page_size", "page_count", "freelist_count")
        )
        used = pages * size
        disk = shutil.disk_usage(self._path.parent)
        # What is still in the log in front of the file is to come into the file, too.
        growth = disk.free - max(0, used - self._path.stat().st_size)
        if self._max_bytes is not None:
            growth = min(growth, self._max_bytes - used)
        room = free * size + max(0, growth)
        spare = min(_SPARE_BYTES, (disk.total if self._max_bytes is None else self._max_bytes) // _SPARE_SHARE)
        items = store.open_items(connection)
        if room < spare + items * RESULT_BYTES:
            raise LimitExceededError(
                f"the journal's file has no room for this: with it, {room:,} bytes were left, and {spare:,} and "
                f"{RESULT_BYTES:,} for each of {items:,} items without a result are kept for results. Free some "
                "space on its disk, delete batches, send fewer items, or raise UNISONO_MAX_DATA_BYTES",
                metadata={"limit": "journal"},
                retry_after_s=_RETRY_AFTER_S,
            )
