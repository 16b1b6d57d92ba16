"""Lines of a file or of standard input, numbered, in bounded memory."""

from __future__ import annotations

import os
import select
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from unisono.edge.batchfile.line import MAX_LINE_BYTES

# Bytes of one read: enough that a large file costs few of them.
_READ_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line as it stands in the file."""

    # From 1, as editors count.
    number: int
    # Without the line break; None where it is longer than MAX_LINE_BYTES.
    text: bytes | None


class LineSource:
    """Reads lines from a file descriptor; `close`, from another thread, ends a read that is waiting.

    Reading by hand and not through a file object: so what has come is given on while more is awaited, and a
    read from a terminal or a pipe that never says anything can be given up.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._wake_read, self._wake_write = os.pipe()
        self._rest = bytearray()
        self._number = 0
        self._is_skipping = False
        # Whether the end was reached.
        self.is_ended = False
        # Guards the two below: descriptors are closed only while nobody reads.
        self._lock = threading.Lock()
        self._is_reading = False
        self._is_closed = False

    @classmethod
    def open(cls, path: str) -> Self:
        """A source on a file, or on standard input for "-". Raises OSError."""
        if path == "-":
            return cls(os.dup(0))
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def hand_over(self) -> int:
        """The descriptor, for another source; this one is closed."""
        descriptor = os.dup(self._descriptor)
        self.close()
        return descriptor

    def tell(self) -> int | None:
        """Where reading began; None for what cannot be read twice, such as a pipe. Only before the first read."""
        try:
            return os.lseek(self._descriptor, 0, os.SEEK_CUR)
        except OSError:
            return None

    def again(self, place: int) -> LineSource:
        """A source on the same file that reads it again from there."""
        os.lseek(self._descriptor, place, os.SEEK_SET)
        return LineSource(os.dup(self._descriptor))

    @classmethod
    def copied(cls, copy: IO[bytes]) -> Self:
        """A source on what a CopyingSource has written."""
        copy.flush()
        _ = copy.seek(0)
        return cls(os.dup(copy.fileno()))

    def read_some(self) -> list[Line] | None:
        """The lines that are there, waiting for one at least; None at the end or once closed. Raises OSError."""
        with self._lock:
            if self._is_closed:
                return None
            self._is_reading = True
        try:
            return self._read_some()
        finally:
            self._end_reading()

    def _end_reading(self) -> None:
        with self._lock:
            self._is_reading = False
            if self._is_closed:
                self._dispose()

    def close(self) -> None:
        """Gives up, and gives the descriptors back; safe at any time, any number of times, from any thread."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            if self._is_reading:
                os.write(self._wake_write, b".")
            else:
                self._dispose()

    def _read_some(self) -> list[Line] | None:
        while not self.is_ended:
            ready, _, _ = select.select([self._descriptor, self._wake_read], [], [])
            if self._wake_read in ready:
                break
            data = os.read(self._descriptor, _READ_BYTES)
            self.is_ended = not data
            if lines := self._split(data):
                return lines
        return None

    def _dispose(self) -> None:
        for descriptor in (self._descriptor, self._wake_read, self._wake_write):
            os.close(descriptor)

    def _split(self, data: bytes) -> list[Line]:
        lines: list[Line] = []
        self._rest += data
        *whole, rest = self._rest.split(b"\n") if b"\n" in data else [self._rest]
        for text in whole:
            lines.append(self._line(bytes(text)))
            self._is_skipping = False
        self._rest = bytearray(rest)
        if len(self._rest) > MAX_LINE_BYTES:
            self._is_skipping = True
            self._rest.clear()
        if self.is_ended and (self._rest or self._is_skipping):
            lines.append(self._line(bytes(self._rest)))
        return lines

    def _line(self, text: bytes) -> Line:
        self._number += 1
        if self._number == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put at a file's start
        is_kept = not self._is_skipping and len(text) <= MAX_LINE_BYTES
        return Line(number=self._number, text=text if is_kept else None)


class CopyingSource(LineSource):
    """A source that can be read once, such as a pipe, and writes its lines to a file, so that they can be again."""

    def __init__(self, source: LineSource, copy: IO[bytes]) -> None:
        """Nothing of the source was read yet; it is closed with that."""
        super().__init__(source.hand_over())
        self._copy = copy

    def read_some(self) -> list[Line] | None:
        """See LineSource."""
        lines = super().read_some()
        for line in lines or ():
            # A line that was too long to be kept stays so.
            text = b"x" * (MAX_LINE_BYTES + 1) if line.text is None else line.text
            _ = self._copy.write(text + b"\n")
        return lines
