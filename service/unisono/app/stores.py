"""What the application needs of a disk: batches that are kept, and files.

Ports as those of `ports.py`; every implementation passes the same contract tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Protocol

from unisono.app.ports import Journal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from unisono.core.batch import BadItem
    from unisono.core.durable import KeptItem, NewBatch, Spent, StoredBatch
    from unisono.core.events import BatchState, Journalled
    from unisono.core.files import FileBatch, StoredFile
    from unisono.core.model import Item, ItemState


class BatchStore(Journal, Protocol):
    """A journal that outlives the process, with the batches and items that its events are about.

    Each change is in the file when the call returns. Raises LimitExceededError where nothing can be written.
    """

    @property
    def trouble(self) -> str:
        """Why nothing can be written at this moment; empty: it can."""
        ...

    async def settle(self, batch_id: str) -> None:
        """Returns when all that was appended by now is visible, or never will be."""
        ...

    async def knows(self, new: NewBatch) -> bool:
        """Whether the same request made a batch before; raises RequestIdReusedError."""
        ...

    async def submit(
        self, new: NewBatch, items: Sequence[Item | BadItem], *, is_whole: bool
    ) -> tuple[StoredBatch, bool]:
        """Keeps a batch with its `Accepted` event, or finds the one of the same request; and whether it is new.

        Items are numbered as they stand; `is_whole`: no more will come. Raises RequestIdReusedError.
        """
        ...

    async def submit_in_pages(
        self, new: NewBatch, pages: AsyncIterator[Sequence[Item | BadItem]]
    ) -> tuple[StoredBatch, bool]:
        """As `submit`, of items that come page by page, and no more after the last.

        Nobody finds the batch before all are there. Raises what `pages` raises, too; then there is no batch.
        """
        ...

    async def add(self, batch_id: str, items: Sequence[Item | BadItem], *, first: int) -> None:
        """Keeps items that are added, numbered from `first` on."""
        ...

    async def set(self, batch_id: str, **values: object) -> None:
        """Changes `is_input_closed`, `is_cancelling` or `started_ns`; raises BatchNotFoundError."""
        ...

    async def take_over(self) -> list[StoredBatch]:
        """All batches that have not ended: they are this process's from now on. The oldest first."""
        ...

    async def delete(self, batch_id: str) -> None:
        """Forgets a batch with all that belongs to it; raises BatchNotFoundError."""
        ...

    async def delete_old(self, now_ns: int) -> int:
        """Deletes what was kept for long enough; answers with how many batches."""
        ...

    async def get(self, batch_id: str) -> StoredBatch:
        """How a batch stands; raises BatchNotFoundError."""
        ...

    async def page(
        self, *, after: int = 0, limit: int, states: Sequence[BatchState] = ()
    ) -> list[tuple[int, StoredBatch]]:
        """Up to `limit` batches, the newest first, each with its place; `after`: the place of the last one before."""
        ...

    async def results(
        self, batch_id: str, *, after: int, limit: int, states: Sequence[ItemState] = ()
    ) -> list[Journalled]:
        """Up to `limit` results with numbers above `after`, each behind its parts; raises BatchNotFoundError."""
        ...

    async def items(
        self, batch_id: str, *, after: int, limit: int, states: Sequence[ItemState] = ()
    ) -> list[tuple[int, Item | BadItem]]:
        """Up to `limit` items with indexes above `after` (-1: all), each with its index; fewer where they are large.

        Those that ended so; without states those that have not ended.
        """
        ...

    async def spent(self, batch_id: str, now_ns: int) -> Spent:
        """What all items together took that have a result."""
        ...

    async def names(self, batch_id: str) -> list[KeptItem]:
        """All items, in their order, without what they ask."""
        ...


class FileDraft(Protocol):
    """A file that is being written, and that nobody can find yet."""

    @property
    def file_id(self) -> str:
        """The name that it will have."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes that were written so far."""
        ...

    async def write(self, data: bytes) -> None:
        """Adds something; raises LimitExceededError where there is no room."""
        ...

    async def discard(self) -> None:
        """It is not wanted; nothing where it was kept."""
        ...


class FileStore(Protocol):
    """Files, and the batches that are made of them. What is kept outlives the process.

    Files are named by ids of the store's own; no name that a caller chose is ever opened. Each change is on the disk
    when the call returns. Raises LimitExceededError where nothing can be written.
    """

    async def start(self) -> None:
        """Forgets what a process that ended had begun to write."""
        ...

    async def draft(self, *, is_result: bool = False) -> FileDraft:
        """A new file, still empty. `is_result`: it is written though there is no room for uploads."""
        ...

    async def keep(self, draft: FileDraft, file: StoredFile) -> None:
        """The draft is a file from now on, and has all of its bytes."""
        ...

    async def find(self, file_id: str) -> StoredFile | None:
        """A file; None: there is none of that id."""
        ...

    async def page(
        self, *, after: str, limit: int, purpose: str = "", is_oldest_first: bool = False
    ) -> list[StoredFile] | None:
        """Up to `limit` files behind `after`, which is an id, or empty; None: there is none of that id."""
        ...

    async def open(self, file_id: str) -> BinaryIO | None:
        """What a file holds, to be read and closed on threads; None: there is none of that id."""
        ...

    async def delete(self, file_id: str) -> bool:
        """Forgets a file; whether there was one."""
        ...

    async def delete_old(self, now_ns: int) -> None:
        """Forgets files and batches whose time is over."""
        ...

    async def put_batch(self, batch: FileBatch) -> None:
        """Keeps a batch that is new."""
        ...

    async def find_batch(self, batch_id: str) -> FileBatch | None:
        """A batch; None: none of that id was made of a file."""
        ...

    async def page_batches(self, *, after: str, limit: int) -> list[FileBatch] | None:
        """Up to `limit` batches, the newest first, as `page`."""
        ...

    async def open_batches(self) -> list[FileBatch]:
        """Those that have not ended, the oldest first."""
        ...

    async def set_cancelling(self, batch_id: str, at_ns: int) -> None:
        """Somebody wants an open batch to end; the first time counts."""
        ...

    async def end_batch(self, batch: FileBatch, kept: Sequence[tuple[FileDraft, StoredFile]]) -> None:
        """A batch has ended as it says, and these are its files: all of it at one time, or nothing."""
        ...
