"""A batch file as a feed of items: read and parsed in a thread, a piece at a time."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from typing import IO

from unisono._generated.unisono.v1 import item_pb2
from unisono.edge.cli.errors import ExitCode, StopError
from unisono.edge.cli.lines_in import BadLine, GoodLine, LineReader, Origin
from unisono.edge.cli.source import LineSource

# Bad lines that --strict lists; a file with more has most likely one mistake in all of them.
BAD_LINES_TOLD = 20


class LineFeed:
    """Items of a source; lines that are none are handed to `on_bad_line`."""

    def __init__(
        self,
        source: LineSource,
        reader: LineReader,
        *,
        on_bad_line: Callable[[BadLine], None],
        on_lines: Callable[[int], None],
        passes_over: Callable[[Origin], bool] | None = None,
    ) -> None:
        self._source = source
        self._reader = reader
        self._on_bad_line = on_bad_line
        # Told how many more lines were read, blank ones and those that are passed over left out.
        self._on_lines = on_lines
        # Asked of each item whether it is left out.
        self._passes_over = passes_over
        self._ahead: list[item_pb2.Item] | None = None
        # Whether the file was read to its end.
        self.is_ended = False
        # Lines read, blank ones left out.
        self.count = 0
        # Of these, items that were passed over.
        self.passed_over = 0

    async def look_ahead(self) -> bool:
        """Reads up to the first item; False if there is none. The item is kept for `next_items`."""
        self._ahead = await self.next_items()
        return self._ahead is not None

    async def next_items(self) -> list[item_pb2.Item] | None:
        """The next few items; None at the end or once closed. Raises OSError."""
        if (ahead := self._ahead) is not None:
            self._ahead = None
            return ahead
        while (lines := await asyncio.to_thread(self._read)) is not None:
            self.count += len(lines)
            taken = [line for line in lines if isinstance(line, BadLine) or not self._is_passed_over(line)]
            self._on_lines(len(taken))
            items: list[item_pb2.Item] = []
            for line in taken:
                if isinstance(line, GoodLine):
                    items.append(line.item)
                else:
                    self._on_bad_line(line)
            if items:
                return items
        return None

    def _is_passed_over(self, line: GoodLine) -> bool:
        if self._passes_over is None or not self._passes_over(line.origin):
            return False
        self.passed_over += 1
        return True

    def close(self) -> None:
        """Ends the feed; a waiting `next_items` returns None."""
        self._source.close()

    def _read(self) -> list[GoodLine | BadLine] | None:
        lines = self._source.read_some()
        self.is_ended |= lines is None and self._source.is_ended
        return None if lines is None else list(self._reader.read(lines))


async def open_source(path: str, *, is_strict: bool) -> LineSource:
    """A source on a file, or on standard input for "-"; with `is_strict`, one all of whose lines are good.

    Raises StopError.
    """
    try:
        return await open_checked(path) if is_strict else LineSource.open(path)
    except OSError as error:
        raise StopError(f"{path} cannot be read: {error.strerror or error}", code=ExitCode.USAGE) from error


async def open_checked(path: str) -> LineSource:
    """A source all of whose lines are good, for --strict; a pipe is copied to a temporary file for that.

    Raises OSError, and StopError where a line is bad.
    """
    source = LineSource.open(path)
    try:
        return await asyncio.to_thread(_check, source, path)
    finally:
        source.close()


def _check(source: LineSource, path: str) -> LineSource:
    start = source.tell()
    if start is not None:
        _check_lines(source, path, None)
        return source.again(start)
    with tempfile.TemporaryFile() as copy:
        _check_lines(source, path, copy)
        copy.seek(0)
        return LineSource(os.dup(copy.fileno()))


def _check_lines(source: LineSource, path: str, copy: IO[bytes] | None) -> None:
    """Reads all lines, into `copy` too; raises StopError that tells the bad ones."""
    reader = LineReader()
    told: list[str] = []
    count = 0
    while (lines := source.read_some()) is not None:
        for line in reader.read(lines):
            if isinstance(line, BadLine):
                count += 1
                told += [line.message] if count <= BAD_LINES_TOLD else []
        if copy is not None:
            copy.writelines((each.text or b"") + b"\n" for each in lines)
    if count > len(told):
        told.append(f"… and {count - len(told):,} more bad lines")
    if told:
        raise StopError(*told, f"{path}: nothing was run, because of --strict", code=ExitCode.USAGE)
