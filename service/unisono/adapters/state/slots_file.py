"""Slots that were learned, in one JSON file.

It is a convenience: whatever is wrong with it (unreadable, broken, a disk that is full, a folder that may not be
written to) costs a warning and what was remembered, never the service. The file is replaced as a whole, so that a
reader or a crash never sees half of it; a second after a change, in a thread, and at `close`.

Several services may share a file. Each brings in only what it has changed, under a lock, into what is there by then:
what others learned stays. Of one runner, the last to write wins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import time
from collections import OrderedDict
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from unisono.core.capacity import SlotMemo

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Runners that are remembered; the one that was not asked for longest makes room.
MOST_ENTRIES = 1_000
# Keys that are longer are not remembered, and larger files are none of ours.
_LONGEST_KEY = 2_000
_MOST_BYTES = 4 * 1024 * 1024
_VERSION = 1
_PAUSE_S = 1.0
# Between two tries to lock it: a write takes milliseconds.
_LOCK_PAUSES_S = (0.01,) * 20 + (0.1,) * 18

_log = logging.getLogger(__name__)

_Count = Annotated[int, msgspec.Meta(ge=0, le=4096)]


class _Entry(msgspec.Struct, frozen=True):
    count: _Count = 0
    at_least: _Count = 0


class _File(msgspec.Struct, frozen=True):
    version: int
    runners: dict[str, _Entry]


class SlotsFile:
    """A SlotMemory in a file. `put` needs a running event loop."""

    def __init__(self, path: Path, *, pause_s: float = _PAUSE_S) -> None:
        self._path = path
        self._pause_s = pause_s
        self._has_warned = False
        self._entries = self._read()
        # What is not written yet, the newest last: the new word on a key, None that it is forgotten; who was asked.
        self._changes: dict[str, SlotMemo | None] = {}
        self._asked: dict[str, None] = {}
        # Of the changes, those that could not be written: they go with the next ones.
        self._unwritten: dict[str, SlotMemo | None] = {}
        self._is_closing = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    def get(self, key: str) -> SlotMemo | None:
        """See the port."""
        memo = self._entries.get(key)
        if memo is not None:
            self._entries.move_to_end(key)
            _ = self._asked.pop(key, None)
            self._asked[key] = None
        return memo

    def put(self, key: str, memo: SlotMemo) -> None:
        """See the port."""
        if len(key) > _LONGEST_KEY or not _is_text(key) or self._entries.get(key) == memo:
            return
        _bring_in(self._entries, {key: memo})
        self._write_soon({key: memo})

    def forget(self, backend: str) -> None:
        """See the port."""
        theirs = {key: None for key in self._entries if key.startswith(f"{backend} ")}
        if theirs:
            _bring_in(self._entries, theirs)
            self._write_soon(theirs)

    async def close(self) -> None:
        """Writes what is not written yet, and waits for a write that is under way."""
        self._is_closing.set()
        if self._writer is not None:
            await self._writer

    def _write_soon(self, changes: Mapping[str, SlotMemo | None]) -> None:
        for key, memo in changes.items():
            _ = self._changes.pop(key, None)
            self._changes[key] = memo
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write_later())

    async def _write_later(self) -> None:
        while self._changes:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s):
                    _ = await self._is_closing.wait()
            changes, self._changes = {**self._unwritten, **self._changes}, {}
            asked, self._asked = self._asked, {}
            is_written = await asyncio.to_thread(self._write, changes, asked)
            self._unwritten = {} if is_written else changes

    def _write(self, changes: Mapping[str, SlotMemo | None], asked: Iterable[str]) -> bool:
        """Brings these into the file; answers whether that could be done."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Beside the file, since that is another one after each write.
            with self._path.with_name(f".{self._path.name}.lock").open("wb") as lock:
                _lock(lock.fileno())
                entries = self._read()
                for key in asked:
                    if key in entries:
                        entries.move_to_end(key)
                _bring_in(entries, changes)
                runners = {key: _Entry(memo.count, memo.at_least) for key, memo in entries.items()}
                self._replace(msgspec.json.format(msgspec.json.encode(_File(_VERSION, runners)), indent=1))
        except OSError as error:
            self._warn("cannot be written: slots are learned anew after a restart", error)
            return False
        return True

    def _replace(self, text: bytes) -> None:
        number, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(number, "wb") as file:
                _ = file.write(text)
            _ = Path(name).replace(self._path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _read(self) -> OrderedDict[str, SlotMemo]:
        try:
            with self._path.open("rb") as file:
                found = _parse(file.read(_MOST_BYTES + 1))
        except FileNotFoundError:
            return OrderedDict()
        except (OSError, ValueError, RecursionError) as error:
            self._warn("cannot be read, and is passed over", error)
            return OrderedDict()
        kept = list(found.runners.items())[-MOST_ENTRIES:]
        return OrderedDict((key, SlotMemo(count=one.count, at_least=one.at_least)) for key, one in kept)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning("the remembered slots in %s %s (%s)", self._path, what, error)


def _lock(number: int) -> None:
    """Locks an open file until it is closed. Raises TimeoutError where another process does not let go of it."""
    for pause_s in (*_LOCK_PAUSES_S, None):
        try:
            flock(number, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            if pause_s is None:
                raise TimeoutError("another process keeps it locked") from error
            time.sleep(pause_s)
        else:
            return


def _bring_in(entries: OrderedDict[str, SlotMemo], changes: Mapping[str, SlotMemo | None]) -> None:
    for key, memo in changes.items():
        if memo is None:
            _ = entries.pop(key, None)
        else:
            entries[key] = memo
            entries.move_to_end(key)
    while len(entries) > MOST_ENTRIES:
        _ = entries.popitem(last=False)


def _is_text(key: str) -> bool:
    """Whether it can be written: a backend's name for a model may hold half a character."""
    try:
        _ = key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(text: bytes) -> _File:
    """Raises ValueError or RecursionError for what is no file of ours."""
    if len(text) > _MOST_BYTES:
        raise ValueError("it is too large")
    found = msgspec.json.decode(text, type=_File)
    if found.version != _VERSION:
        raise ValueError(f"its version is {found.version}, not {_VERSION}")
    return found
