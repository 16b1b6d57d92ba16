"""Files that callers hand in and get back, and batches that are made of one: values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from unisono.core.durable import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file that is kept. Moments are nanoseconds since 1970."""

    file_id: str
    # What it is for: "batch", or "batch_output".
    purpose: str
    # The caller's name for it; nothing is ever opened by it.
    filename: str
    size_bytes: int
    created_ns: int
    # It is deleted then; None: when somebody asks for it.
    expires_ns: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LineError:
    """Why a file is no batch."""

    # A name for programs.
    code: str
    message: str
    # From 1; None: it is about the whole file.
    line: int | None = None
    # The field at fault.
    param: str | None = None


class FileBatchState(Enum):
    """How a batch that was made of a file ended, or that it has not."""

    OPEN = "open"
    # The file was no batch.
    FAILED = "failed"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileBatch:
    """A batch whose items are the lines of a file, and whose results become files.

    While it is open, the kept batch of the same id says how it stands; there is none before the file was checked.
    Moments are nanoseconds since 1970.
    """

    batch_id: str
    input_file_id: str
    # Whom its lines ask: "/v1/chat/completions".
    endpoint: str
    # As the caller wrote it: "24h"; and when it is over.
    window: str
    expires_ns: int
    created_ns: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    # How long the files of its results are kept, in seconds; None: as long as the service keeps batches.
    output_keep_s: int | None = None
    state: FileBatchState = FileBatchState.OPEN
    # When somebody asked for its end.
    cancelling_ns: int | None = None
    # Once it has ended: when its file was checked, when its last item ended, and when its files were written.
    in_progress_ns: int | None = None
    finalizing_ns: int | None = None
    ended_ns: int | None = None
    # It is forgotten then.
    keep_until_ns: int | None = None
    # Of a file that is no batch.
    errors: tuple[LineError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    # Once it has ended: how its items did; and the prompt tokens that the backend had computed before.
    tally: Tally | None = None
    cached_tokens: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing happens to it any more."""
        return self.state is not FileBatchState.OPEN
