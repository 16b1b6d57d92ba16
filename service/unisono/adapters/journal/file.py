"""The journal's file: whose it is, how it is opened, and how it becomes that of this version.

One process at a time may write to it. A lock on a file beside it says so, which the operating system takes back when
the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TextIO

from sqlalchemy import URL, create_engine, event, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from unisono.adapters.journal.errors import JournalFileError, JournalInUseError, translated

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from sqlalchemy import Connection, Engine

JOURNAL_FILE = "journal.sqlite3"
# Files that callers hand in and get back.
FILES_FOLDER = "files"
# The last step in migrations/versions.
NEWEST = "0003"
_LOCK_FILE = "journal.lock"
# The log in front of the file is cut back to so much after a checkpoint.
_LOG_BYTES = 64 * 1024 * 1024
# Waiting for a lock that another program holds, such as a backup, in seconds.
_BUSY_S = 5.0
# Connections for reading that are kept open.
_READERS = 5


def take_folder(folder: Path) -> TextIO:
    """Makes the folder, and keeps every other service out of it until the answer is closed.

    Raises JournalInUseError, and JournalFileError where the folder cannot be had.
    """
    with _folder_told(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / _LOCK_FILE).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _ = lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise JournalInUseError(
            f"another service{f' (process {holder})' if holder else ''} keeps its batches in {folder}: stop it, or "
            "set UNISONO_DATA_DIR to another folder"
        ) from None
    except OSError as error:
        lock.close()
        raise JournalFileError(
            f"no lock can be had in {folder}: {error.strerror}. Set UNISONO_DATA_DIR to a folder on a disk of this "
            "machine, or to none to keep no batches"
        ) from error
    with _folder_told(folder):
        _ = lock.truncate(0)
        _ = lock.write(f"{os.getpid()}\n")
        lock.flush()
    return lock


@contextmanager
def _folder_told(folder: Path) -> Generator[None]:
    """What the operating system refuses, with what to do about it."""
    try:
        yield
    except OSError as error:
        raise JournalFileError(
            f"batches cannot be kept in {folder}: {error.strerror}. Set UNISONO_DATA_DIR to a folder that this "
            "process may write to, or to none to keep none"
        ) from error


def open_engines(path: Path, *, max_bytes: int | None = None) -> tuple[Engine, Engine]:
    """Brings the file up to this version; answers with what writes to it, and what reads it.

    `max_bytes`: the file grows no larger; None: as far as the disk has room. Raises JournalFileError for a file that
    cannot be used as it is, and LimitExceededError for one that cannot be written to.
    """
    with _folder_told(path.parent):
        _keep_private(path)
    url = URL.create("sqlite", database=str(path))
    # Used by one thread at a time, though not by the one that made it.
    shared = {"check_same_thread": False, "timeout": _BUSY_S}
    # Errors come to the log, and what people asked and were answered does not.
    options: dict[str, Any] = {"connect_args": shared, "poolclass": QueuePool, "hide_parameters": True}
    writer = create_engine(url, **options, pool_size=1, max_overflow=0)
    # Nobody waits for a connection to read: least of all the event loop.
    reader = create_engine(url, **options, pool_size=_READERS, max_overflow=-1)

    @event.listens_for(writer, "connect")
    def _to_write(connection: sqlite3.Connection, _record: Any) -> None:
        # The driver is not to begin transactions by itself: see `_begin`.
        connection.isolation_level = None
        _ = connection.execute("PRAGMA journal_mode = WAL")
        # A commit returns when it is on the disk.
        _ = connection.execute("PRAGMA synchronous = FULL")
        _ = connection.execute("PRAGMA foreign_keys = ON")
        _ = connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        if max_bytes is not None:
            (page_size,) = connection.execute("PRAGMA page_size").fetchone()
            _ = connection.execute(f"PRAGMA max_page_count = {max(1, max_bytes // page_size)}")

    @event.listens_for(writer, "begin")
    def _begin(connection: Any) -> None:
        # At once the one that writes, so that nothing that was read can have changed by then.
        _ = connection.exec_driver_sql("BEGIN IMMEDIATE")

    @event.listens_for(reader, "connect")
    def _to_read(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None
        _ = connection.execute("PRAGMA query_only = ON")

    @event.listens_for(reader, "begin")
    def _begin_to_read(connection: Any) -> None:
        # What is read within one transaction belongs together.
        _ = connection.exec_driver_sql("BEGIN")

    try:
        migrate(writer, path)
    except BaseException:
        writer.dispose()
        raise
    # Its next owner is the writer's thread.
    return writer, reader


def _keep_private(path: Path) -> None:
    """Makes the file, for nobody else's eyes: it holds what people asked. SQLite's other files are made like it."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def migrate(engine: Engine, path: Path, *, to: str = "head") -> None:
    """Takes the file through the steps that it has not seen; or back to an older one, which is for tests.

    Raises as `open_engines` does.
    """
    try:
        with engine.connect() as connection:
            if to == "head" and _is_newest(connection):
                return
            _take_steps(connection, path, to)
            connection.commit()
    except DBAPIError as error:
        raise translated(error, f"the journal {path}") from error


def _is_newest(connection: Connection) -> bool:
    """Whether there is nothing to do: then alembic is not needed, whose import takes a tenth of the start."""
    if not inspect(connection).has_table("alembic_version"):
        return False
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == NEWEST


def _take_steps(connection: Connection, path: Path, to: str) -> None:
    from alembic import command  # noqa: PLC0415 - see `_is_newest`
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    config = Config()
    # A percent sign would begin a variable.
    folder = str(files("unisono.adapters.journal") / "migrations").replace("%", "%%")
    config.set_main_option("script_location", folder)
    config.attributes["connection"] = connection
    try:
        (command.upgrade if to == "head" else command.downgrade)(config, to)
    except CommandError as error:
        raise JournalFileError(
            f"the journal {path} was written by a newer version of Unisono ({error}): start that version, or set "
            "UNISONO_DATA_DIR to another folder"
        ) from error
