"""Files beside the journal's file, and what it knows of them and of the batches that are made of them.

Theory of operation. A file has a name of ours, which is checked before anything is opened, and lies in one folder. It
is written under another name (`….part`), brought to the disk, and renamed; then its row is written, and only from
then on can it be found. Its row goes before it does. So a file without a row is one that nobody knows: it is deleted
at the next start. The rows are written by the journal's own writer.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
from dataclasses import fields
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol, TypeVar

import msgspec
from sqlalchemy import delete, func, insert, select, update

from unisono.adapters.journal import codec, tables
from unisono.adapters.journal.room import Room
from unisono.core.durable import Tally
from unisono.core.errors import LimitExceededError
from unisono.core.files import FileBatch, FileBatchState, LineError, StoredFile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from sqlalchemy import Connection, Row

    from unisono.app.stores import FileDraft

T = TypeVar("T")

_ID: Final = re.compile(r"file-[0-9a-f]{24}")
_PART: Final = ".part"
_RETRY_AFTER_S: Final = 5.0
_NOT_WRITTEN: Final = "this draft is not written any more"
_files, _batches = tables.files.c, tables.file_batches.c
_FILE_COLUMNS: Final = tuple(one.name for one in fields(StoredFile))


class Statements(Protocol):
    """Runs what is given to it in a transaction, on a thread."""

    def __call__(self, work: Callable[[Connection], T], /) -> Awaitable[T]:
        """Answers when it is done; raises LimitExceededError where it cannot be."""
        ...


class Draft:
    """See `app.ports.FileDraft`."""

    def __init__(self, folder: Path, file_id: str, room: Room, *, is_result: bool) -> None:
        self._folder = folder
        self._room = room
        self._is_result = is_result
        self.file_id = file_id
        self.size_bytes = 0
        self._path = folder / f"{file_id}{_PART}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._file: BinaryIO | None = os.fdopen(os.open(self._path, flags, 0o600), "wb", buffering=0)
        except OSError as error:
            raise _no_room(error) from error

    async def write(self, data: bytes) -> None:
        """Adds something."""
        await asyncio.to_thread(self._write, data)
        self.size_bytes += len(data)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise ValueError(_NOT_WRITTEN)
        self._room.write(self.file_id, len(data), is_result=self._is_result)
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise _no_room(error) from error

    def settle(self) -> None:
        """Brings it to the disk, under its own name; on a thread. Once: what follows may take it away again."""
        if self._file is None:
            raise ValueError(_NOT_WRITTEN)
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            _ = self._path.rename(self._folder / self.file_id)
            self._file = None
            _sync(self._folder)
        except OSError as error:
            raise _no_room(error) from error

    async def discard(self) -> None:
        """It is not wanted."""
        await asyncio.to_thread(self._discard)

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._path.unlink(missing_ok=True)
        self._room.settle(self.file_id)


class SqliteFiles:
    """See `app.stores.FileStore`."""

    def __init__(self, folder: Path, *, change: Statements, ask: Statements, max_bytes: int | None = None) -> None:
        """`change` writes to the journal's file, `ask` reads it. `max_bytes`: see Room."""
        self._folder = folder
        self._room = Room(folder, max_bytes=max_bytes)
        self._change = change
        self._ask = ask

    async def start(self) -> None:
        """Makes the folder, and deletes what nobody knows."""
        known = await self._ask(lambda connection: set(connection.execute(select(_files.file_id)).scalars()))
        await asyncio.to_thread(self._tidy, known)
        await self._count()

    async def _count(self) -> None:
        """How many bytes are kept is counted anew."""
        wanted = select(func.coalesce(func.sum(_files.size_bytes), 0))
        self._room.count(await self._ask(lambda connection: connection.execute(wanted).scalar_one()))

    def _tidy(self, known: set[str]) -> None:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            _sync(self._folder.parent)
            for path in self._folder.iterdir():
                name = path.name.removesuffix(_PART)
                # What is not ours stays.
                if _ID.fullmatch(name) and path.name not in known:
                    path.unlink()
        except OSError as error:
            raise _no_room(error) from error

    # -- Files -------------------------------------------------------------------------------------------------

    async def draft(self, *, is_result: bool = False) -> Draft:
        """A new file, still empty. See the port."""
        file_id = f"file-{secrets.token_hex(12)}"
        return await asyncio.to_thread(Draft, self._folder, file_id, self._room, is_result=is_result)

    async def keep(self, draft: FileDraft, file: StoredFile) -> None:
        """The draft is a file from now on."""

        def work(connection: Connection) -> bool:
            _put(connection, file)
            return True

        await self._write([draft], work)

    async def find(self, file_id: str) -> StoredFile | None:
        """A file; None: there is none of that id."""
        return await self._ask(lambda connection: _find(connection, file_id))

    async def page(
        self, *, after: str, limit: int, purpose: str = "", is_oldest_first: bool = False
    ) -> list[StoredFile] | None:
        """See the port."""

        def look(connection: Connection) -> list[StoredFile] | None:
            wanted = select(tables.files).order_by(_files.number if is_oldest_first else _files.number.desc())
            if after:
                place = connection.execute(select(_files.number).where(_files.file_id == after)).scalar_one_or_none()
                if place is None:
                    return None
                wanted = wanted.where(_files.number > place if is_oldest_first else _files.number < place)
            if purpose:
                wanted = wanted.where(_files.purpose == purpose)
            return [_file(row) for row in connection.execute(wanted.limit(limit))]

        return await self._ask(look)

    async def open(self, file_id: str) -> BinaryIO | None:
        """What a file holds; None: there is none of that id."""
        if await self.find(file_id) is None:
            return None
        return await asyncio.to_thread(self._open, file_id)

    def _open(self, file_id: str) -> BinaryIO | None:
        if not _ID.fullmatch(file_id):
            raise ValueError(f"{file_id!r} is not the name of a file")
        try:
            return os.fdopen(os.open(self._folder / file_id, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
        except FileNotFoundError:
            # It was deleted just now.
            return None

    async def delete(self, file_id: str) -> bool:
        """Forgets a file; whether there was one."""
        wanted = delete(tables.files).where(_files.file_id == file_id)
        was_there = await self._change(lambda connection: connection.execute(wanted).rowcount > 0)
        if was_there:
            await self._unlink([file_id])
            await self._count()
        return was_there

    async def delete_old(self, now_ns: int) -> None:
        """Forgets files and batches whose time is over."""

        def work(connection: Connection) -> list[str]:
            _ = connection.execute(delete(tables.file_batches).where(_batches.keep_until_ns <= now_ns))
            gone = delete(tables.files).where(_files.expires_ns <= now_ns).returning(_files.file_id)
            return list(connection.execute(gone).scalars())

        gone = await self._change(work)
        if gone:
            await self._unlink(gone)
            await self._count()

    async def _unlink(self, file_ids: Sequence[str]) -> None:
        paths = [self._folder / file_id for file_id in file_ids if _ID.fullmatch(file_id)]
        await asyncio.to_thread(_unlink, paths)

    async def _write(self, drafts: Sequence[FileDraft], work: Callable[[Connection], bool]) -> None:
        """Drafts become files, and `work` says so in the journal; where it does not, they are gone."""
        is_written = False
        names = [draft.file_id for draft in drafts]
        try:
            for draft in drafts:
                if not isinstance(draft, Draft):
                    raise TypeError("a draft is kept where it was made")
                await asyncio.to_thread(draft.settle)
            is_written = await self._change(work)
        except LimitExceededError:
            # It may have been written all the same; where nobody can tell, the next start sees to them.
            wanted = select(_files.file_id).where(_files.file_id.in_(names))
            known = await self._ask(lambda connection: set(connection.execute(wanted).scalars()))
            await self._unlink([name for name in names if name not in known])
            raise
        finally:
            await self._count()
            for name in names:
                self._room.settle(name)
        if not is_written:
            await self._unlink(names)

    # -- Batches -----------------------------------------------------------------------------------------------

    async def put_batch(self, batch: FileBatch) -> None:
        """Keeps a batch that is new."""
        row = insert(tables.file_batches).values(_batch_row(batch))
        _ = await self._change(lambda connection: connection.execute(row).rowcount)

    async def find_batch(self, batch_id: str) -> FileBatch | None:
        """A batch; None: none of that id was made of a file."""
        wanted = select(tables.file_batches).where(_batches.batch_id == batch_id)

        def look(connection: Connection) -> FileBatch | None:
            row = connection.execute(wanted).one_or_none()
            return None if row is None else _batch(row)

        return await self._ask(look)

    async def page_batches(self, *, after: str, limit: int) -> list[FileBatch] | None:
        """See the port."""

        def look(connection: Connection) -> list[FileBatch] | None:
            wanted = select(tables.file_batches).order_by(_batches.number.desc()).limit(limit)
            if after:
                named = select(_batches.number).where(_batches.batch_id == after)
                place = connection.execute(named).scalar_one_or_none()
                if place is None:
                    return None
                wanted = wanted.where(_batches.number < place)
            return [_batch(row) for row in connection.execute(wanted)]

        return await self._ask(look)

    async def open_batches(self) -> list[FileBatch]:
        """Those that have not ended, the oldest first."""
        wanted = select(tables.file_batches).where(_is_open).order_by(_batches.number)
        return await self._ask(lambda connection: [_batch(row) for row in connection.execute(wanted)])

    async def set_cancelling(self, batch_id: str, at_ns: int) -> None:
        """Somebody wants an open batch to end."""
        changed = (
            update(tables.file_batches)
            .where(_batches.batch_id == batch_id, _is_open, _batches.cancelling_ns.is_(None))
            .values(cancelling_ns=at_ns)
        )
        _ = await self._change(lambda connection: connection.execute(changed).rowcount)

    async def end_batch(self, batch: FileBatch, kept: Sequence[tuple[FileDraft, StoredFile]]) -> None:
        """A batch has ended as it says, and these are its files."""

        def work(connection: Connection) -> bool:
            changed = update(tables.file_batches).where(_batches.batch_id == batch.batch_id, _is_open)
            if not connection.execute(changed.values(_batch_row(batch))).rowcount:
                # It was written before, though that seemed to have failed.
                return False
            for _, file in kept:
                _put(connection, file)
            return True

        await self._write([draft for draft, _ in kept], work)


_is_open = _batches.state == FileBatchState.OPEN.value


def _put(connection: Connection, file: StoredFile) -> None:
    if _find(connection, file.file_id) is None:
        row = {name: getattr(file, name) for name in _FILE_COLUMNS}
        _ = connection.execute(insert(tables.files).values(row))


def _find(connection: Connection, file_id: str) -> StoredFile | None:
    row = connection.execute(select(tables.files).where(_files.file_id == file_id)).one_or_none()
    return None if row is None else _file(row)


def _file(row: Row[Any]) -> StoredFile:
    return StoredFile(**{name: getattr(row, name) for name in _FILE_COLUMNS})


_PLAIN_COLUMNS: Final = tuple(
    one.name for one in fields(FileBatch) if one.name not in {"metadata", "state", "errors", "tally"}
)


def _batch_row(batch: FileBatch) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in _PLAIN_COLUMNS} | {
        "metadata": codec.pack_texts(dict(batch.metadata)),
        "state": batch.state.value,
        "errors": msgspec.msgpack.encode(batch.errors),
        "tally": None if batch.tally is None else msgspec.msgpack.encode(batch.tally),
    }


def _batch(row: Row[Any]) -> FileBatch:
    return FileBatch(
        metadata=codec.unpack_texts(row.metadata),
        state=FileBatchState(row.state),
        errors=msgspec.msgpack.decode(row.errors, type=tuple[LineError, ...]),
        tally=None if row.tally is None else msgspec.msgpack.decode(row.tally, type=Tally),
        **{name: getattr(row, name) for name in _PLAIN_COLUMNS},
    )


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """A new name is on the disk too."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _no_room(error: OSError) -> LimitExceededError:
    """What is wrong with the folder, and what to do."""
    remedy = {
        errno.ENOSPC: "free some space on its disk, or delete files",
        errno.EDQUOT: "free some of the user's space, or delete files",
        errno.EACCES: "give the service its folder",
        errno.EROFS: "give the service a folder that can be written to",
    }.get(error.errno or 0, "see that its disk is well and has room")
    what = error.strerror or type(error).__name__
    return LimitExceededError(
        f"the folder of files in UNISONO_DATA_DIR cannot be written to ({what}): {remedy}",
        metadata={"limit": "files"},
        retry_after_s=_RETRY_AFTER_S,
    )
