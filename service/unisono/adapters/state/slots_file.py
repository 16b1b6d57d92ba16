"""Slots that were learned, in one JSON file.

It is a convenience: whatever is wrong with it (unreadable, broken, a disk that is full, a folder that may not be
written to) costs a warning and what was remembered, never the service. The file is read once, and replaced as a
whole, so that a reader or a crash never sees half of it; a second after a change, in a thread, and at `close`. Of
several services that share a file, the last one to write wins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Annotated

import msgspec

from unisono.core.capacity import SlotMemo

# Runners that are remembered; the one that was not asked for longest makes room.
MOST_ENTRIES = 1_000
# Keys that are longer are not remembered, and larger files are none of ours.
_LONGEST_KEY = 2_000
_MOST_BYTES = 4 * 1024 * 1024
_VERSION = 1
_PAUSE_S = 1.0

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
        self._is_dirty = False
        self._is_closing = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    def get(self, key: str) -> SlotMemo | None:
        """See the port."""
        memo = self._entries.get(key)
        if memo is not None:
            self._entries.move_to_end(key)
        return memo

    def put(self, key: str, memo: SlotMemo) -> None:
        """See the port."""
        if len(key) > _LONGEST_KEY or not _is_text(key) or self._entries.get(key) == memo:
            return
        self._entries[key] = memo
        self._entries.move_to_end(key)
        if len(self._entries) > MOST_ENTRIES:
            _ = self._entries.popitem(last=False)
        self._write_soon()

    def forget(self, backend: str) -> None:
        """See the port."""
        theirs = [key for key in self._entries if key.startswith(f"{backend} ")]
        for key in theirs:
            del self._entries[key]
        if theirs:
            self._write_soon()

    async def close(self) -> None:
        """Writes what is not written yet, and waits for a write that is under way."""
        self._is_closing.set()
        if self._writer is not None:
            await self._writer

    def _write_soon(self) -> None:
        self._is_dirty = True
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write_later())

    async def _write_later(self) -> None:
        while self._is_dirty:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s):
                    _ = await self._is_closing.wait()
            self._is_dirty = False
            runners = {key: _Entry(memo.count, memo.at_least) for key, memo in self._entries.items()}
            text = msgspec.json.format(msgspec.json.encode(_File(_VERSION, runners)), indent=1)
            await asyncio.to_thread(self._replace, text)

    def _replace(self, text: bytes) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            number, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            try:
                with os.fdopen(number, "wb") as file:
                    _ = file.write(text)
                _ = Path(name).replace(self._path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._warn("cannot be written: slots are learned anew after a restart", error)

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
