"""One connection's bytes: an asyncio protocol that is also httpcore's network stream.

1. `send_first` sends a request but for its last byte, and returns when the other machine has all of that.
2. `send_last` writes the missing last byte at once.
3. What arrives is kept until somebody asks for it, and reading pauses above a limit.
4. `write` sends at once: for plain requests, which httpcore makes.

Only `abort` closes; it never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import termios
from fcntl import ioctl
from typing import TYPE_CHECKING, Any, Final

import httpcore

if TYPE_CHECKING:
    from collections.abc import Callable

# Bytes that may wait to be read before the other side is made to pause.
READ_LIMIT: Final = 1 << 20
# On Linux this counts the bytes of a socket that the other side has not acknowledged. Source: man 7 tcp, SIOCOUTQ.
_CAN_COUNT_UNSENT: Final = sys.platform == "linux"
# Pauses between looks at the send queue: none at first (a loopback has acknowledged before `send` returns).
_FIRST_PAUSE_S: Final = 0.0002
_LONGEST_PAUSE_S: Final = 0.01


class HeldStream(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """A connection that can keep bytes back."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        # Under TLS, the transport that carries the encrypted bytes; otherwise the same one.
        self._carrier: asyncio.Transport | None = None
        self._socket: socket.socket | None = None
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._is_paused = False
        self._is_over = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        # Set unless so much waits to be sent that a plain request's sender must wait too.
        self._may_write = asyncio.Event()
        self._may_write.set()
        # Called once, when nothing more can arrive.
        self.on_over: Callable[[], None] | None = None

    # -- asyncio's side ----------------------------------------------------------------------------------------

    def attach(self, transport: asyncio.Transport, carrier: asyncio.Transport, sock: socket.socket) -> None:
        """Gives it the connection: the transport to write to, the one that carries it, and the socket."""
        self._transport, self._carrier, self._socket = transport, carrier, sock

    def data_received(self, data: bytes) -> None:
        """Keeps what arrived."""
        self._chunks.append(data)
        self._buffered += len(data)
        if self._buffered > READ_LIMIT and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def pause_writing(self) -> None:
        """Enough waits to be sent."""
        self._may_write.clear()

    def resume_writing(self) -> None:
        """There is room again."""
        self._may_write.set()

    def eof_received(self) -> bool:
        """Nothing more will arrive; the transport closes itself."""
        self._end(None)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, by an error or by its end."""
        self._end(exc)

    def _end(self, error: BaseException | None) -> None:
        if self._is_over:
            return
        self._is_over, self._error = True, error
        self._may_write.set()
        self._wake()
        # Let go as well: it knows this stream, and a circle of the two would stay until Python looks for circles.
        on_over, self.on_over = self.on_over, None
        if on_over is not None:
            on_over()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- httpcore's side ---------------------------------------------------------------------------------------

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's
        """Returns what has arrived, or waits for it; b"" at the end. Raises ReadError and ReadTimeout."""
        if not self._chunks and not self._is_over:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout) if timeout is not None else contextlib.nullcontext():
                    await self._waiter
            except TimeoutError as error:
                raise httpcore.ReadTimeout(f"nothing for {timeout} s") from error
        if self._chunks:
            return self._take(max_bytes)
        if self._error is not None:
            raise httpcore.ReadError(str(self._error) or type(self._error).__name__) from self._error
        return b""

    def _take(self, max_bytes: int) -> bytes:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks = [data[max_bytes:]] if len(data) > max_bytes else []
        self._buffered = max(0, len(data) - max_bytes)
        if self._is_paused and self._buffered <= READ_LIMIT // 2 and self._transport is not None:
            self._is_paused = False
            if not self._is_over:
                self._transport.resume_reading()
        return data[:max_bytes]

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002, ASYNC109 - httpcore's
        """Sends, and waits while the other side takes too little. Raises WriteError."""
        if buffer:
            self._send(buffer)
            await self._may_write.wait()

    def _send(self, data: bytes) -> None:
        if self._is_over or self._transport is None:
            raise httpcore.WriteError("the connection is closed")
        self._transport.write(data)

    async def aclose(self) -> None:
        """Closes at once."""
        self.abort()

    def get_extra_info(self, info: str) -> Any:
        """The connection's ssl_object, client_addr, server_addr or socket; None for what is not known."""
        names = {"client_addr": "sockname", "server_addr": "peername"}
        return None if self._transport is None else self._transport.get_extra_info(names.get(info, info))

    # -- The holder's side -------------------------------------------------------------------------------------

    @property
    def has_data(self) -> bool:
        """Whether something has arrived that was not read yet."""
        return self._buffered > 0

    async def send_first(self, data: bytes, patience_s: float) -> None:
        """Sends all but the last byte, and returns when the other machine has it all, or has begun to answer.

        Where the send queue can't be seen (not on Linux) it returns when the kernel has taken the bytes. Raises
        WriteError where the connection ends or nothing moves for `patience_s`.
        """
        self._send(data)
        loop = asyncio.get_running_loop()
        left, deadline, pause_s = self._unsent(), loop.time() + patience_s, 0.0
        while left and not self._chunks:
            if self._is_over:
                raise httpcore.WriteError("the connection was closed while the request was being sent")
            if loop.time() > deadline:
                raise httpcore.WriteError(f"the other side took nothing for {patience_s} s")
            await asyncio.sleep(pause_s)
            pause_s = min(max(pause_s * 2, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            before, left = left, self._unsent()
            if left < before:
                deadline = loop.time() + patience_s

    def _unsent(self) -> int:
        """Bytes on their way out of this machine; 0 for a closed connection."""
        if self._transport is None or self._carrier is None or self._socket is None or self._is_over:
            return 0
        count = self._transport.get_write_buffer_size()
        if self._carrier is not self._transport:
            count += self._carrier.get_write_buffer_size()
        if count or not _CAN_COUNT_UNSENT:
            return count
        try:
            return int.from_bytes(ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"), sys.byteorder)
        except (OSError, ValueError):  # closed meanwhile; the loop above sees it
            return 0

    def send_last(self, data: bytes) -> None:
        """Sends the byte that was kept back, without waiting; a closed connection is left for the reader to find."""
        if not self._is_over and self._transport is not None:
            # asyncio hands it to the kernel in this very call, because `send_first` left nothing before it.
            self._transport.write(data)

    def abort(self) -> None:
        """Closes at once; what was not read is dropped."""
        if self._socket is not None and not self._is_over:
            # asyncio closes in its next round, after much else where a whole batch is cancelled; this is now.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._transport is not None:
            self._transport.abort()
        self._chunks, self._buffered = [], 0
        self._end(ConnectionAbortedError("closed on this side"))
