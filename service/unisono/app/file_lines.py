"""Files of lines: read some lines at a time, and written as lines come.

How a line is written is its edge's business (`LineForm`). A file may have hundreds of megabytes, and is never in
memory as a whole.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unisono.app.stores import FileDraft, FileStore
    from unisono.core.batch import BadItem
    from unisono.core.events import Result, ResultPart
    from unisono.core.files import FileBatch, LineError
    from unisono.core.model import Item

# Lines that are read at one time, and bytes of them after which no more are.
_LINES = 500
_PIECE_BYTES = 1024 * 1024
# Bytes that are written at one time.
_WRITE_BYTES = 256 * 1024
_BOM = b"\xef\xbb\xbf"


class LineCheck(Protocol):
    """Looks at the lines of one file, one after the other, and keeps what is wrong with them."""

    @property
    def errors(self) -> Sequence[LineError]:
        """What was found."""
        ...

    @property
    def is_enough(self) -> bool:
        """Whether nothing that may follow could make it better."""
        ...

    @property
    def model(self) -> str:
        """What all lines ask; empty where they do not ask one and the same."""
        ...

    def read(self, number: int, text: bytes | None) -> None:
        """The next line; None: it is too long to be kept."""
        ...

    def end(self) -> None:
        """There are no more."""
        ...


class LineForm(Protocol):
    """How items and results are written in files. Called on threads."""

    max_line_bytes: int

    def check(self, endpoint: str) -> LineCheck:
        """For a file whose lines ask that endpoint."""
        ...

    def item(self, text: bytes, endpoint: str) -> Item | BadItem:
        """The item of a line that was checked."""
        ...

    def wants_lines(self, endpoint: str) -> bool:
        """Whether a result is written with the line that asked."""
        ...

    def result(self, batch: FileBatch, result: Result, at_ns: int, asked: bytes | None = None) -> tuple[bytes, bool]:
        """A result, whole, as a line with its line break; and whether it is for the file of answers.

        `asked`: the line that it answers, where such are wanted and the file is still there.
        """
        ...


class Lines:
    """The lines of a file, numbered from 1, some at a time. Used on threads."""

    def __init__(self, stream: BinaryIO, max_line_bytes: int) -> None:
        self._stream = stream
        self._most = max_line_bytes
        self._number = 0

    def some(self) -> list[tuple[int, bytes | None]]:
        """The next lines that are not blank; one that is too long is None. Empty: there are no more."""
        found: list[tuple[int, bytes | None]] = []
        room = _PIECE_BYTES
        while len(found) < _LINES and room > 0 and (text := self._stream.readline(self._most + 2)):
            self._number += 1
            room -= len(text)
            is_long = len(text) > self._most + 1 or (len(text) > self._most and not text.endswith(b"\n"))
            # The rest of a line that is too long is read, and not kept.
            while is_long and text and not text.endswith(b"\n"):
                text = self._stream.readline(self._most)
            if self._number == 1:
                text = text.removeprefix(_BOM)
            if is_long or text.strip():
                found.append((self._number, None if is_long else text))
        return found


class LinePlaces:
    """Where each line of a file that was checked begins, so that any can be read again. Used on threads."""

    def __init__(self, stream: BinaryIO) -> None:
        """Reads the file once; closes it in the end, by `close`."""
        self._stream = stream
        # Eight bytes a line, blank ones left out.
        self._places = array("Q")
        place = 0
        for text in stream:
            if text.removeprefix(_BOM if place == 0 else b"").strip():
                self._places.append(place)
            place += len(text)

    def line(self, index: int) -> bytes | None:
        """The line of the item with this index; None: there is none."""
        if not 0 <= index < len(self._places):
            return None
        place = self._places[index]
        _ = self._stream.seek(place)
        text = self._stream.readline()
        return text.removeprefix(_BOM) if place == 0 else text

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def check_some(lines: Lines, check: LineCheck) -> bool:
    """Looks at some lines; False: there are no more, or no more matter."""
    some = lines.some()
    for number, text in some:
        check.read(number, text)
    if not some:
        check.end()
    return bool(some) and not check.is_enough


class Output:
    """A file of results that is made when there is one for it."""

    def __init__(self, files: FileStore) -> None:
        self._files = files
        self._draft: FileDraft | None = None
        self._pending = bytearray()

    async def add(self, line: bytes) -> None:
        """One more line."""
        self._pending += line
        if len(self._pending) >= _WRITE_BYTES:
            await self._flush()

    async def end(self) -> FileDraft | None:
        """The draft with all that was added; None: nothing was."""
        if self._pending:
            await self._flush()
        return self._draft

    async def discard(self) -> None:
        """Forgets what was not kept."""
        if self._draft is not None:
            await self._draft.discard()

    async def _flush(self) -> None:
        if self._draft is None:
            self._draft = await self._files.draft(is_result=True)
        await self._draft.write(bytes(self._pending))
        self._pending.clear()


def joined(parts: Sequence[ResultPart], result: Result) -> Result:
    """A result with what stands in front of it put back into it."""
    done = result.completion
    if not parts or done is None:
        return result
    whole = replace(
        done,
        content="".join([*(part.content for part in parts), done.content]),
        thinking="".join([*(part.thinking for part in parts), done.thinking]),
        embeddings=tuple(each for part in parts for each in part.embeddings) + done.embeddings,
        logprobs=tuple(each for part in parts for each in part.logprobs) + done.logprobs,
    )
    return replace(result, completion=whole, parts=0)
