"""HTTP/1.1 as far as a test must control it: every byte that comes is timed, every byte that goes can be held.

h11 parses the requests; the answers are written by hand, with the header fields in the order of Go's net/http.

Read in Ollama's source: the handler begins when the *headers* are there and reads the body through Go's JSON
decoder, which stops at the value's final `}`. So a request begins as soon as its JSON value is whole, even if
announced bytes (a newline, say) are still missing, and never before. Its answer, though, waits for those bytes:
net/http reads the rest of a body before it writes (seen on a real server: held back for 2 s after the `}`, a newline
delayed an answer by 2 s whose total_duration was 0.25 s).
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections import deque
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

import h11

from tests.fakes.ollama.faults import Fault, FaultKind
from tests.fakes.ollama.log import LiveRequest, Outcome
from tests.fakes.ollama.wire import error_body

JSON_UTF8 = "application/json; charset=utf-8"
# net/http announces a length only for bodies that fit its buffer, and sends longer ones in chunks.
_GO_BUFFER = 2048
_RESET = struct.pack("ii", 1, 0)
_DATES: tuple[int, str] = (0, "")


class Server(Protocol):
    """What a connection needs from the server."""

    def new_request(self, connection: Connection, method: str, path: str, headers: dict[str, str]) -> LiveRequest:
        """Write down a request whose headers have come."""

    def start(self, exchange: Exchange) -> None:
        """Answer a request."""

    def written(self, exchange: Exchange) -> None:
        """An answer is written to its last byte."""

    def lost(self, connection: Connection) -> None:
        """A connection is gone."""

    def opened(self, connection: Connection) -> None:
        """A connection is there."""

    def changed(self) -> None:
        """Something happened that a test may wait for."""


class Exchange:
    """One request and its answer."""

    def __init__(self, connection: Connection, live: LiveRequest, *, is_head: bool, close: bool) -> None:
        self.connection = connection
        self.live = live
        self.body = bytearray()
        self.fault: Fault | None = None
        self.task: asyncio.Task[None] | None = None
        self.started = False
        self.received = False  # the whole request is there
        self.ended = False  # the whole answer is written
        self._is_head = is_head
        self._close = close
        self._chunked = False
        self.bytes_out = 0
        self._pieces: deque[bytes] = deque()
        self._pumping = False
        self._parked: list[bytes] = []  # written before the request was there to its last byte

    # Writing an answer.

    def answer(
        self,
        status: int,
        body: bytes,
        content_type: str = JSON_UTF8,
        *,
        chunked: bool = False,
        headers: dict[str, str] | None = None,
    ) -> None:
        """A whole answer."""
        if chunked or len(body) > _GO_BUFFER:
            self.begin(status, content_type, headers)
            self.write(body)
        else:
            self._head(status, content_type, f"Content-Length: {len(body)}\r\n", headers, body)
        self.end()

    def begin(self, status: int, content_type: str, headers: dict[str, str] | None = None) -> None:
        """Begin an answer of unknown length."""
        self._chunked = True
        self._head(status, content_type, "Transfer-Encoding: chunked\r\n", headers, b"")

    def line(self, line: bytes) -> None:
        """Write one line of a stream; it is a chunk of its own."""
        self.live.lines += 1
        self.write(line)

    def write(self, data: bytes) -> None:
        """Write a chunk."""
        self._send(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        """The answer is complete."""
        if self.ended:
            return
        if self._chunked:
            self._send(b"0\r\n\r\n")
        self.ended = True
        if not self._pieces and not self._parked:
            self._written()

    def unpark(self) -> None:
        """The rest of the request has come: what was answered meanwhile can go."""
        parked, self._parked = self._parked, []
        for data in parked:
            self._send(data)
        if self.ended and not self._pieces:
            self._written()

    def reset(self) -> None:
        """Break the connection with RST."""
        self.finish(Outcome.FAULTED)
        self.connection.reset()

    def close(self) -> None:
        """Close the connection without more (FIN)."""
        self.finish(Outcome.FAULTED)
        self.connection.close()

    def finish(self, outcome: Outcome) -> None:
        """Write the end into the log; the first outcome stands."""
        live = self.live
        if live.outcome is Outcome.PENDING:
            live.outcome = outcome
            live.end_ns = time.monotonic_ns()

    def _head(
        self, status: int, content_type: str, framing: str, headers: dict[str, str] | None, body: bytes
    ) -> None:
        self.live.status = status
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        if self._close:
            more += "Connection: close\r\n"
        kind = f"Content-Type: {content_type}\r\n" if content_type else ""
        head = f"HTTP/1.1 {status} {_reason(status)}\r\n{kind}{more}Date: {_date()}\r\n{framing}\r\n"
        self._send(head.encode("latin-1") + (b"" if self._is_head else body))

    def _send(self, data: bytes) -> None:
        if not self.received:
            self._parked.append(data)
            return
        fault = self.fault
        if fault is not None:
            if fault.kind is FaultKind.RESET and fault.after_bytes is not None:
                room = fault.after_bytes - self.bytes_out
                if room <= len(data):
                    self.bytes_out += max(room, 0)
                    self.connection.send(data[: max(room, 0)])
                    self.reset()
                    return
            elif fault.kind is FaultKind.SLICE:
                size = max(fault.piece_bytes, 1)
                self._pieces.extend(data[at : at + size] for at in range(0, len(data), size))
                self._pump()
                return
        self.bytes_out += len(data)
        self.connection.send(data)

    def _pump(self) -> None:
        if not self._pumping and self._pieces:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._send_piece)

    def _send_piece(self) -> None:
        self._pumping = False
        if not self._pieces:
            return
        piece = self._pieces.popleft()
        self.bytes_out += len(piece)
        self.connection.send(piece)
        if self._pieces:
            self._pump()
        elif self.ended:
            self._written()

    def _written(self) -> None:
        self.finish(Outcome.COMPLETED)
        self.connection.answered(self, close=self._close)


class Connection(asyncio.Protocol):
    """One connection of a client; answers one request after the other."""

    def __init__(self, server: Server, number: int) -> None:
        self.number = number
        self.exchange: Exchange | None = None
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser = h11.Connection(h11.SERVER)
        self._later = b""  # bytes of the next request, come before this one was answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The client has connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.opened(self)

    def data_received(self, data: bytes) -> None:
        """Bytes have come; they are timed before anything else is done."""
        now_ns = time.monotonic_ns()
        exchange = self.exchange
        if exchange is not None and exchange.received:
            self._later += data
            return
        self._feed(data, now_ns)

    def eof_received(self) -> bool:
        """Close: Go's net/http takes a half-closed connection for a client that is gone."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, whoever ended it."""
        self._transport = None
        exchange = self.exchange
        if exchange is not None:
            exchange.finish(Outcome.CLIENT_GONE)
            if exchange.task is not None:
                exchange.task.cancel()
        self._server.lost(self)

    def send(self, data: bytes) -> None:
        """Hand bytes to the socket, unless it is gone."""
        if self._transport is not None and data:
            self._transport.write(data)

    def close(self) -> None:
        """Close after what has been written."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Break the connection: the client gets RST."""
        transport = self._transport
        if transport is None:
            return
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        transport.abort()

    def answered(self, exchange: Exchange, *, close: bool) -> None:
        """The answer to the current request is written."""
        self._server.written(exchange)
        self._server.changed()
        if close:
            self.close()
        elif exchange.received and self.exchange is exchange:
            self._next()

    def _next(self) -> None:
        self.exchange = None
        self._parser = h11.Connection(h11.SERVER)
        later, self._later = self._later, b""
        if later and self._transport is not None:
            self._feed(later, time.monotonic_ns())

    def _feed(self, data: bytes, now_ns: int) -> None:
        parser = self._parser
        try:
            parser.receive_data(data)
            while True:
                event = parser.next_event()
                if type(event) is h11.Data:
                    assert self.exchange is not None
                    self.exchange.body += event.data
                    self.exchange.live.body_bytes += len(event.data)
                elif type(event) is h11.Request:
                    self._headers(event, now_ns)
                elif type(event) is h11.EndOfMessage:
                    self._end_of_message(now_ns)
                    return
                else:
                    break
        except h11.RemoteProtocolError:
            self._malformed()
            return
        exchange = self.exchange
        if exchange is not None and not exchange.started:
            if exchange.body.endswith(b"}") and _is_whole(exchange.body):
                self._start(exchange, now_ns)
            else:
                self._server.changed()

    def _headers(self, event: h11.Request, now_ns: int) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
        method = event.method.decode("ascii")
        path = event.target.decode("latin-1").partition("?")[0]
        live = self._server.new_request(self, method, path, headers)
        live.headers_ns = now_ns
        close = "close" in headers.get("connection", "").lower() or event.http_version == b"1.0"
        self.exchange = Exchange(self, live, is_head=method == "HEAD", close=close)
        if headers.get("expect", "").lower() == "100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._server.changed()

    def _end_of_message(self, now_ns: int) -> None:
        exchange = self.exchange
        assert exchange is not None
        exchange.live.last_byte_ns = now_ns
        exchange.received = True
        self._later = self._parser.trailing_data[0]
        if not exchange.started:
            self._start(exchange, now_ns)
        else:
            exchange.unpark()

    def _start(self, exchange: Exchange, now_ns: int) -> None:
        exchange.started = True
        exchange.live.started_ns = now_ns
        self._server.start(exchange)
        self._server.changed()

    def _malformed(self) -> None:
        """net/http's answer to what is no HTTP."""
        self.send(
            b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n"
            b"Connection: close\r\n\r\n400 Bad Request"
        )
        self.close()


def fail(exchange: Exchange, status: int, message: str, *, streaming: bool = False) -> None:
    """Answer with an error; in a stream that has not begun, framed as Ollama does there (streamResponse())."""
    if streaming:
        exchange.answer(status, error_body(message), "application/json", chunked=True)
    else:
        exchange.answer(status, error_body(message))


def _is_whole(body: bytearray) -> bool:
    try:
        json.JSONDecoder().raw_decode(body.decode("utf-8").lstrip())
    except ValueError:
        return False
    return True


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "status code"


def _date() -> str:
    global _DATES  # noqa: PLW0603  (one cached text for the second that is running)
    second = int(time.time())
    if _DATES[0] != second:
        _DATES = (second, formatdate(second, usegmt=True))
    return _DATES[1]
