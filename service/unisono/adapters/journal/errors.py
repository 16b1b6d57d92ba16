"""What can go wrong with the journal's file, as errors of the house: one table, and what to do about each."""

from __future__ import annotations

import sqlite3
from typing import Final

import msgspec
from sqlalchemy.exc import DatabaseError, DBAPIError, InternalError, OperationalError, SQLAlchemyError

from unisono.core.errors import InvalidRequestError, LimitExceededError, ShuttingDownError, UnisonoError

# After so many seconds, another try may help.
_RETRY_AFTER_S = 5.0
# SQLite's codes, without their extensions → what it cannot do, and what to do about it.
_CANNOT: Final = {
    sqlite3.SQLITE_FULL: "cannot grow: free some space on its disk, delete batches, or raise UNISONO_MAX_DATA_BYTES",
    sqlite3.SQLITE_BUSY: "is held by another program, such as a backup: let it end",
    sqlite3.SQLITE_LOCKED: "is held by another program, such as a backup: let it end",
    sqlite3.SQLITE_READONLY: "may not be written to: give the service its folder",
    sqlite3.SQLITE_PERM: "may not be written to: give the service its folder",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: see that its folder is there and belongs to the service",
    sqlite3.SQLITE_IOERR: "cannot be written to: see that its disk is well and has room",
}
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_PRIMARY = 0xFF


class JournalInUseError(UnisonoError):
    """Another service has this folder."""


class JournalFileError(UnisonoError):
    """The file cannot be used as it is: it is damaged, or of another version."""


class LeaseLostError(ShuttingDownError):
    """Another process runs the batch now."""


def code_of(error: BaseException) -> int | None:
    """SQLite's code for what went wrong first; None where it had no part in it.

    Where the disk is full, SQLite takes the whole transaction back by itself. What is tried next fails because there
    is none any more, which says nothing.
    """
    code: int | None = None
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, DBAPIError) and isinstance(found.orig, sqlite3.Error):
            # Errors that the driver itself finds have none.
            code = getattr(found.orig, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _PRIMARY
        found = found.__context__
    return code


def is_of_the_file(error: Exception) -> bool:
    """Whether the file or its connection is at fault, and not what was to be written."""
    if isinstance(error, DBAPIError):
        # Its subclasses are about values, but for these two.
        return isinstance(error, (OperationalError, InternalError)) or type(error) is DatabaseError
    return isinstance(error, SQLAlchemyError)


def words(error: BaseException) -> str:
    """What is wrong with the file and what to do, beginning with a verb."""
    code = code_of(error)
    if code in _DAMAGED:
        return "is damaged: put a backup in its place, or move it away to begin a new one"
    orig = error.orig if isinstance(error, DBAPIError) else error
    return _CANNOT.get(code or sqlite3.SQLITE_OK, f"cannot be used: {orig}")


def translated(error: BaseException, name: str = "the journal's file") -> BaseException:
    """The same as an error of the house; what is a defect of this service stays as it is."""
    if isinstance(error, msgspec.MsgspecError):
        return JournalFileError(f"{name} holds what this version cannot read: {error}")
    if isinstance(error, UnicodeEncodeError):
        return InvalidRequestError(f"half of a surrogate pair cannot be part of a name: {error}")
    if not isinstance(error, DBAPIError) or not is_of_the_file(error):
        return error
    text = f"{name} {words(error)}"
    if code_of(error) in _DAMAGED:
        return JournalFileError(text)
    return LimitExceededError(text, metadata={"limit": "journal"}, retry_after_s=_RETRY_AFTER_S)
