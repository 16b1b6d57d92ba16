"""A batch whose items are added while results flow back, over connections that may be lost.

    async with client.session(model="llama3.2") as session:
        await session.add("Why is the sky blue?", Chat("Hello", item_id="greeting"))
        await session.close_input()
        async for result in session:
            print(result.item_id, result.content)

Adding never waits for reading: 10,000 items may be added before the first result is read. Memory is bounded:

- each item that was added, until the service has acknowledged it: at most as many as a batch may have (50,000);
- 1,000 results that were not read, or 64 MiB of them. Then nothing more is read from the connection, and results
  wait in the service's journal (256 MiB a batch; when that is full, the batch's work pauses).

A lost connection is opened again, by itself: results go on after the last one that came, items that were not
acknowledged are sent again. The caller notices nothing, unless the service stays away (`UnreachableError`) or
has forgotten the batch (`BatchLostError`). So is one on which not even the service's heartbeats are heard any more.

An item that the batch cannot take is a value, too: a result of the state REFUSED.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Final, Protocol, Self

import grpc
import grpc.aio

from unisono_client._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono_client.errors import ClosedError
from unisono_client.follow import cancel_batch, say_goodbye
from unisono_client.items import Item, to_message
from unisono_client.ledger import Ledger
from unisono_client.patience import EndedEarlyError, Patience, in_time
from unisono_client.results import Report, Result
from unisono_client.transport import Transport

_Call = grpc.aio.StreamStreamCall[pb.StreamBatchRequest, pb.StreamBatchResponse]

# Results that were not read: beyond, the connection is not read either.
MAX_UNREAD: Final = 1_000
MAX_UNREAD_BYTES: Final = 64 * 1024 * 1024
# After so many items that were added in one go, others have the event loop for a moment.
_ADDED_AT_ONCE: Final = 100


class Leavable(Protocol):
    """What is under way, and can be left."""

    async def aclose(self) -> None:
        """Leaves it."""


class Session:
    """One batch. Made by `Client.session`; to be used in one event loop."""

    def __init__(
        self,
        transport: Transport,
        config: pb.BatchConfig,
        *,
        give_up_after_s: float,
        metadata: Sequence[tuple[str, str | bytes]],
        is_cancelled_when_left: bool,
        releases_itself: bool,
        open_ones: set[Leavable],
    ) -> None:
        """While it has a connection, it is one of the `open_ones`."""
        self._open_ones = open_ones
        self._transport = transport
        self._give_up_after_s = give_up_after_s
        self._patience = Patience(transport.target, give_up_after_s, is_secure=transport.is_secure)
        self._metadata = metadata
        self._is_cancelled_when_left = is_cancelled_when_left
        self._may_send = asyncio.Event()
        self._ledger = Ledger(config, self._may_send.set, releases_itself=releases_itself)
        # Results that nobody has read, with about how many bytes each takes.
        self._unread: deque[tuple[Result, int]] = deque()
        self._unread_bytes = 0
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._has_sent = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._is_over = False

    # -- What the caller does ------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def add(self, *items: Item) -> None:
        """More items; never waits for the service, or for results that were not read.

        Raises RefusedError (INVALID_REQUEST) for what cannot be put into a message, and ClosedError after
        `close_input`.
        """
        for number, item in enumerate(items, 1):
            if self._ledger.is_closed:
                raise ClosedError("the session takes no more items: its input was closed")
            refusal = self._ledger.add(to_message(item, self._ledger.added))
            if refusal is not None:
                self._tell([refusal], 0)
            if number % _ADDED_AT_ONCE == 0:
                await asyncio.sleep(0)
        self._start()

    async def release(self) -> None:
        """What was added goes now, and does not wait for the batch's `release` policy."""
        self._ledger.say(pb.StreamBatchRequest(release=pb.Release()))

    async def cancel(self, *item_ids: str) -> None:
        """Cancels items, whose results still come; without ids all of them, and no more are taken."""
        if self._ledger.is_half_closed and self.batch_id:
            await cancel_batch(self._transport, self._give_up_after_s, self._metadata, self.batch_id, item_ids)
        else:
            self._ledger.say(pb.StreamBatchRequest(cancel_items=pb.CancelItems(item_ids=item_ids)))

    async def close_input(self) -> None:
        """No more items will be added: the batch ends when those that were added have ended."""
        self._ledger.close()
        self._start()

    async def __aiter__(self) -> AsyncGenerator[Result, None]:
        """The results, as items finish, until the batch has ended: for that, its input must have been closed."""
        while results := await self.take():
            for result in results:
                yield result

    async def take(self, *, waits: bool = True) -> list[Result]:
        """All results that are there and were not read; waits for one. Empty: the batch has ended.

        With `waits` false, empty: there is none yet.

        Raises UnreachableError, BatchLostError or RefusedError where the batch cannot go on.
        """
        while not self._unread:
            if self._failure is not None:
                raise self._failure
            if self._is_over or not waits:
                return []
            self._start()
            self._has_news.clear()
            _ = await self._has_news.wait()
        results = [result for result, _ in self._unread]
        self._unread.clear()
        self._unread_bytes = 0
        self._has_room.set()
        return results

    async def until_unsent_below(self, count: int) -> None:
        """Returns when fewer items wait to be sent, or when the batch has ended; raises as `take`."""
        while self._ledger.unsent >= count and not self._is_over:
            if self._failure is not None:
                raise self._failure
            self._has_sent.clear()
            _ = await self._has_sent.wait()

    @property
    def is_over(self) -> bool:
        """Whether the batch has ended; results may be there that were not read."""
        return self._is_over

    @property
    def batch_id(self) -> str:
        """The service's name for the batch; "" until it was accepted."""
        return self._ledger.batch_id

    @property
    def report(self) -> Report | None:
        """The figures of the batch, once it has ended; None for good where only they were lost."""
        return self._ledger.report

    @property
    def added(self) -> int:
        """Items that were added."""
        return self._ledger.added

    @property
    def outstanding(self) -> int:
        """Results that are still to come, of what was added; those that were not read are there."""
        return self._ledger.outstanding

    @property
    def unsent(self) -> int:
        """Items that were added and not yet sent, for want of credit or time."""
        return self._ledger.unsent

    async def aclose(self) -> None:
        """Leaves the batch: it is cancelled if it has not ended, unless `on_disconnect` is DETACH."""
        driver, self._driver = self._driver, None
        if driver is None:
            self._failure = self._failure or ClosedError("the session was left")
            return
        has_failed = driver.done() and not self._is_over
        _ = driver.cancel()
        _ = await asyncio.wait({driver})
        self._failure = self._failure or ClosedError("the session was left")
        self._wake_all()
        if has_failed:
            await self._say_goodbye()

    def abandon(self) -> None:
        """Leaves the batch as `aclose` does, and does not wait for that."""
        if self._driver is not None:
            _ = self._driver.cancel()

    def fail(self, error: Exception) -> None:
        """What waits for results, or will, is told of this once it has read those that are there."""
        self._failure = self._failure or error
        self._wake_all()

    # -- The connection ------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._driver is None and self._failure is None:
            self._driver = asyncio.get_running_loop().create_task(self._drive())
            # Who has it is known to somebody: a task that nobody holds may be collected before it has ended.
            self._open_ones.add(self)
            self._driver.add_done_callback(lambda _: self._open_ones.discard(self))

    async def _drive(self) -> None:
        """Keeps a connection until the batch has ended, or cannot go on."""
        try:
            while self._ledger.report is None:
                try:
                    await self._connect()
                except Exception as error:  # noqa: BLE001  # what cannot be tried again is raised by `lost`
                    await self._patience.lost(
                        error, batch_id=self._ledger.batch_id, after_sequence=self._ledger.last_sequence
                    )
            self._is_over = True
        except asyncio.CancelledError:
            # Also where the client was closed, and its calls with it; or where the event loop ends.
            self._failure = self._failure or ClosedError("the client or its session was closed")
            self._wake_all()
            await self._say_goodbye()
            raise
        except Exception as error:  # noqa: BLE001  # the caller hears of it where it waits for results
            if self._ledger.is_answered:
                # All that is lost is the report.
                self._is_over = True
            else:
                self._failure = error
        finally:
            self._wake_all()

    async def _say_goodbye(self) -> None:
        if self._is_cancelled_when_left and self._ledger.batch_id:
            await say_goodbye(self._transport, self._metadata, self._ledger.batch_id)

    def _wake_all(self) -> None:
        self._has_news.set()
        self._has_sent.set()

    async def _connect(self) -> None:
        """One connection. Returns when the batch has ended; raises where the connection is lost."""
        call: _Call = self._transport.stub.StreamBatch(metadata=self._metadata)
        writer = asyncio.get_running_loop().create_task(self._write(call, self._ledger.open()))
        try:
            while self._ledger.report is None:
                _ = await self._has_room.wait()
                response = await in_time(call.read())
                if not isinstance(response, pb.StreamBatchResponse):
                    # The end. Read before it was told: a status that is an error is raised by `read`.
                    raise EndedEarlyError("the stream ended before its batch did")
                if response.WhichOneof("message") != "credit":
                    # Credit is told on every connection: one that brings nothing else is no better than none.
                    self._patience.regained()
                heard = self._ledger.hear(response)
                if heard.results:
                    self._tell(heard.results, heard.size_bytes)
        finally:
            _ = writer.cancel()
            _ = call.cancel()
            _ = await asyncio.wait({writer})

    async def _write(self, call: _Call, opening: pb.StreamBatchRequest) -> None:
        """Sends what there is to send, as the credit allows."""
        # That a call is over is noticed where it is read, with its status.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(opening)
            while True:
                self._may_send.clear()
                while (message := self._ledger.next()) is not None:
                    await call.write(message)
                    self._has_sent.set()
                if self._ledger.is_to_half_close():
                    await call.done_writing()
                    return
                _ = await self._may_send.wait()

    def _tell(self, results: Sequence[Result], size_bytes: int) -> None:
        """Puts results where the caller reads them."""
        share = size_bytes // len(results)
        self._unread.extend((result, share) for result in results)
        self._unread_bytes += size_bytes
        if len(self._unread) >= MAX_UNREAD or self._unread_bytes >= MAX_UNREAD_BYTES:
            self._has_room.clear()
        self._has_news.set()
