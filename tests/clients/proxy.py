"""A TCP proxy between two parts that delays, slices, swallows, cuts and resets what they say to each other.

async with Proxy(service.target) as proxy:
    proxy.cut_at(down=1_000)
    … a client of proxy.target …
    assert proxy.cuts == 1
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Self

_CHUNK = 65_536
_UNIX = "unix:"
# An abortive close: the other side is reset, and what was not delivered is gone.
_LINGER = struct.pack("ii", 1, 0)


class Proxy:
    """Passes bytes on between clients and one service, until told to cut."""

    def __init__(self, target: str) -> None:
        """`target`: HOST:PORT, or unix:PATH."""
        self.move_to(target)
        self._server: asyncio.Server | None = None
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        # Bytes that went up to the service and down from it, and connections ever taken.
        self.up = 0
        self.down = 0
        self.connections = 0
        # Times that connections were cut.
        self.cuts = 0
        # Whether new connections are refused.
        self.is_away = False
        # Whether bytes of one direction are swallowed: the other side is not told anything.
        self.swallows_up = False
        self.swallows_down = False
        self._was_cut = asyncio.Event()
        self._condition: Callable[[Proxy], bool] | None = None
        # Whether a cut resets connections, or closes them in order.
        self.is_reset = True
        # How long each piece waits before it is passed on, in seconds; and how large the next piece may be, in bytes.
        self.delay_s = 0.0
        self.slice: Callable[[], int] | None = None
        # After how many bytes of a direction it cuts, to the byte.
        self._last_up: int | None = None
        self._last_down: int | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        self._close_all()
        if self._tasks:
            _ = await asyncio.wait(self._tasks)

    @property
    def target(self) -> str:
        """HOST:PORT for clients."""
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def move_to(self, target: str) -> None:
        """New connections lead to another service."""
        self._service = target

    def cut_when(self, condition: Callable[[Proxy], bool]) -> None:
        """Cuts once, as soon as this holds; it is looked at before bytes are passed on."""
        self._condition = condition

    def cut_at(self, *, up: int | None = None, down: int | None = None) -> None:
        """Cuts once, when so many more bytes were passed on, not one more; 0: before the next."""
        self._last_up = None if up is None else self.up + up
        self._last_down = None if down is None else self.down + down

    def cut(self) -> None:
        """Cuts all connections now; new ones are taken."""
        self.cuts += 1
        self.swallows_up = self.swallows_down = False
        self._last_up = self._last_down = None
        self._close_all()

    def _close_all(self) -> None:
        self._was_cut.set()
        self._was_cut = asyncio.Event()
        for pair in self._pairs:
            for writer in pair:
                raw = writer.get_extra_info("socket")
                if self.is_reset and raw is not None and raw.fileno() >= 0:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
                if self.is_reset:
                    writer.transport.abort()
                else:
                    writer.close()
        self._pairs.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.is_away:
            writer.transport.abort()
            return
        self.connections += 1
        try:
            far_reader, far_writer = await self._reach()
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, far_writer)
        self._pairs.add(pair)
        try:
            async with asyncio.TaskGroup() as group:
                _ = group.create_task(self._pass_on(reader, far_writer, is_up=True))
                _ = group.create_task(self._pass_on(far_reader, writer, is_up=False))
        finally:
            self._pairs.discard(pair)
            for each in pair:
                each.close()

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._service.startswith(_UNIX):
            return await asyncio.open_unix_connection(self._service.removeprefix(_UNIX))
        host, _, port = self._service.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                while data:
                    size = len(data) if self.slice is None else max(1, self.slice())
                    piece, data = data[:size], data[size:]
                    if not await self._pass_piece(piece, writer, is_up=is_up):
                        return
        if self.swallows_up if is_up else self.swallows_down:
            # Nor is it told of the end.
            _ = await self._was_cut.wait()
        writer.close()

    async def _pass_piece(self, piece: bytes, writer: asyncio.StreamWriter, *, is_up: bool) -> bool:
        """Passes a piece on; False: everything was cut."""
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        elif self.slice is not None:
            # Whoever reads shall read it before the next one comes.
            await asyncio.sleep(0)
        before = self.up if is_up else self.down
        last = self._last_up if is_up else self._last_down
        is_last = last is not None and before + len(piece) >= last
        if last is not None and is_last:
            piece = piece[: max(0, last - before)]
        if is_up:
            self.up += len(piece)
        else:
            self.down += len(piece)
        is_condition = self._condition is not None and self._condition(self)
        if is_condition:
            self._condition = None
        elif not (self.swallows_up if is_up else self.swallows_down):
            writer.write(piece)
            await writer.drain()
        if is_last or is_condition:
            self.cut()
            return False
        return True
