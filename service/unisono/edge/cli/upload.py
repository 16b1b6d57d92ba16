"""A file that is too large for one message becomes a kept batch over StreamBatch, piece by piece.

Theory of operation. The batch is opened under its request's name, so that opening it again finds it. Items go as the
credit allows, and wait here until they are acknowledged, which is when they are on the service's disk. Where the
connection is lost, the batch is opened again, and what was not acknowledged is sent again: the service knows what it
has. When all are acknowledged, the input is closed, and the service is asked whether it knows of that: then the
stream is left, and the batch goes on without it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import grpc
import grpc.aio

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.edge.cli.connect import Connection
from unisono.edge.cli.errors import ExitCode, StopError, problem_of_call, problem_of_status
from unisono.edge.cli.kept import PATIENCE_S, stop_for_kept
from unisono.edge.cli.patience import DETACH_GRACE_S, GIVE_UP_AFTER_S, EndedEarlyError, Patience, is_lost
from unisono.edge.cli.session import Feed

# Items of one message, and those that were sent and are not acknowledged, have at most so many bytes together, unless
# a single one has more.
_MESSAGE_BYTES = 768 * 1024
_UNACKED_BYTES = 8 * 1024 * 1024
# How often the service is asked whether it knows that all has come.
_LOOK_S = 0.05

_Call = grpc.aio.StreamStreamCall[rpc.StreamBatchRequest, rpc.StreamBatchResponse]


class Upload:
    """Brings one file to the service."""

    def __init__(
        self,
        connection: Connection,
        request: rpc.SubmitBatchRequest,
        feed: Feed,
        *,
        is_ours: bool,
        on_kept: Callable[[int], None],
        on_connection: Callable[[str], None],
    ) -> None:
        """`request`: what applies to the batch, and its request's name; its items come from the feed.

        `is_ours`: nobody else knows that name, so that the batch goes with this upload. `on_kept` is told how
        many items are on the service's disk; `on_connection`, that it is lost, or back.
        """
        self._stub = connection.stub
        self._target = connection.target
        config = rpc.BatchConfig()
        config.CopyFrom(request.config)
        config.detach_grace.FromNanoseconds(round(DETACH_GRACE_S * 1e9))
        self._open = rpc.StreamBatchOpen(config=config, durable=True, metadata=request.metadata)
        self._feed = feed
        self._is_ours = is_ours
        self._on_kept = on_kept
        self._on_connection = on_connection
        self._patience = Patience(GIVE_UP_AFTER_S)
        self._is_lost = False
        self._batch_id = ""
        self._has_ended = False
        self._last_sequence = 0
        # Items that were read and not sent, and that were sent and not acknowledged.
        self._waiting: deque[item_pb2.Item] = deque()
        self._unacked: deque[item_pb2.Item] = deque()
        self._unacked_bytes = 0
        self._kept = 0
        self._has_read_all = False
        self._credit = 0
        # Set whenever something of the above has changed.
        self._changed = asyncio.Event()

    async def run(self) -> str:
        """Returns when all items are kept, and no more will come: with the batch's id. Raises StopError, OSError."""
        try:
            while True:
                try:
                    return await self._connect()
                except (grpc.aio.AioRpcError, EndedEarlyError) as error:
                    if self._has_ended and not self._kept:
                        # The same request made it before, and it has all that it ever will.
                        return self._batch_id
                    await self._pause(error)
        except (asyncio.CancelledError, StopError, OSError):
            # What is there of it would be run by itself.
            await asyncio.shield(self._give_up())
            raise
        finally:
            self._feed.close()

    async def _give_up(self) -> None:
        if self._batch_id and self._is_ours and not self._is_lost:
            with suppress(grpc.aio.AioRpcError):
                _ = await self._stub.CancelBatch(rpc.CancelBatchRequest(batch_id=self._batch_id), timeout=2.0)

    async def _connect(self) -> str:
        """One connection, to the end of the upload; raises where it ends before."""
        self._waiting.extendleft(reversed(self._unacked))
        self._unacked.clear()
        self._unacked_bytes = self._credit = 0
        opening = self._open
        if self._batch_id:
            reopen = rpc.ReopenBatch(batch_id=self._batch_id, after_sequence=self._last_sequence)
            opening = rpc.StreamBatchOpen(reopen=reopen)
        call = self._stub.StreamBatch()
        reader = asyncio.create_task(self._read(call))
        try:
            await self._write(call, opening, reader)
            return self._batch_id
        finally:
            _ = call.cancel()
            _ = reader.cancel()
            _ = await asyncio.wait([reader])

    async def _write(self, call: _Call, opening: rpc.StreamBatchOpen, reader: asyncio.Task[None]) -> None:
        """Sends all, and returns when the service has it; raises what ends the call."""
        try:
            await call.write(rpc.StreamBatchRequest(open=opening))
            while self._waiting or await self._read_on():
                await self._until(lambda: self._may_send, reader)
                some = self._take()
                await call.write(rpc.StreamBatchRequest(add_items=rpc.AddItems(items=some)))
            await self._until(lambda: not self._unacked and bool(self._batch_id), reader)
            await call.done_writing()
        except asyncio.InvalidStateError:
            # The call has ended; the reader knows why.
            await reader
            raise EndedEarlyError("the stream ended before all was sent") from None
        request = rpc.GetBatchRequest(batch_id=self._batch_id)
        while (await self._stub.GetBatch(request, timeout=PATIENCE_S)).batch.input_open:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(_LOOK_S)

    async def _until(self, is_true: Callable[[], bool], reader: asyncio.Task[None]) -> None:
        """Waits for what the reader hears; raises what has ended it."""
        while not is_true():
            self._changed.clear()
            changed = asyncio.create_task(self._changed.wait())
            _ = await asyncio.wait([changed, reader], return_when=asyncio.FIRST_COMPLETED)
            _ = changed.cancel()
            if reader.done():
                reader.result()
                if not is_true():
                    raise EndedEarlyError("the stream ended before all was acknowledged")

    @property
    def _may_send(self) -> bool:
        return self._kept + len(self._unacked) < self._credit and self._unacked_bytes < _UNACKED_BYTES

    async def _read_on(self) -> bool:
        """Reads more of the file; False at its end."""
        if self._has_read_all:
            return False
        items = await self._feed.next_items()
        self._has_read_all = items is None
        self._waiting.extend(items or ())
        return items is not None

    def _take(self) -> list[item_pb2.Item]:
        """As many as one message and the credit allow; at least one."""
        some: list[item_pb2.Item] = []
        size = 0
        while self._waiting and (not some or self._kept + len(self._unacked) < self._credit):
            more = self._waiting[0].ByteSize()
            if some and size + more > _MESSAGE_BYTES:
                break
            size += more
            some.append(self._waiting.popleft())
            self._unacked.append(some[-1])
        self._unacked_bytes += size
        return some

    async def _read(self, call: _Call) -> None:
        try:
            while isinstance(message := await call.read(), rpc.StreamBatchResponse):
                self._hear(message)
        finally:
            self._changed.set()

    def _hear(self, message: rpc.StreamBatchResponse) -> None:
        self._patience.regained()
        if self._is_lost:
            self._is_lost = False
            self._on_connection("the connection is there again")
        match message.WhichOneof("message"):
            case "credit":
                self._credit = max(self._credit, message.credit.total_items)
            case "items_acknowledged":
                for ack in message.items_acknowledged.items:
                    self._acknowledge(ack)
                self._on_kept(self._kept)
            case "event":
                self._note(message.event)
            case _:
                pass
        self._changed.set()

    def _acknowledge(self, ack: rpc.ItemAcknowledged) -> None:
        if ack.HasField("refusal"):
            problem = problem_of_status(ack.refusal)
            raise StopError(
                f"The service at {self._target} does not take item {ack.item_id!r}: {problem.message} "
                f"({problem.reason}).",
                "The batch is cancelled." if self._is_ours else "What was taken before it is kept.",
                code=ExitCode.USAGE,
            )
        # One item may have several answers, each with an acknowledgement, one after the other.
        name = self._unacked[0].item_id if self._unacked else ""
        if self._unacked and ack.item_id in (name, f"{name}#1"):
            self._unacked_bytes -= self._unacked.popleft().ByteSize()
            self._kept += 1

    def _note(self, event: event_pb2.BatchEvent) -> None:
        if event.HasField("accepted"):
            self._batch_id = event.accepted.batch_id
        if event.HasField("summary"):
            self._has_ended = True
        if event.HasField("sequence") and not event.HasField("result_part"):
            self._last_sequence = event.sequence

    async def _pause(self, error: grpc.aio.AioRpcError | EndedEarlyError) -> None:
        """Returns when it is time for another try; raises StopError where that is of no use."""
        why = str(error)
        if self._has_ended:
            raise StopError(
                f"The batch {self._batch_id} ended when it had {self._kept:,} items of the file.",
                "Somebody cancelled it, or its deadline passed: unisono status tells.",
                code=ExitCode.ITEMS_FAILED,
            )
        if isinstance(error, grpc.aio.AioRpcError):
            problem = problem_of_call(error)
            why = problem.message
            # What is being stopped has a successor.
            if not is_lost(error) and problem.reason != "SHUTTING_DOWN":
                raise stop_for_kept(error, self._target) from None
        if not self._is_lost:
            self._is_lost = True
            self._on_connection(f"the connection was lost ({why}); what is kept stays, and the rest follows")
        pause_s = self._patience.lost()
        if pause_s is None:
            again = self._open.config.request_id
            raise StopError(
                f"The service at {self._target}: the connection was lost: {why}",
                f"Of the file, {self._kept:,} items are kept. Within {DETACH_GRACE_S / 60:g} minutes, the same "
                f"command with --request-id {again} goes on; after that, the batch is of these items alone.",
                code=ExitCode.UNREACHABLE,
            )
        await asyncio.sleep(pause_s)
