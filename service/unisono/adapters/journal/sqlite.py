"""The journal in a SQLite file: batches that outlive the process, and their events.

Theory of operation. `writer.py` writes on a thread of its own. An event that was appended is *visible* once it is in
the file, and never before: what a reader has seen is never taken back. Until then its bytes count as the batch's
`size_bytes`, so that a batch whose events cannot be written pauses.

The file is in WAL mode, in which readers and the writer do not wait for each other. Events are read in the event
loop: some at a time, by their key, out of a file that was just written. Whatever looks at more goes to a thread.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from msgspec import MsgspecError
from sqlalchemy import insert
from sqlalchemy.exc import DBAPIError

from unisono.adapters.journal import store, tables
from unisono.adapters.journal.doubts import Doubts
from unisono.adapters.journal.errors import translated
from unisono.adapters.journal.file import FILES_FOLDER, JOURNAL_FILE, open_engines, take_folder
from unisono.adapters.journal.files import SqliteFiles
from unisono.adapters.journal.reserve import Reserve
from unisono.adapters.journal.rows import count_in, event_row
from unisono.adapters.journal.submits import Submits
from unisono.adapters.journal.writer import Writer
from unisono.core.errors import SequenceOutOfRangeError
from unisono.core.events import weight

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
    from pathlib import Path

    from sqlalchemy import Connection

    from unisono.adapters.journal.writer import Pending
    from unisono.core.batch import BadItem
    from unisono.core.durable import KeptItem, NewBatch, Spent, StoredBatch
    from unisono.core.events import BatchState, Journalled, LastingEvent
    from unisono.core.model import Item, ItemState

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Open:
    """A batch that this process runs."""

    number: int
    # The last event that was appended, and the last that is in the file.
    last: int
    visible: int
    pending_bytes: int = 0
    on_visible: Callable[[], None] | None = None
    on_lost: Callable[[Exception], None] | None = None
    is_lost: bool = False
    # Nobody here has to do with it any more, but for what is still to be written.
    is_left: bool = False
    waiters: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to be waited for."""
        return self.is_lost or self.visible == self.last

    def wake(self) -> None:
        """Something was written, or never will be."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class SqliteJournal:
    """See `app.ports.Journal` and `app.stores.BatchStore`."""

    def __init__(
        self,
        folder: Path,
        *,
        keep_s: float,
        max_bytes: int | None = None,
        failpoint: Callable[[str], None] = lambda _place: None,
        report_lost: Callable[[str, Exception], None] = lambda _batch_id, _error: None,
        report_trouble: Callable[[str], None] = lambda _why: None,
    ) -> None:
        """`keep_s`: how long a batch is kept after its end. `max_bytes`: see `open_engines`.

        `report_lost`: told of each batch that cannot be written to any more, and why. `report_trouble`: told why
        nothing can be written for now, and by "" that it can again; from a thread of its own.
        """
        self._folder = folder
        self._keep_ns = round(keep_s * 1e9)
        self._max_bytes = max_bytes
        self._failpoint = failpoint
        self._report_lost = report_lost
        self._report_trouble = report_trouble
        self._open: dict[str, _Open] = {}
        self._ids: dict[int, str] = {}
        self._doubts = Doubts()
        self._reserve = Reserve(folder / JOURNAL_FILE, max_bytes=max_bytes)
        self._submits = Submits(self, self._doubts, self._reserve)

    async def start(self, now_ns: int) -> None:
        """Takes the folder; raises what `take_folder` and `open_engines` raise, and LimitExceededError."""
        self._lock = await asyncio.to_thread(take_folder, self._folder)
        try:
            path = self._folder / JOURNAL_FILE
            self._engine, self._reader = await asyncio.to_thread(open_engines, path, max_bytes=self._max_bytes)
        except BaseException:
            self._lock.close()
            raise
        self._writer = Writer(
            self._engine,
            on_written=self._written,
            on_lost=self._lost,
            on_trouble=self._report_trouble,
            failpoint=self._failpoint,
        )
        self._writer.start()
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        taken = insert(tables.leases).values(taken_ns=now_ns, holder=holder).returning(tables.leases.c.lease)
        try:
            self._writer.lease = await self._writer.call(lambda connection: connection.execute(taken).scalar_one())
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Writes what is left, and lets go of the folder. What cannot be written happens again, at the next start."""
        await self._writer.close()
        # Its last words may be on their way here.
        await asyncio.sleep(0)
        for batch in self._open.values():
            batch.is_lost = True
            batch.wake()
        await asyncio.to_thread(self._engine.dispose)
        await asyncio.to_thread(self._reader.dispose)
        self._lock.close()

    @property
    def trouble(self) -> str:
        """Why nothing can be written at this moment; empty: it can."""
        return self._writer.trouble

    # -- Events ------------------------------------------------------------------------------------------------

    def create(
        self, batch_id: str, on_visible: Callable[[], None], on_lost: Callable[[Exception], None] | None = None
    ) -> None:
        """This process runs the batch from now on: it was submitted here, or taken over. See the port."""
        known = self._open.get(batch_id)
        if known is None:
            with self._look() as connection:
                number, last = store.place_of(connection, batch_id)
            known = self._open[batch_id] = _Open(number, last, last)
            self._ids[number] = batch_id
        known.is_left, known.on_visible, known.on_lost = False, on_visible, on_lost

    def append(self, batch_id: str, event: LastingEvent, at_ns: int) -> None:
        """Adds an event with the next number; it is visible once it is in the file."""
        batch = self._open[batch_id]
        if batch.is_lost:
            return
        size = weight(event)
        row = event_row(batch.number, batch.last + 1, event, at_ns)
        self._writer.append(
            batch.number,
            batch.last,
            row,
            size,
            lambda changes: count_in(event, changes, at_ns, keep_ns=self._keep_ns),
        )
        batch.last += 1
        batch.pending_bytes += size

    def read(self, batch_id: str, after: int, limit: int) -> Sequence[Journalled]:
        """Up to `limit` visible events with numbers above `after`; raises as the port says."""
        known = self._open.get(batch_id)
        if known is not None and known.visible == after:
            return ()
        with self._look() as connection:
            number, last = (known.number, known.visible) if known else store.place_of(connection, batch_id)
            if after > last:
                raise SequenceOutOfRangeError(
                    f"batch {batch_id} has no event {after} yet; its last is {last}",
                    metadata={"batch_id": batch_id, "last": str(last)},
                )
            return store.events(connection, number, after=after, up_to=last, limit=limit)

    def last_sequence(self, batch_id: str) -> int:
        """The highest number that is visible."""
        known = self._open.get(batch_id)
        if known is not None:
            return known.visible
        with self._look() as connection:
            return store.place_of(connection, batch_id)[1]

    def is_settled(self, batch_id: str) -> bool:
        """Whether all that was appended is visible."""
        known = self._open.get(batch_id)
        return known is None or known.is_settled

    async def settle(self, batch_id: str) -> None:
        """Returns when all that was appended by now is visible, or never will be."""
        batch = self._open.get(batch_id)
        if batch is None:
            return
        last = batch.last
        while batch.visible < last and not batch.is_lost:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            batch.waiters.append(waiter)
            await waiter

    def size_bytes(self, batch_id: str) -> int:
        """Bytes that the events are charged for which are not in the file yet."""
        known = self._open.get(batch_id)
        return known.pending_bytes if known is not None else 0

    @property
    def can_prune(self) -> bool:
        """It does not: what counts is what could not be written yet."""
        return False

    def prune(self, batch_id: str, up_to: int) -> None:
        """Forgets nothing: what was seen may be asked for again until the batch is deleted."""

    def forget(self, batch_id: str) -> None:
        """This process does not run the batch any more; it stays in the file, and what was appended comes there."""
        known = self._open.get(batch_id)
        if known is not None:
            known.is_left, known.on_visible, known.on_lost = True, None, None
            self._drop_left(batch_id, known)

    def _drop_left(self, batch_id: str, batch: _Open) -> None:
        if batch.is_left and batch.is_settled:
            del self._open[batch_id], self._ids[batch.number]

    def _written(self, group: Mapping[int, Pending]) -> None:
        for number, pending in group.items():
            batch_id = self._ids.get(number, "")
            batch = self._open.get(batch_id)
            if batch is not None:
                batch.visible = pending.last
                batch.pending_bytes -= pending.size_bytes
                batch.wake()
                if batch.on_visible is not None:
                    batch.on_visible()
                self._drop_left(batch_id, batch)

    def _lost(self, number: int, error: Exception) -> None:
        batch_id = self._ids.get(number, "")
        batch = self._open.get(batch_id)
        if batch is not None and not batch.is_lost:
            batch.is_lost = True
            self._report_lost(batch_id, error)
            batch.wake()
            if batch.on_lost is not None:
                batch.on_lost(error)
            self._drop_left(batch_id, batch)

    # -- Batches -----------------------------------------------------------------------------------------------

    async def knows(self, new: NewBatch) -> bool:
        """Whether the same request made a batch before. See the port."""
        if not new.config.request_id:
            return False
        return await self._ask(lambda connection: store.of_request(connection, new) is not None)

    async def submit(
        self, new: NewBatch, items: Sequence[Item | BadItem], *, is_whole: bool
    ) -> tuple[StoredBatch, bool]:
        """Keeps a batch; answers when it is in the file: with the batch, and whether it is new. See the port."""
        return await self._submits.submit(new, items, is_whole=is_whole)

    async def submit_in_pages(
        self, new: NewBatch, pages: AsyncIterator[Sequence[Item | BadItem]]
    ) -> tuple[StoredBatch, bool]:
        """As `submit`, of items that come page by page. See the port."""
        return await self._submits.submit_in_pages(new, pages)

    async def add(self, batch_id: str, items: Sequence[Item | BadItem], *, first: int) -> None:
        """Keeps items that a stream adds, numbered from `first` on; answers when they are in the file."""

        def write(connection: Connection) -> None:
            number = store.own(connection, batch_id, self.lease)
            # What seemed to have failed may have been written; and what came later may have been written before.
            if items and not store.has_item(connection, number, first):
                store.put_items(connection, number, items, first=first)
                self._reserve.check(connection)

        await self.change(write)

    async def set(self, batch_id: str, **values: object) -> None:
        """Changes `is_input_closed`, `is_cancelling`, `started_ns`; answers when that is in the file."""
        await self.change(lambda connection: store.set_batch(connection, batch_id, values, self.lease))

    async def take_over(self) -> list[StoredBatch]:
        """All batches that have not ended: they are this process's from now on. The oldest first.

        One that cannot be read is reported, stays as it is, and costs no other.
        """
        found, unreadable = await self.change(lambda connection: store.take_over(connection, self.lease))
        for batch_id, error in unreadable.items():
            self._report_lost(batch_id, error)
        return found

    async def delete(self, batch_id: str) -> None:
        """Forgets a batch with all that belongs to it, also as a batch of a file; raises BatchNotFoundError.

        The files stay: they are things of their own.
        """
        if not await self.change(lambda connection: store.delete_batch(connection, batch_id)):
            raise store.not_found(batch_id)

    async def delete_old(self, now_ns: int) -> int:
        """Deletes what was kept for long enough, the oldest first; answers with how many batches.

        Not in one transaction: events are written in between.
        """
        deleted = 0
        while some := await self.change(lambda connection: store.delete_old(connection, now_ns)):
            deleted += some
        return deleted

    async def get(self, batch_id: str) -> StoredBatch:
        """How a batch stands; raises BatchNotFoundError."""
        return await self._ask(lambda connection: store.get_batch(connection, batch_id))

    async def page(
        self, *, after: int = 0, limit: int, states: Sequence[BatchState] = ()
    ) -> list[tuple[int, StoredBatch]]:
        """Up to `limit` batches, the newest first, each with its place; `after`: the place of the last one before."""
        return await self._ask(
            lambda connection: store.list_batches(connection, after=after, limit=limit, states=states)
        )

    async def results(
        self, batch_id: str, *, after: int, limit: int, states: Sequence[ItemState] = ()
    ) -> list[Journalled]:
        """Up to `limit` results with numbers above `after`, each behind its parts; raises BatchNotFoundError.

        Fewer where they are large, but more than a message holds.
        """

        def look(connection: Connection) -> list[Journalled]:
            number, _ = store.place_of(connection, batch_id)
            return store.results(connection, number, after=after, limit=limit, states=states)

        return await self._ask(look)

    async def items(
        self, batch_id: str, *, after: int, limit: int, states: Sequence[ItemState] = ()
    ) -> list[tuple[int, Item | BadItem]]:
        """Up to `limit` items with indexes above `after` (-1: all), each with its index. See the port."""

        def look(connection: Connection) -> list[tuple[int, Item | BadItem]]:
            number, _ = store.place_of(connection, batch_id)
            return store.items(connection, number, after=after, limit=limit, states=states)

        return await self._ask(look)

    async def spent(self, batch_id: str, now_ns: int) -> Spent:
        """What all items together took that have a result."""

        def look(connection: Connection) -> Spent:
            number, _ = store.place_of(connection, batch_id)
            return store.spent(connection, number, now_ns)

        return await self._ask(look)

    async def names(self, batch_id: str) -> list[KeptItem]:
        """All items, in their order, without what they ask."""

        def look(connection: Connection) -> list[KeptItem]:
            number, _ = store.place_of(connection, batch_id)
            return store.names(connection, number)

        return await self._ask(look)

    def files(self, *, max_bytes: int | None = None) -> SqliteFiles:
        """Files beside the journal's own, whose rows it writes. `max_bytes`: see Room."""
        return SqliteFiles(self._folder / FILES_FOLDER, change=self.change, ask=self._ask, max_bytes=max_bytes)

    @property
    def lease(self) -> int:
        """What names this process in the file."""
        return self._writer.lease

    async def call(self, work: Callable[[Connection], T]) -> T:
        """Does something in a transaction of its own, and nothing else with it."""
        return await self._writer.call(work)

    async def change(self, write: Callable[[Connection], T]) -> T:
        """Changes something in a transaction of its own; and deletes what nobody was told of."""

        def work(connection: Connection) -> tuple[T, list[str]]:
            # Those of this moment, and not of that at which the caller asked.
            doubtful = self._doubts.all()
            if doubtful:
                _ = store.delete_batches(connection, doubtful)
            return write(connection), doubtful

        found, deleted = await self._writer.call(work)
        self._doubts.settle(deleted)
        return found

    async def _ask(self, look: Callable[[Connection], T]) -> T:
        """Reads on a thread, in one transaction: what is read belongs together."""

        def ask() -> T:
            with self._look() as connection:
                return look(connection)

        return await asyncio.to_thread(ask)

    @contextmanager
    def _look(self) -> Generator[Connection]:
        """A connection to read, within one transaction."""
        try:
            with self._reader.connect() as connection:
                try:
                    yield connection
                except BaseException:
                    # A statement that was not read to its end stays open, and whoever gets the connection next would
                    # see the file as it was then, for ever.
                    connection.invalidate()
                    raise
        except (DBAPIError, MsgspecError) as error:
            raise translated(error) from error
