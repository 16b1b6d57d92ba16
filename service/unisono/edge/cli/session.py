"""One batch over StreamBatch: items go out within their credit while events come in, and neither waits for the other.

Theory of operation: `run` reads; a task of its own writes. The writer takes items from the feed, cuts them into
messages, and stops where its credit ends; there it releases what it has sent, because only items that end bring new
credit. Where all have ended and brought none, one more goes all the same: its credit is on its way, or the batch is
as large as a batch may be, and the service's refusal says so. `stop` ends the feed and cancels the batch by its id,
which works whatever the stream's state; the reader goes on to the summary. Where that does not come, `give_up`
cancels the call itself.

A connection that is lost is opened again, as long as `Patience` says: the batch is reopened after the last event that
was taken whole, and items that were not acknowledged are sent again, which does no harm where they had arrived. For
that the service keeps a batch whose caller is lost; so one that is left on purpose is cancelled by its id.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Protocol

import grpc
import grpc.aio
from google.rpc import status_pb2

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc, event_pb2, item_pb2
from unisono.edge.cli.errors import StopError, problem_of_call
from unisono.edge.cli.patience import DETACH_GRACE_S, EndedEarlyError, Patience, is_lost

# Items of one message have at most so many bytes together, unless a single one has more.
_MESSAGE_BYTES = 768 * 1024
# Time for a cancelled batch to tell how its items ended.
_CANCEL_GRACE_S = 5.0
# And to hear that it is left.
_GOODBYE_S = 2.0

_Call = grpc.aio.StreamStreamCall[rpc.StreamBatchRequest, rpc.StreamBatchResponse]


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

    def on_connection(self, text: str) -> None:
        """The connection was lost, or is there again."""
        ...


class LostError(Exception):
    """The connection was lost, and could not be had again; the batch may still be there."""


class BatchSession:
    """Runs one batch, over as many calls as it takes."""

    def __init__(
        self,
        stub: batch_inference_pb2_grpc.BatchInferenceStub,
        *,
        config: rpc.BatchConfig,
        feed: Feed,
        listener: Listener,
        give_up_after_s: float,
        cancel_grace_s: float = _CANCEL_GRACE_S,
    ) -> None:
        self._stub = stub
        self._config = rpc.BatchConfig()
        self._config.CopyFrom(config)
        self._config.on_disconnect = rpc.ON_DISCONNECT_DETACH
        self._config.detach_grace.FromNanoseconds(round(DETACH_GRACE_S * 1e9))
        self._feed = feed
        self._listener = listener
        self._cancel_grace_s = cancel_grace_s
        self._give_up_after_s = give_up_after_s
        self._patience = Patience(give_up_after_s)
        self._is_lost = False
        self._call: _Call | None = None
        # Set whenever the writer's situation may have changed: credit, or the end.
        self._changed = asyncio.Event()
        self._credit = 0
        # A piece of the file that is being read, and whether there will be no more of them.
        self._reading: asyncio.Task[list[item_pb2.Item] | None] | None = None
        self._has_read_all = False
        # Items that were read and not sent; so many at the front were sent on a connection that was lost.
        self._waiting: deque[item_pb2.Item] = deque()
        self._again = 0
        # Items that were sent and not acknowledged, in their order.
        self._unacked: deque[item_pb2.Item] = deque()
        # Items sent, those refused not counted, as the credit counts.
        self._sent = 0
        # Items that have a result.
        self._ended = 0
        # Items sent since the last release.
        self._unreleased = 0
        self._is_stopping = False
        self._has_given_up = asyncio.Event()
        self._is_over = False
        self._is_known = asyncio.Event()
        self._failure: Exception | None = None
        self._canceller: asyncio.Task[None] | None = None
        # The service's name for the batch, once it is known.
        self.batch_id = ""
        # The last event that was taken whole: the parts of a result count when it is there.
        self.last_sequence = 0
        # All items that were sent.
        self.sent = 0

    async def run(self) -> None:
        """Returns after the summary, or once given up.

        Raises LostError; grpc.aio.AioRpcError where the call failed otherwise, or before the batch was known; and
        what the feed or the listener raised.
        """
        try:
            while not self._is_done:
                try:
                    await self._connect()
                except (grpc.aio.AioRpcError, EndedEarlyError) as error:
                    if not self._is_done:
                        await self._pause(error)
        except LostError:
            raise
        except BaseException as error:
            # Somebody else has the batch where its stream was replaced; any other that is left is cancelled.
            if not (isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.ABORTED):
                await self._say_goodbye()
            raise
        finally:
            self._end_input()
            if self._canceller is not None:
                self._canceller.cancel()
            if self._reading is not None:
                _ = await asyncio.gather(self._reading, return_exceptions=True)
        if self._failure is not None:
            raise self._failure

    @property
    def _is_done(self) -> bool:
        return self._is_over or self._has_given_up.is_set()

    async def _connect(self) -> None:
        """One connection, to the end of the batch. Raises where it ends before."""
        call = self._call = self._stub.StreamBatch()
        writer = asyncio.create_task(self._write(call, self._opening()))
        try:
            while True:
                message = await call.read()
                if not isinstance(message, rpc.StreamBatchResponse):
                    break
                self._hear(message)
        except asyncio.CancelledError:
            # Our own call.cancel() shows as this here; a cancelled task does too, and must go on being cancelled.
            if not self._has_given_up.is_set():
                raise
        finally:
            if not call.done():
                call.cancel()
            writer.cancel()
            await asyncio.wait([writer])
        if not writer.cancelled():
            writer.result()
        if not self._is_done:
            raise EndedEarlyError("the stream ended before the batch")

    async def _pause(self, error: grpc.aio.AioRpcError | EndedEarlyError) -> None:
        """Returns when it is time to open the batch again; raises where that is of no use."""
        why = problem_of_call(error).message if isinstance(error, grpc.aio.AioRpcError) else str(error)
        if not is_lost(error) or (not self.batch_id and isinstance(error, grpc.aio.AioRpcError)):
            raise error
        pause_s = self._patience.lost() if self.batch_id else None
        if pause_s is None:
            raise LostError(why) from error
        if not self._is_lost:
            self._is_lost = True
            self._listener.on_connection(
                f"the connection was lost ({why}); batch {self.batch_id} goes on, and so does this command once "
                f"it is back, for up to {self._give_up_after_s:g} s"
            )
        with suppress(TimeoutError):
            _ = await asyncio.wait_for(self._has_given_up.wait(), pause_s)

    def stop(self) -> None:
        """Cancels the batch; `run` returns when its items have ended, or soon after."""
        if self._is_stopping:
            return
        self._end_input()
        self._canceller = asyncio.create_task(self._cancel_batch())

    def give_up(self) -> None:
        """Cancels the call; `run` returns at once."""
        self._end_input()
        self._has_given_up.set()
        if self._call is not None:
            self._call.cancel()

    def _end_input(self) -> None:
        self._is_stopping = True
        self._feed.close()
        self._changed.set()

    async def _cancel_batch(self) -> None:
        with suppress(grpc.aio.AioRpcError, TimeoutError):
            _ = await asyncio.wait_for(self._is_known.wait(), self._cancel_grace_s)
            request = rpc.CancelBatchRequest(batch_id=self.batch_id)
            await self._stub.CancelBatch(request, timeout=self._cancel_grace_s)
            await asyncio.sleep(self._cancel_grace_s)
        self.give_up()

    async def _say_goodbye(self) -> None:
        if self.batch_id and self._canceller is None:
            with suppress(grpc.aio.AioRpcError):
                request = rpc.CancelBatchRequest(batch_id=self.batch_id)
                await self._stub.CancelBatch(request, timeout=_GOODBYE_S)

    # -- In ------------------------------------------------------------------------------------------------

    def _hear(self, message: rpc.StreamBatchResponse) -> None:
        if self._is_lost:
            self._is_lost = False
            self._listener.on_connection("the connection is there again")
        kind = message.WhichOneof("message")
        if kind == "credit":
            self._credit = max(self._credit, message.credit.total_items)
            self._changed.set()
            return
        # Credit is told on every connection: one that brings nothing else is no better than none.
        self._patience.regained()
        if kind == "items_acknowledged":
            for item in message.items_acknowledged.items:
                if self._unacked:
                    _ = self._unacked.popleft()
                if item.HasField("refusal"):
                    self._sent -= 1
                    self._changed.set()
                    self._listener.on_refusal(item.item_id, item.refusal)
        elif kind == "event":
            self._hear_event(message.event)

    def _hear_event(self, event: event_pb2.BatchEvent) -> None:
        if event.HasField("accepted"):
            self.batch_id = event.accepted.batch_id
            self._is_known.set()
        elif event.HasField("result"):
            self._ended += 1
            self._changed.set()
        elif event.HasField("summary"):
            self._is_over = True
        self._listener.on_event(event)
        if event.HasField("sequence") and not event.HasField("result_part"):
            self.last_sequence = event.sequence

    # -- Out -----------------------------------------------------------------------------------------------

    def _opening(self) -> rpc.StreamBatchOpen:
        """The first message of a connection; what was not acknowledged on the one before goes again behind it."""
        if not self.batch_id:
            return rpc.StreamBatchOpen(config=self._config)
        self._again += len(self._unacked)
        self._sent -= len(self._unacked)
        self._waiting.extendleft(reversed(self._unacked))
        self._unacked.clear()
        # Also a release may have been lost.
        self._unreleased = self._sent
        reopen = rpc.ReopenBatch(batch_id=self.batch_id, after_sequence=self.last_sequence)
        return rpc.StreamBatchOpen(reopen=reopen)

    async def _write(self, call: _Call, opening: rpc.StreamBatchOpen) -> None:
        try:
            await call.write(rpc.StreamBatchRequest(open=opening))
            await self._write_items(call)
            if not self._is_stopping:
                await call.write(rpc.StreamBatchRequest(release=rpc.Release()))
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # The call has ended; the reader hears why.
        except asyncio.CancelledError:
            if not (self._has_given_up.is_set() or call.done()):
                raise

    async def _write_items(self, call: _Call) -> None:
        while not self._is_stopping and (self._waiting or await self._read()):
            if not await self._has_credit(call):
                return
            chunk = self._take()
            again = min(self._again, len(chunk))
            self._again -= again
            self.sent += len(chunk) - again
            self._sent += len(chunk)
            self._unreleased += len(chunk)
            self._unacked.extend(chunk)
            await call.write(rpc.StreamBatchRequest(add_items=rpc.AddItems(items=chunk)))

    async def _read(self) -> bool:
        """Reads on; False at the end. What is read outlives the connection that it was read for."""
        if self._has_read_all:
            return False
        if self._reading is None:
            self._reading = asyncio.create_task(self._feed.next_items())
        items: list[item_pb2.Item] | None = None
        try:
            items = await asyncio.shield(self._reading)
        except (OSError, StopError) as error:
            # The file cannot be read any further, or nobody reads what is wrong with it: what was sent goes on, and
            # the error is told at the end.
            self._failure = error
        self._reading = None
        self._has_read_all = items is None
        self._waiting.extend(items or ())
        return items is not None

    async def _has_credit(self, call: _Call) -> bool:
        """Waits until one more item may be sent; False if none will be any more."""
        while not self._is_stopping and self._sent >= self._credit:
            if 0 < self._sent <= self._ended:
                return True
            self._changed.clear()
            if self._unreleased:
                self._unreleased = 0
                await call.write(rpc.StreamBatchRequest(release=rpc.Release()))
            else:
                await self._changed.wait()
        return not self._is_stopping

    def _take(self) -> list[item_pb2.Item]:
        """As many of the waiting items as the credit and one message allow; at least one."""
        chunk = [self._waiting.popleft()]
        size = chunk[0].ByteSize()
        while self._waiting and len(chunk) < self._credit - self._sent:
            size += self._waiting[0].ByteSize()
            if size > _MESSAGE_BYTES:
                break
            chunk.append(self._waiting.popleft())
        return chunk
