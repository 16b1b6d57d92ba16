"""How many bytes files have together, and whether an upload may have some more.

Theory of operation. What is kept is counted by the journal, what is being written by its pieces. Before a piece of an
upload is written, it is seen whether all together stay below the limit, and whether the disk keeps something in
reserve: for the journal, and for files of results. These are refused nothing: what they are made of is paid for, and
is in the journal already, so that they may go beyond the limit; then no upload is taken before there is room again.
"""

from __future__ import annotations

import shutil
import threading
from typing import TYPE_CHECKING, Final

from unisono.core.errors import LimitExceededError

if TYPE_CHECKING:
    from pathlib import Path

# Uploads leave so much of the disk free, or this share of it, whichever is less.
SPARE_BYTES: Final = 256 * 1024 * 1024
_SPARE_SHARE: Final = 20
_RETRY_AFTER_S: Final = 30.0
# What the error says is at its limit.
LIMIT: Final = "max_files_bytes"


class Room:
    """The room for the files of one folder. For any thread."""

    def __init__(self, folder: Path, *, max_bytes: int | None) -> None:
        """`max_bytes`: of all files together; None: as many as the disk has room for."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept_bytes = 0
        # Files that are being written, and their bytes so far.
        self._drafts: dict[str, int] = {}

    def count(self, kept_bytes: int) -> None:
        """So many bytes are kept."""
        with self._lock:
            self._kept_bytes = kept_bytes

    def write(self, file_id: str, size_bytes: int, *, is_result: bool) -> None:
        """A draft is about to have more; raises LimitExceededError where that is an upload and there is no room."""
        with self._lock:
            used = self._kept_bytes + sum(self._drafts.values())
            if not is_result:
                self._refuse(used, size_bytes)
            self._drafts[file_id] = self._drafts.get(file_id, 0) + size_bytes

    def settle(self, file_id: str) -> None:
        """It is a draft no more: it is counted among what is kept, or gone."""
        with self._lock:
            _ = self._drafts.pop(file_id, None)

    def _refuse(self, used: int, more: int) -> None:
        what = ""
        if self._max_bytes is not None and used + more > self._max_bytes:
            what = (
                f"Files, results among them, have {used:,} bytes together, and at most {self._max_bytes:,} may be "
                "kept (UNISONO_MAX_FILES_BYTES): delete files that are not needed, or send a smaller one."
            )
        else:
            disk = shutil.disk_usage(self._folder)
            spare = min(SPARE_BYTES, disk.total // _SPARE_SHARE)
            if disk.free - more < spare:
                what = (
                    f"The disk of UNISONO_DATA_DIR has {disk.free:,} bytes left, of which {spare:,} are kept for "
                    "results: delete files that are not needed, or free some space."
                )
        if what:
            raise LimitExceededError(what, metadata={"limit": LIMIT}, retry_after_s=_RETRY_AFTER_S)
