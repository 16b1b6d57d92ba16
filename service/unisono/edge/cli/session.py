"""One StreamBatch call: items go out within their credit while events come in, and neither waits for the other.

Theory of operation: `run` reads; a task of its own writes. The writer takes items from the feed, cuts them into
messages, and stops where its credit ends; there it releases what it has sent, because only items that end bring new
credit. Where all have ended and brought none, one more goes all the same: its credit is on its way, or the batch is
as large as a batch may be, and the service's refusal says so. `stop` ends the feed and cancels the batch by its id,
which works whatever the stream's state; the reader goes on to the summary. Where that does not come, `give_up`
cancels the call itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import grpc
import grpc.aio
from google.rpc import status_pb2

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc, event_pb2, item_pb2

# Items of one message have at most so many bytes together, unless a single one has more.
_MESSAGE_BYTES = 768 * 1024
# Time for a cancelled batch to tell how its items ended.
_CANCEL_GRACE_S = 5.0


class Feed(Protocol):
    """Where items come from."""

    async def next_items(self) -> list[item_pb2.Item] | None:
        """The next few, in memory's bounds; None at the end. Raises OSError."""
        ...

    def close(self) -> None:
        """Ends it: a waiting `next_items` returns None. Safe at any time."""
        ...


class Listener(Protocol):
    """Who hears what happens."""

    def on_event(self, event: event_pb2.BatchEvent) -> None:
        """An event of the batch."""
        ...

    def on_refusal(self, item_id: str, refusal: status_pb2.Status) -> None:
        """An item was not taken; it will have no result."""
        ...


class BatchSession:
    """Runs one batch over one call."""

    def __init__(
        self,
        stub: batch_inference_pb2_grpc.BatchInferenceStub,
        *,
        config: rpc.BatchConfig,
        feed: Feed,
        listener: Listener,
        cancel_grace_s: float = _CANCEL_GRACE_S,
    ) -> None:
        self._stub = stub
        self._config = config
        self._feed = feed
        self._listener = listener
        self._cancel_grace_s = cancel_grace_s
        self._call: grpc.aio.StreamStreamCall[rpc.StreamBatchRequest, rpc.StreamBatchResponse] | None = None
        # Set whenever the writer's situation may have changed: credit, or the end.
        self._changed = asyncio.Event()
        self._credit = 0
        # Items sent, those refused not counted, as the credit counts.
        self._sent = 0
        # Items that have a result.
        self._ended = 0
        # Items sent since the last release.
        self._unreleased = 0
        self._is_stopping = False
        self._has_given_up = False
        self._failure: Exception | None = None
        self._canceller: asyncio.Task[None] | None = None
        # The service's name for the batch, once it is known.
        self.batch_id = ""
        # All items that were sent.
        self.sent = 0

    async def run(self) -> None:
        """Returns after the summary, or once given up.

        Raises grpc.aio.AioRpcError where the call failed, and what the feed or the listener raised.
        """
        call = self._call = self._stub.StreamBatch()
        writer = asyncio.create_task(self._write(call))
        try:
            while True:
                message = await call.read()
                if not isinstance(message, rpc.StreamBatchResponse):
                    break
                self._hear(message)
        except asyncio.CancelledError:
            # Our own call.cancel() shows as this here; a cancelled task does too, and must go on being cancelled.
            if not self._has_given_up:
                raise
        finally:
            self._end_input()
            if not call.done():
                call.cancel()
            if self._canceller is not None:
                self._canceller.cancel()
            await asyncio.wait([writer])
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Cancels the batch; `run` returns when its items have ended, or soon after."""
        if self._is_stopping:
            return
        self._end_input()
        if self.batch_id:
            self._canceller = asyncio.create_task(self._cancel_batch())
        else:
            self.give_up()

    def give_up(self) -> None:
        """Cancels the call; `run` returns at once."""
        self._end_input()
        self._has_given_up = True
        if self._call is not None:
            self._call.cancel()

    def _end_input(self) -> None:
        self._is_stopping = True
        self._feed.close()
        self._changed.set()

    async def _cancel_batch(self) -> None:
        try:
            request = rpc.CancelBatchRequest(batch_id=self.batch_id)
            await self._stub.CancelBatch(request, timeout=self._cancel_grace_s)
            await asyncio.sleep(self._cancel_grace_s)
        except grpc.aio.AioRpcError:
            pass
        self.give_up()

    def _hear(self, message: rpc.StreamBatchResponse) -> None:
        kind = message.WhichOneof("message")
        if kind == "credit":
            self._credit = max(self._credit, message.credit.total_items)
            self._changed.set()
        elif kind == "items_acknowledged":
            for item in message.items_acknowledged.items:
                if item.HasField("refusal"):
                    self._sent -= 1
                    self._changed.set()
                    self._listener.on_refusal(item.item_id, item.refusal)
        elif kind == "event":
            if message.event.HasField("accepted"):
                self.batch_id = message.event.accepted.batch_id
            elif message.event.HasField("result"):
                self._ended += 1
                self._changed.set()
            self._listener.on_event(message.event)

    async def _write(self, call: grpc.aio.StreamStreamCall[rpc.StreamBatchRequest, rpc.StreamBatchResponse]) -> None:
        async def send(request: rpc.StreamBatchRequest) -> None:
            await call.write(request)

        try:
            opening = rpc.StreamBatchOpen(config=self._config)
            await send(rpc.StreamBatchRequest(open=opening))
            try:
                await self._write_items(send)
            except OSError as error:
                # The file cannot be read any further: what was sent goes on, and the error is told at the end.
                self._failure = error
            if not self._is_stopping:
                await send(rpc.StreamBatchRequest(release=rpc.Release()))
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # The call has ended; the reader hears why.
        except asyncio.CancelledError:
            if not (self._has_given_up or call.done()):
                raise

    async def _write_items(self, send: Callable[[rpc.StreamBatchRequest], Awaitable[None]]) -> None:
        while not self._is_stopping and (items := await self._feed.next_items()) is not None:
            waiting = deque(items)
            while waiting and await self._has_credit(send):
                chunk = self._take(waiting)
                self._sent += len(chunk)
                self._unreleased += len(chunk)
                self.sent += len(chunk)
                await send(rpc.StreamBatchRequest(add_items=rpc.AddItems(items=chunk)))

    async def _has_credit(self, send: Callable[[rpc.StreamBatchRequest], Awaitable[None]]) -> bool:
        """Waits until one more item may be sent; False if none will be any more."""
        while not self._is_stopping and self._sent >= self._credit:
            if 0 < self._sent <= self._ended:
                return True
            self._changed.clear()
            if self._unreleased:
                self._unreleased = 0
                await send(rpc.StreamBatchRequest(release=rpc.Release()))
            else:
                await self._changed.wait()
        return not self._is_stopping

    def _take(self, waiting: deque[item_pb2.Item]) -> list[item_pb2.Item]:
        """As many of the waiting items as the credit and one message allow; at least one."""
        chunk, size = [waiting.popleft()], 0
        size = chunk[0].ByteSize()
        while waiting and len(chunk) < self._credit - self._sent:
            size += waiting[0].ByteSize()
            if size > _MESSAGE_BYTES:
                break
            chunk.append(waiting.popleft())
        return chunk
