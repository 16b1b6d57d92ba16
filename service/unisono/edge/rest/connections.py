"""What one connection of the HTTP port may take: time, bytes of a head, and a place among the others.

uvicorn closes a connection on which nothing follows an answer (5 s), and bounds a head (16 KiB). What it waits for
without end is bounded here: a head that does not end, a body that stops coming, an answer that nobody reads, a body
that goes on after its answer; and how many connections there are.
"""

from __future__ import annotations

import fcntl
import resource
import termios
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from unisono.edge.rest.errors import error_body

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

MOST_CONNECTIONS: Final = 1_000
# Of a request's line and headers together.
MOST_HEAD_BYTES: Final = 16 * 1024
# Seconds: for a head, from its first byte, or from the connection's beginning, to its end;
HEAD_S: Final = 30.0
# without a byte of a body that is waited for; without a byte of an answer being taken;
SILENCE_S: Final = 60.0
# that a body may go on after it was answered: a client that reads only then hears what was wrong with it.
LINGER_S: Final = 30.0


def most_connections() -> int:
    """As many as there may be: half of the files that this process may have open, as its work needs some too."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(MOST_CONNECTIONS, files // 2))


class BoundedProtocol(H11Protocol):
    """One connection."""

    # For tests, which have less time.
    head_s = HEAD_S
    silence_s = SILENCE_S
    linger_s = LINGER_S
    most = most_connections()

    _is_refused = False
    _unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Somebody has come."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._is_refused = True
            what = f"The service has {self.most:,} connections, and takes no more: try again later."
            transport.write(_written("503 Service Unavailable", what, 503))
            transport.close()
            return
        self._start("head", self.head_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something came."""
        if self._is_refused:
            return
        self._stop("body")
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer is whole; what came behind its request is looked at now."""
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        """More of an answer is here than is taken."""
        super().pause_writing()
        self._unread_bytes = self._untaken()
        self._start("answer", self.silence_s, self._look_at_reader)

    def resume_writing(self) -> None:
        """It was taken."""
        super().resume_writing()
        # A connection that is lost resumes too.
        self._stop("answer")

    def send_400_response(self, msg: str) -> None:
        """It is no HTTP: told in JSON, as everything else is."""
        what = f"{msg} Or its line and headers have more than {MOST_HEAD_BYTES:,} bytes."
        self.transport.write(_written("400 Bad Request", what, 400))
        self.transport.close()

    # -- Time --------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """What is waited for from now on."""
        if self.transport.is_closing():
            return
        theirs = self.conn.their_state
        if theirs is not h11.IDLE:
            self._stop("head")
        elif self.timeout_keep_alive_task is None and "head" not in self._timers:
            # A head has begun.
            self._start("head", self.head_s, self._give_up)
        if theirs is not h11.SEND_BODY:
            self._stop("body")
            self._stop("linger")
            return
        self._start("body", self.silence_s, self._look_at_writer)
        if self.cycle.response_complete and "linger" not in self._timers:
            self._start("linger", self.linger_s, self._give_up)

    def _look_at_writer(self) -> None:
        """Nothing came for a while: unless that is our own doing, it never will."""
        if self.flow.read_paused:
            self._start("body", self.silence_s, self._look_at_writer)
        else:
            self._give_up()

    def _look_at_reader(self) -> None:
        """Not all was taken for a while; where nothing was, nothing will be."""
        left = self._untaken()
        if left >= self._unread_bytes:
            self._give_up()
            return
        self._unread_bytes = left
        self._start("answer", self.silence_s, self._look_at_reader)

    def _untaken(self) -> int:
        """Bytes of answers that the caller's machine does not have yet."""
        left = array("i", [0])
        # What is in the system's own buffer, megabytes as a rule, would otherwise count as taken.
        with suppress(OSError):
            _ = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, left)
        return self.transport.get_write_buffer_size() + left[0]

    def _give_up(self) -> None:
        # Closing would wait for what nobody takes.
        self.transport.abort()

    def _start(self, name: str, delay_s: float, what: Callable[[], None]) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(delay_s, what)

    def _stop(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


def _written(status: str, what: str, code: int) -> bytes:
    """An answer by hand, in OpenAI's shape: to whom nobody has listened yet, and so nobody knows what was asked."""
    body = msgspec.json.encode(error_body(code, what))
    about = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
    return f"HTTP/1.1 {status}\r\n{about}\r\n".encode() + body
