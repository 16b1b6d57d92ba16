"""One request whose last byte is held back, and the loop that releases many of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from typing import TYPE_CHECKING

import httpcore

from unisono.adapters.held.errors import translated
from unisono.core.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from unisono.adapters.held.stream import HeldStream


class HeldBody:
    """A request's body as httpcore wants it: all but the last byte; then, after the release, that byte.

    Not an async generator: such a one needs a task of its own to be closed when it is dropped half way.
    """

    def __init__(self, body: bytes) -> None:
        loop = asyncio.get_running_loop()
        # The byte that is kept back.
        self.last = body[-1:]
        self._parts = [self.last, body[:-1]]
        # Done when httpcore has passed on everything but the last byte.
        self.is_collected: asyncio.Future[None] = loop.create_future()
        # Done when the last byte may be counted as sent.
        self.is_released: asyncio.Future[None] = loop.create_future()

    def __aiter__(self) -> HeldBody:
        return self

    async def __anext__(self) -> bytes:
        if not self._parts:
            raise StopAsyncIteration
        if len(self._parts) == 1:
            if not self.is_collected.done():
                self.is_collected.set_result(None)
            await self.is_released
        return self._parts.pop()


class HeldExchange:
    """A request on a connection of its own, held one byte short; then its answer.

    Made by `HeldTransport.stage`, released by `release`.
    """

    def __init__(
        self,
        *,
        backend: str,
        stream: HeldStream,
        origin: httpcore.Origin,
        request: httpcore.Request,
        body: HeldBody,
        on_over: Callable[[HeldExchange], None],
    ) -> None:
        """`on_over` is called once, when the connection is closed by either side."""
        self._backend = backend
        self._on_over = on_over
        self._stream = stream
        self._body = body
        self._is_aborted = False
        self._is_closed = False
        self._was_read = False
        self._unheld = asyncio.Event()
        # When the first byte left this machine, and when the last did; seconds of time.monotonic.
        self.sent_at = 0.0
        self.released_at: float | None = None
        stream.on_over = self._over
        self._connection = httpcore.AsyncHTTP11Connection(origin=origin, stream=stream)
        self._answer = asyncio.get_running_loop().create_task(self._connection.handle_async_request(request))
        self._answer.add_done_callback(self._answered)

    async def stage(self, patience_s: float) -> None:
        """Sends all but the last byte. Raises httpcore's errors."""
        await self._body.is_collected
        self.sent_at = time.monotonic()
        await self._stream.flush(patience_s)
        if self._is_closed:
            raise httpcore.WriteError("the connection was closed while the request was being sent")

    @property
    def held_s(self) -> float:
        """For how long the request was under way before its last byte left; 0 while it is held."""
        return 0.0 if self.released_at is None else self.released_at - self.sent_at

    @property
    def is_closed(self) -> bool:
        """Whether the other side closed the connection while it was held and silent, or `abort` was called."""
        return self._is_closed or self._is_aborted

    async def wait_closed(self) -> None:
        """Returns when the other side closes the held connection without an answer, or at release or abort."""
        await self._unheld.wait()

    def abort(self) -> None:
        """Closes the connection at once."""
        self._is_aborted = True
        self._stream.abort()
        self._unheld.set()
        self._let_go()

    async def response(self) -> httpcore.Response:
        """The head of the answer, which is read once. Raises classes of `core.errors`."""
        if self._was_read:
            raise InternalError(f"backend {self._backend}: the answer of a request was read already")
        self._was_read = True
        with translated(self._backend):
            return await self._answer

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body of the answer, as it arrives, once its head was read. Raises classes of `core.errors`.

        However it ends, the connection is closed then; closing it early (`contextlib.aclosing`) is one such end.
        """
        with translated(self._backend):
            response = await self._answer
        chunks = aiter(response.aiter_stream())
        try:
            while True:
                with translated(self._backend):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            self.abort()
            # Nothing more can arrive, so this ends at once: httpcore's generators come to an end of their own, and
            # are not left to the garbage collector.
            with contextlib.suppress(Exception):
                async for _ in chunks:
                    pass

    def _over(self) -> None:
        self._on_over(self)
        # An answer that came before the request was whole (a proxy's refusal) is an answer: it waits for its reader.
        if self.released_at is None and not self._stream.has_data:
            self._is_closed = True
            self._unheld.set()
            # Nobody need abort it: httpcore finds the connection closed, and its task ends.
            self._let_go()

    def _answered(self, answer: asyncio.Task[httpcore.Response]) -> None:
        # Looks at the exception, so that asyncio does not complain where nobody wants the answer.
        error = None if answer.cancelled() else answer.exception()
        if not self._body.is_collected.done():
            self._body.is_collected.set_exception(error or httpcore.LocalProtocolError("the request ended early"))

    def _let_go(self) -> None:
        if not self._body.is_released.done():
            self._body.is_released.set_result(None)

    def _released(self) -> None:
        self._unheld.set()
        self._let_go()


def release(exchanges: Sequence[HeldExchange]) -> tuple[int, int]:
    """Sends the last byte of each, in this order; returns nanoseconds since 1970 before the first and after the last.

    The loop does nothing but send: everything that wakes readers comes after it, and garbage is collected later.
    """
    held = [e for e in exchanges if e.released_at is None and not e.is_closed]
    sends = [(e, e._stream.send_last, e._body.last) for e in held]  # noqa: SLF001 - this loop is the class's own
    now = time.monotonic
    collects = gc.isenabled()
    gc.disable()
    try:
        first_ns = time.time_ns()
        for exchange, send, last in sends:
            # Before the byte: a process that is put aside just then must not seem to have released later than it did.
            exchange.released_at = now()
            send(last)
        last_ns = time.time_ns()
    finally:
        if collects:
            gc.enable()
    for exchange in held:
        exchange._released()  # noqa: SLF001 - as above: the other half of this loop
    return first_ns, last_ns
