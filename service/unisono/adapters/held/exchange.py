"""One request whose last byte is held back, and the loop that releases many of them."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import h11
import httpcore

from unisono.adapters.held.errors import translated
from unisono.core.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from unisono.adapters.held.stream import HeldStream

# An answer's head is no longer than this.
_LONGEST_HEAD: Final = 100 << 10
_READ_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Head:
    """The head of an answer."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]


class HeldExchange:
    """A request on a connection of its own, held one byte short; then its answer.

    Made by `HeldTransport.stage`, released by `release`.
    """

    def __init__(
        self, *, backend: str, stream: HeldStream, last: bytes, on_over: Callable[[HeldExchange], None]
    ) -> None:
        """`last`: the byte that is kept back. `on_over` is called once, when either side closes the connection."""
        self._backend = backend
        self._on_over = on_over
        self._stream = stream
        self._kept_bytes = len(last)
        # Sends the byte that is kept back; for `release`, which does nothing else while it sends.
        self.send_last: Callable[[], None] = partial(stream.send_last, last)
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LONGEST_HEAD)
        self._is_aborted = False
        self._is_closed = False
        self._was_read = False
        self._unheld = asyncio.Event()
        # When the first byte left this machine, and when the last did; seconds of time.monotonic.
        self.sent_at = 0.0
        self.released_at: float | None = None
        stream.on_over = self._over

    async def stage(self, request: h11.Request, body: bytes, patience_s: float) -> None:
        """Sends all but the last byte. Raises h11's and httpcore's errors."""
        # h11 is not told of the body: when which part of it goes is not its matter, and it reads answers without.
        head = self._http.send(request) or b""
        self.sent_at = time.monotonic()
        await self._stream.send_first(head + body[: -self._kept_bytes], patience_s)
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
        self.let_go()

    async def response(self) -> Head:
        """The head of the answer, which is read once. Raises classes of `core.errors`."""
        if self._was_read:
            raise InternalError(f"backend {self._backend}: the answer of a request was read already")
        self._was_read = True
        await self._unheld.wait()
        with translated(self._backend):
            while not isinstance(event := await self._next_event(), h11.Response):
                pass
        return Head(event.status_code, event.headers.raw_items())

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body of the answer, as it arrives, once its head was read. Raises classes of `core.errors`.

        However it ends, the connection is closed then; closing it early (`contextlib.aclosing`) is one such end.
        """
        try:
            while True:
                with translated(self._backend):
                    event = await self._next_event()
                if isinstance(event, h11.Data):
                    yield bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    return
        finally:
            self.abort()

    async def _next_event(self) -> object:
        """What h11 reads next, once enough has arrived for it."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self._stream.read(_READ_BYTES)
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                raise ConnectionResetError("the server closed the connection without sending a response")
            self._http.receive_data(data)
        return event

    def _over(self) -> None:
        self._on_over(self)
        # An answer that came before the request was whole (a proxy's refusal) is an answer: it waits for its reader.
        if self.released_at is None and not self._stream.has_data:
            self._is_closed = True
            self.let_go()

    def let_go(self) -> None:
        """It is held no more, or never will be released: whoever waits for that goes on."""
        self._unheld.set()


def release(exchanges: Sequence[HeldExchange]) -> tuple[int, int]:
    """Sends the last byte of each, in this order; returns nanoseconds since 1970 before the first and after the last.

    The loop does nothing but send: everything that wakes readers comes after it, and garbage is collected later.
    """
    held = [e for e in exchanges if e.released_at is None and not e.is_closed]
    sends = [(e, e.send_last) for e in held]
    now = time.monotonic
    collects = gc.isenabled()
    gc.disable()
    try:
        first_ns = time.time_ns()
        for exchange, send in sends:
            # Before the byte: a process that is put aside just then must not seem to have released later than it did.
            exchange.released_at = now()
            send()
        last_ns = time.time_ns()
    finally:
        if collects:
            gc.enable()
    for exchange in held:
        exchange.let_go()
    # Of one, the first is the last.
    return first_ns, last_ns if len(sends) > 1 else first_ns
