"""One StreamBatch call: items come in while events go out.

Three tasks share the call. The *reader* takes what the caller sends, whether or not the caller reads. The *writer*
follows the batch. The *acknowledger* writes what became of added items, and each event is written behind the
acknowledgements that were due before it, so that no item has a result before it was acknowledged.

What waits to be written is bounded: events stay in the journal, text is an offset, credit is a number, and
acknowledgements are counted: a caller that sends more than any batch takes, and reads none of them, is not read on.

A connection that is cut looks like the caller's half-close at first: both end what comes in. Only a message that
goes out tells them apart, so the input is closed when one has.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import aclosing
from typing import TYPE_CHECKING

import grpc.aio

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono.app.follow import follow
from unisono.core.errors import InvalidRequestError, StreamReplacedError, UnisonoError, Violation
from unisono.core.events import Journalled, PassingEvent, Result
from unisono.edge.contract import convert_in, convert_out

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from unisono.app.durable import DurableBatches
    from unisono.app.ports import Clock
    from unisono.app.run_batch import RunningBatch
    from unisono.core.batch import Ack, DeltaSettings
    from unisono.core.limits import Limits

# Acknowledgements of one message: some hundred bytes each, up to four thousand for a refusal.
_ACKS_A_MESSAGE = 500
# New credit is announced when it has grown by a share of all that is given at once.
_CREDIT_SHARE = 4
# A call that must end lets its caller take the message that is being written for so long.
_LAST_WRITE_S = 5.0


def _violation(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{field}: {description}", violations=[Violation(field=field, description=description)]
    )


class BatchStream:
    """Serves one call on one batch."""

    def __init__(
        self,
        batch: RunningBatch,
        clock: Clock,
        *,
        write: Callable[[pb.StreamBatchResponse], Awaitable[None]],
        after: int,
        deltas: DeltaSettings | None,
        is_reopened: bool,
        limits: Limits,
        kept: DurableBatches | None = None,
    ) -> None:
        """`kept`: where the batch is kept; None: nowhere."""
        self._batch = batch
        self._clock = clock
        self._context_write = write
        self._after = after
        self._deltas = deltas
        self._is_reopened = is_reopened
        self._limits = limits
        self._kept = kept
        # By message: those of one AddItems, or a share of them.
        self._acks: deque[list[pb.ItemAcknowledged]] = deque()
        self._ack_count = 0
        self._ack_due = asyncio.Event()
        self._acks_written = asyncio.Event()
        self._credit_told = 0
        self._writing = asyncio.Lock()
        self._replaced = asyncio.Event()

    def replace(self) -> None:
        """Another stream has taken this one's place."""
        self._replaced.set()

    async def serve(self, requests: AsyncIterator[pb.StreamBatchRequest]) -> None:
        """Until the summary is written. Raises a RequestError for a message that cannot be taken."""
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [
                    group.create_task(self._read(requests)),
                    group.create_task(self._write_due_acks()),
                    group.create_task(self._watch_for_successor()),
                ]
                await self._follow()
                for helper in helpers:
                    _ = helper.cancel()
        except BaseExceptionGroup as several:
            raise min(several.exceptions, key=_urgency) from None

    # -- In ------------------------------------------------------------------------------------------------

    async def _read(self, requests: AsyncIterator[pb.StreamBatchRequest]) -> None:
        async for request in requests:
            await self._take(request)
            while self._ack_count > self._limits.max_items + self._limits.max_open_items:
                self._acks_written.clear()
                _ = await self._acks_written.wait()
        # Raises if the connection was cut: that must never be taken for "no more items".
        async with self._writing:
            await self._write_acks()
            await self._write_credit()
        if self._kept is not None:
            await self._kept.close_input(self._batch)
        else:
            self._batch.close_input()

    async def _take(self, request: pb.StreamBatchRequest) -> None:
        match request.WhichOneof("message"):
            case "add_items":
                items = [convert_in.item(item, bounds=self._limits) for item in request.add_items.items]
                if self._kept is not None:
                    acks = await self._kept.add(self._batch, items, is_reopened=self._is_reopened)
                else:
                    acks = self._batch.add(items, is_reopened=self._is_reopened)
                self._acknowledge(acks)
            case "release":
                self._batch.release()
            case "cancel_items":
                _ = self._batch.cancel(list(request.cancel_items.item_ids), ignores_unknown=True)
            case "open":
                raise _violation("open", "may only be the first message of a stream")
            case _:
                raise _violation("message", "is required: add_items, release or cancel_items")

    def _acknowledge(self, acks: Sequence[Ack]) -> None:
        entries = [convert_out.acknowledgement(ack, f"add_items.items[{ack.place}].") for ack in acks]
        for start in range(0, len(entries), _ACKS_A_MESSAGE):
            self._acks.append(entries[start : start + _ACKS_A_MESSAGE])
        self._ack_count += len(entries)
        self._ack_due.set()

    # -- Out -----------------------------------------------------------------------------------------------

    async def _write_message(self, message: pb.StreamBatchResponse) -> None:
        """Writes a message, and is not cancelled in the middle of it: a status cannot be sent while a write is on."""
        writing = asyncio.ensure_future(self._context_write(message))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # Whether it fails is of no account any more; asking for that here keeps asyncio from complaining.
            writing.add_done_callback(lambda done: done.cancelled() or done.exception())
            _ = await asyncio.wait({writing}, timeout=_LAST_WRITE_S)
            if not writing.done():
                # A caller that reads nothing hears of nothing; the call is dropped.
                raise grpc.aio.InternalError("the last message was not taken") from None
            raise

    async def _follow(self) -> None:
        if self._after > 0:
            # Nothing may ever happen to the batch until this caller sends more.
            async with self._writing:
                await self._write_credit()
        async with aclosing(follow(self._batch, self._clock, after=self._after, deltas=self._deltas)) as events:
            async for event in events:
                message = pb.StreamBatchResponse(event=convert_out.batch_event(event, self._clock.time_ns()))
                async with self._writing:
                    await self._write_acks()
                    await self._write_message(message)
                    if self._is_credit_due(event):
                        await self._write_credit()

    async def _write_due_acks(self) -> None:
        while True:
            _ = await self._ack_due.wait()
            async with self._writing:
                await self._write_acks()

    async def _write_acks(self) -> None:
        self._ack_due.clear()
        while self._acks:
            some = self._acks[0]
            await self._write_message(pb.StreamBatchResponse(items_acknowledged=pb.ItemsAcknowledged(items=some)))
            _ = self._acks.popleft()
            self._ack_count -= len(some)
            self._acks_written.set()

    def _is_credit_due(self, event: Journalled | PassingEvent) -> bool:
        """At first; then when an item's end has made it grow by much, or to all that a batch may have."""
        if self._credit_told == 0:
            return True
        is_result = isinstance(event, Journalled) and isinstance(event.event, Result)
        step = min(self._limits.max_open_items // _CREDIT_SHARE, self._limits.max_items - self._credit_told)
        return is_result and self._batch.credit - self._credit_told >= max(1, step)

    async def _write_credit(self) -> None:
        self._credit_told = credit = self._batch.credit
        await self._write_message(pb.StreamBatchResponse(credit=pb.Credit(total_items=credit)))

    async def _watch_for_successor(self) -> None:
        await self._replaced.wait()
        raise StreamReplacedError(f"another stream has reopened batch {self._batch.batch_id}")


def _urgency(error: BaseException) -> int:
    """A defect comes first, since it must be seen; then a write that failed, since nobody is there to be refused."""
    match error:
        case UnisonoError():
            return 2
        case grpc.aio.InternalError():
            return 1
        case _:
            return 0
