"""Small things that every part of the stand-in says the same way: errors, JSON text, times.

Ollama encodes with Go's encoding/json: no blanks, `<`, `>` and `&` escaped, other text as UTF-8.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from json.encoder import encode_basestring

_HTML = re.compile("[<>&\u2028\u2029]")


class ApiError(Exception):
    """An answer `{"error": message}` with an HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


def quote(text: str) -> str:
    """A JSON string as Go's json.Marshal writes it."""
    quoted: str = encode_basestring(text)
    if _HTML.search(quoted):
        quoted = _HTML.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
    return quoted


def dumps(value: object) -> str:
    """JSON text of any value, as Go's json.Marshal writes it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if _HTML.search(text):
        text = _HTML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text


def error_body(message: str) -> bytes:
    """`{"error": message}` in bytes."""
    return f'{{"error":{quote(message)}}}'.encode()


class WallClock:
    """`created_at` values: RFC 3339 in UTC with nanoseconds, strictly increasing.

    Go's RFC3339Nano cuts trailing zeros. That no two are equal is this stand-in's own promise: the order of
    the lines of different answers can be read from them.
    """

    def __init__(self) -> None:
        self._last_ns = 0
        self._stopped_ns: int | None = None
        self._second = -1
        self._prefix = ""

    def stamp(self) -> str:
        """The next time stamp."""
        now_ns = time.time_ns() if self._stopped_ns is None else self._stopped_ns
        self._last_ns = max(now_ns, self._last_ns + 1)
        return self.text(self._last_ns)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is stamped meanwhile is of one moment, however often this process is put aside."""
        self._stopped_ns = time.time_ns()
        try:
            yield
        finally:
            self._stopped_ns = None

    def text(self, wall_ns: int) -> str:
        """RFC 3339 text of nanoseconds since 1970."""
        second, fraction = divmod(wall_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        if not fraction:
            return f"{self._prefix}Z"
        return f"{self._prefix}.{fraction:09d}".rstrip("0") + "Z"
