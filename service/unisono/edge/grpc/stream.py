"""One StreamBatch call: items come in while events go out.

Three tasks share the call. The *reader* takes what the caller sends, whether or not the caller reads. The *writer*
follows the batch. The *acknowledger* writes what became of added items, and each event is written behind the
acknowledgements that were due before it, so that no item has a result before it was acknowledged.

What waits to be written is bounded: events stay in the journal, text is an offset, credit is a number, and
acknowledgements are as many as the credit; a caller that sends beyond that and reads nothing is not read any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono.app.follow import follow
from unisono.core.errors import InvalidRequestError, StreamReplacedError, UnisonoError, Violation
from unisono.core.events import Journalled, Result
from unisono.edge.grpc import convert_in, convert_out

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from unisono.app.ports import Clock
    from unisono.app.run_batch import RunningBatch
    from unisono.core.batch import Ack, DeltaSettings

# Acknowledgements of one message: some hundred bytes each, a few thousand for a refusal.
_ACKS_A_MESSAGE = 500
# New credit is announced when it has grown by a share of all that is given at once.
_CREDIT_SHARE = 4


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
        max_open_items: int,
    ) -> None:
        self._batch = batch
        self._clock = clock
        self._write_message = write
        self._after = after
        self._deltas = deltas
        self._is_reopened = is_reopened
        self._max_open_items = max_open_items
        self._acks: deque[Ack] = deque()
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
                    group.create_task(self._acknowledge()),
                    group.create_task(self._watch_for_successor()),
                ]
                await self._follow()
                for helper in helpers:
                    _ = helper.cancel()
        except BaseExceptionGroup as several:
            refusals, rest = several.split(UnisonoError)
            if refusals is None or rest is not None:
                raise
            raise refusals.exceptions[0] from None

    # -- In ------------------------------------------------------------------------------------------------

    async def _read(self, requests: AsyncIterator[pb.StreamBatchRequest]) -> None:
        async for request in requests:
            self._take(request)
            while len(self._acks) > 2 * self._max_open_items:
                self._acks_written.clear()
                await self._acks_written.wait()
        self._batch.close_input()

    def _take(self, request: pb.StreamBatchRequest) -> None:
        match request.WhichOneof("message"):
            case "add_items":
                items = [convert_in.item(item) for item in request.add_items.items]
                self._acks += self._batch.add(items, is_reopened=self._is_reopened)
                self._ack_due.set()
            case "release":
                self._batch.release()
            case "cancel_items":
                _ = self._batch.cancel(list(request.cancel_items.item_ids))
            case "open":
                raise _violation("open", "may only be the first message of a stream")
            case _:
                raise _violation("message", "is required: add_items, release or cancel_items")

    # -- Out -----------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        async for event in follow(self._batch, self._clock, after=self._after, deltas=self._deltas):
            message = pb.StreamBatchResponse(event=convert_out.batch_event(event, self._clock.time_ns()))
            async with self._writing:
                await self._write_acks()
                await self._write_message(message)
                if isinstance(event, Journalled) and (isinstance(event.event, Result) or self._credit_told == 0):
                    await self._write_credit()

    async def _acknowledge(self) -> None:
        while True:
            await self._ack_due.wait()
            async with self._writing:
                await self._write_acks()

    async def _write_acks(self) -> None:
        self._ack_due.clear()
        while self._acks:
            some = list(islice(self._acks, _ACKS_A_MESSAGE))
            entries = pb.ItemsAcknowledged(items=[convert_out.acknowledgement(ack) for ack in some])
            await self._write_message(pb.StreamBatchResponse(items_acknowledged=entries))
            for _ in some:
                self._acks.popleft()
        self._acks_written.set()

    async def _write_credit(self) -> None:
        credit = self._batch.credit
        is_much = credit - self._credit_told >= self._max_open_items // _CREDIT_SHARE
        if self._credit_told == 0 or is_much:
            self._credit_told = credit
            await self._write_message(pb.StreamBatchResponse(credit=pb.Credit(total_items=credit)))

    async def _watch_for_successor(self) -> None:
        await self._replaced.wait()
        raise StreamReplacedError(f"another stream has reopened batch {self._batch.batch_id}")
