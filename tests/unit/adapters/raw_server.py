"""A server that shows every byte it receives, and says exactly what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

# No wait of these tests may last longer.
LIMIT_S = 10.0


@dataclass(eq=False)
class Connection:
    """One accepted connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    received: bytearray = field(default_factory=bytearray)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    is_closed: bool = False
    # In which order the connections' bodies became whole: the time of the loop.
    whole_at: float = 0.0

    @property
    def head(self) -> bytes:
        """The request's head, without the blank line."""
        return bytes(self.received).partition(b"\r\n\r\n")[0]

    @property
    def body(self) -> bytes:
        """What has come of the body."""
        return bytes(self.received).partition(b"\r\n\r\n")[2]

    @property
    def content_length(self) -> int:
        """What the head says of the body's length; -1 before the head is whole."""
        if b"\r\n\r\n" not in self.received:
            return -1
        lengths = [line for line in self.head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        return int(lengths[0].partition(b":")[2]) if lengths else 0

    def is_whole(self) -> bool:
        """Whether the request is complete."""
        return 0 <= self.content_length <= len(self.body)

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Returns when it is so."""
        async with asyncio.timeout(LIMIT_S), self.changed:
            await self.changed.wait_for(is_so)

    async def until_whole(self) -> None:
        """Returns when the request is complete."""
        await self.until(self.is_whole)

    async def until_closed(self) -> None:
        """Returns when the other side has closed."""
        await self.until(lambda: self.is_closed)

    async def say(self, data: bytes) -> None:
        """Sends bytes."""
        self.writer.write(data)
        await self.writer.drain()

    async def say_json(self, body: bytes, status: int = 200) -> None:
        """Sends a whole answer."""
        head = f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await self.say(head.encode() + body)

    def close(self) -> None:
        """Closes in order."""
        self.writer.close()

    def reset(self) -> None:
        """Closes without order."""
        self.writer.transport.abort()


Handler = Callable[[Connection], Awaitable[None]]


class RawServer:
    """Accepts, reads and remembers; a handler may answer."""

    def __init__(self, handler: Handler | None = None, *, reads: bool = True) -> None:
        self.handler = handler
        self.reads = reads
        self.connections: list[Connection] = []
        self.changed = asyncio.Condition()
        self.port = 0
        self.failures: list[BaseException] = []

    async def connection(self, index: int = 0) -> Connection:
        """The connection of this number, once it is there."""
        async with asyncio.timeout(LIMIT_S), self.changed:
            await self.changed.wait_for(lambda: len(self.connections) > index)
        return self.connections[index]

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection to its end."""
        connection = Connection(reader, writer)
        async with self.changed:
            self.connections.append(connection)
            self.changed.notify_all()
        handling = asyncio.create_task(self._handle(connection))
        try:
            while self.reads and (data := await reader.read(1 << 16)):
                async with connection.changed:
                    connection.received += data
                    if connection.is_whole() and not connection.whole_at:
                        connection.whole_at = asyncio.get_running_loop().time()
                    connection.changed.notify_all()
            if not self.reads:
                await asyncio.Event().wait()
        except (ConnectionError, ssl.SSLError):
            pass
        except asyncio.CancelledError:
            handling.cancel()
        finally:
            async with connection.changed:
                connection.is_closed = True
                connection.changed.notify_all()
            await asyncio.wait([handling])
            writer.close()

    async def _handle(self, connection: Connection) -> None:
        if self.handler is None:
            return
        try:
            await self.handler(connection)
        except ConnectionError:
            pass
        except Exception as error:  # noqa: BLE001 - looked at when the server ends
            self.failures.append(error)


@contextlib.asynccontextmanager
async def raw_server(
    handler: Handler | None = None,
    *,
    host: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
    reads: bool = True,
    socket_path: str = "",
) -> AsyncIterator[RawServer]:
    """A RawServer that listens; at the end it closes, and fails if a handler has failed."""
    server = RawServer(handler, reads=reads)
    if socket_path:
        listening = await asyncio.start_unix_server(server.accept, socket_path)
    else:
        listening = await asyncio.start_server(server.accept, host, 0, ssl=tls, backlog=1024)
        server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        for connection in server.connections:
            connection.reset()
            connection.reader.feed_eof()
        tasks = [t for t in asyncio.all_tasks() if getattr(t.get_coro(), "__qualname__", "") == "RawServer.accept"]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LIMIT_S)
    assert not server.failures, server.failures


def chunked(*parts: bytes, ends: bool = True) -> bytes:
    """A body in chunks, as Go's server sends a stream."""
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return body + (b"0\r\n\r\n" if ends else b"")


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
