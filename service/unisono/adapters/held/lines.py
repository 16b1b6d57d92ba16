"""Lines out of chunks, for answers that come line by line (NDJSON, server-sent events)."""

from __future__ import annotations

from typing import Final

# An answer's line holds a few tokens; the last line of Ollama's generate also all token numbers of the context.
LONGEST_LINE: Final = 16 << 20
LONGEST_ANSWER: Final = 64 << 20


class TooLongError(Exception):
    """A line, or the whole, is longer than allowed."""


class LineSplitter:
    """Splits a byte stream at newlines, however it was cut into chunks."""

    __slots__ = ("_left_bytes", "_longest_line", "_parts", "_parts_bytes")

    def __init__(self, *, longest_line: int = LONGEST_LINE, longest_whole: int = LONGEST_ANSWER) -> None:
        self._longest_line = longest_line
        self._left_bytes = longest_whole
        # The line that has begun, in pieces, so that a long one is not copied for each chunk.
        self._parts: list[bytes] = []
        self._parts_bytes = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Returns the lines that this chunk completes, without their ends and without empty ones.

        Raises TooLongError.
        """
        self._left_bytes -= len(chunk)
        if self._left_bytes < 0:
            raise TooLongError("the answer is too long")
        lines = chunk.split(b"\n")
        rest = lines.pop()
        if lines and self._parts:
            lines[0] = self._joined(lines[0])
        if rest:
            self._parts.append(rest)
            self._parts_bytes += len(rest)
        if self._parts_bytes > self._longest_line or any(len(line) > self._longest_line for line in lines):
            raise TooLongError("a line of the answer is too long")
        return [stripped for line in lines if (stripped := line.rstrip(b"\r"))]

    def rest(self) -> bytes:
        """The last line, where the stream did not end it; b"" for none."""
        return self._joined(b"").rstrip(b"\r")

    def _joined(self, end: bytes) -> bytes:
        whole = b"".join([*self._parts, end])
        self._parts, self._parts_bytes = [], 0
        return whole
