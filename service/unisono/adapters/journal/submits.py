"""How a batch comes into the journal's file: at one time, or page by page; and the same request, sent again.

Theory of operation. What comes page by page is a *draft* until its last page is there: a batch that nobody finds,
and whose request's name is still free. Becoming a batch is one change. A draft that is given up goes with the next
change; one whose process ended goes when another takes over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from unisono.adapters.journal import store
from unisono.core.errors import InvalidRequestError, LimitExceededError, RequestIdReusedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from sqlalchemy import Connection

    from unisono.adapters.journal.doubts import Doubts
    from unisono.adapters.journal.reserve import Reserve
    from unisono.core.batch import BadItem
    from unisono.core.durable import NewBatch, StoredBatch
    from unisono.core.model import Item

T = TypeVar("T")


class JournalFile(Protocol):
    """What is needed of the journal."""

    @property
    def lease(self) -> int:
        """What names this process in the file."""
        ...

    async def change(self, write: Callable[[Connection], T]) -> T:
        """Changes something in a transaction of its own."""
        ...

    async def call(self, work: Callable[[Connection], T]) -> T:
        """The same, with nothing that happens beside it."""
        ...

    async def add(self, batch_id: str, items: Sequence[Item | BadItem], *, first: int) -> None:
        """Keeps items that are added."""
        ...


class Submits:
    """Brings batches into one file."""

    def __init__(self, file: JournalFile, doubts: Doubts, reserve: Reserve) -> None:
        self._file = file
        self._doubts = doubts
        self._reserve = reserve

    async def submit(
        self, new: NewBatch, items: Sequence[Item | BadItem], *, is_whole: bool
    ) -> tuple[StoredBatch, bool]:
        """Keeps a batch; answers when it is in the file: with the batch, and whether it is new."""

        def write(connection: Connection) -> tuple[StoredBatch, bool]:
            known = self._vouched(connection, new)
            if known is not None:
                return known, False
            store.put_batch(connection, new, items, self._file.lease, is_whole=is_whole)
            self._reserve.check(connection)
            return store.get_batch(connection, new.batch_id), True

        return await self._keep(new.batch_id, write, is_draft=False)

    async def submit_in_pages(
        self, new: NewBatch, pages: AsyncIterator[Sequence[Item | BadItem]]
    ) -> tuple[StoredBatch, bool]:
        """As `submit`, of items that come page by page. See the port."""

        def begin(connection: Connection) -> StoredBatch | None:
            known = self._vouched(connection, new)
            if known is None:
                store.put_draft(connection, new, self._file.lease)
                self._reserve.check(connection)
            return known

        def finish(connection: Connection) -> tuple[StoredBatch, bool]:
            # The same request may have come again meanwhile.
            known = self._vouched(connection, new)
            if known is not None:
                _ = store.delete_batches(connection, [new.batch_id])
                return known, False
            store.finish_draft(connection, new, self._file.lease)
            return store.get_batch(connection, new.batch_id), True

        try:
            known = await self._file.change(begin)
            if known is not None:
                return known, False
            count = 0
            async for items in pages:
                await self._file.add(new.batch_id, items, first=count)
                count += len(items)
        except BaseException:
            # What is there of it goes with the next change.
            self._doubts.begin(new.batch_id)
            self._doubts.end(new.batch_id, is_doubtful=True)
            raise
        return await self._keep(new.batch_id, finish, is_draft=True)

    async def _keep(
        self, batch_id: str, write: Callable[[Connection], tuple[StoredBatch, bool]], *, is_draft: bool
    ) -> tuple[StoredBatch, bool]:
        """The change after which a batch can be found. `is_draft`: where it fails, something of it is there."""
        is_doubtful = True
        self._doubts.begin(batch_id)
        try:
            try:
                done = await self._file.change(write)
            except LimitExceededError:
                # It may have been kept all the same.
                found = await self._file.call(lambda connection: store.find_batch(connection, batch_id))
                is_doubtful = found is None and is_draft
                if found is None:
                    raise
                return found, True
            is_doubtful = False
            return done
        except (RequestIdReusedError, InvalidRequestError):
            is_doubtful = is_draft
            raise
        finally:
            self._doubts.end(batch_id, is_doubtful=is_doubtful)

    def _vouched(self, connection: Connection, new: NewBatch) -> StoredBatch | None:
        """The batch that the same request made before, unless nobody was told of that, and it goes."""
        known = store.of_request(connection, new)
        if known is None or self._doubts.vouch(known.batch_id):
            return known
        _ = store.delete_batches(connection, [known.batch_id])
        return None
