"""The rpcs that are about kept batches: submit, get, list, retry, delete."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import aclosing
from typing import TYPE_CHECKING

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono.core.batch import CoScheduling
from unisono.core.errors import NothingKeptError
from unisono.core.events import Result, weight
from unisono.core.paging import MAX_MESSAGE_WEIGHT
from unisono.edge.contract import convert_config, convert_kept, convert_out
from unisono.edge.grpc import pages
from unisono.edge.grpc.calls import SERVICE, carrier_of, fingerprint_of, wrong

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    from unisono._generated.unisono.v1 import item_pb2
    from unisono.app.batches import Batches
    from unisono.app.durable import DurableBatches
    from unisono.app.ports import Clock
    from unisono.core.batch import BadItem
    from unisono.core.events import Journalled
    from unisono.core.model import Item
    from unisono.edge.grpc.calls import Context

_PAGE, _MAX_PAGE = 100, 1_000


class KeptBatches(pb_grpc.BatchInferenceServicer):
    """What the servicer does with kept batches; the rest of it is below."""

    _batches: Batches
    _durable: DurableBatches | None
    _clock: Clock

    @abstractmethod
    def _refused(self, context: Context) -> AbstractAsyncContextManager[None]:
        """Turns an error of the house into the call's status."""

    @abstractmethod
    async def _converted(self, messages: Sequence[item_pb2.Item]) -> list[Item | BadItem]:
        """All items of a request."""

    @property
    def _kept(self) -> DurableBatches:
        """Where batches are kept; raises NothingKeptError."""
        if self._durable is None:
            raise NothingKeptError(
                "this service keeps no batches: start it with `unisono serve`, and UNISONO_DATA_DIR not `none`; or "
                "use RunBatch"
            )
        return self._durable

    def _keeps(self, batch_id: str) -> bool:
        """Whether a batch is not one of those that live in memory alone."""
        if self._durable is None:
            return False
        return self._durable.runs(batch_id) or self._batches.find(batch_id) is None

    async def _replay(self, batch_id: str, after: int, context: Context) -> None:
        """Writes the events of a batch that has ended, to a stream that wanted to go on with it."""
        async with aclosing(self._kept.follow(batch_id, after=after)) as events:
            async for event in events:
                message = convert_out.batch_event(event, self._clock.time_ns())
                await context.write(pb.StreamBatchResponse(event=message))

    async def SubmitBatch(self, request: pb.SubmitBatchRequest, context: Context) -> pb.SubmitBatchResponse:
        """See the contract."""
        async with self._refused(context):
            kept = self._kept
            config = convert_config.config(request.config, bounds=self._batches.limits)
            if config.co_scheduling is CoScheduling.REQUIRED:
                what = "is REQUIRED, which is for RunBatch only: nobody knows what is free when it is its turn"
                raise wrong("config.co_scheduling", what)
            metadata = convert_kept.metadata(request.metadata)
            items = await self._batches.check(await self._converted(request.items), config)
            stored, _ = await kept.submit(
                items,
                config,
                method=f"{SERVICE}/SubmitBatch",
                carrier=carrier_of(context),
                metadata=metadata,
                fingerprint=fingerprint_of(request) if config.request_id else b"",
            )
            return pb.SubmitBatchResponse(batch=convert_kept.kept_batch(stored))

    async def GetBatch(self, request: pb.GetBatchRequest, context: Context) -> pb.GetBatchResponse:
        """See the contract."""
        async with self._refused(context):
            return pb.GetBatchResponse(batch=convert_kept.kept_batch(await self._kept.get(request.batch_id)))

    async def ListBatches(self, request: pb.ListBatchesRequest, context: Context) -> pb.ListBatchesResponse:
        """See the contract."""
        async with self._refused(context):
            size = pages.size(request.page_size, default=_PAGE, most=_MAX_PAGE)
            found = await self._kept.page(
                after=pages.place(request.page_token),
                # One more than asked for tells whether there is another page.
                limit=size + 1,
                states=convert_kept.batch_states(request.states),
            )
            response = pb.ListBatchesResponse()
            response.batches.extend(convert_kept.kept_batch(stored) for _, stored in found[:size])
            if len(found) > size:
                response.next_page_token = pages.token(found[size - 1][0])
            return response

    async def ListResults(self, request: pb.ListResultsRequest, context: Context) -> pb.ListResultsResponse:
        """See the contract."""
        async with self._refused(context):
            size = pages.size(request.page_size, default=_PAGE, most=_MAX_PAGE)
            found = await self._kept.results(
                request.batch_id,
                after=pages.place(request.page_token),
                limit=size + 1,
                states=convert_kept.item_states(request.states),
            )
            response = pb.ListResultsResponse()
            taken, is_last = _page(found, size)
            response.events.extend(convert_out.batch_event(entry, self._clock.time_ns()) for entry in taken)
            if not is_last:
                response.next_page_token = pages.token(taken[-1].sequence)
            return response

    async def RetryBatch(self, request: pb.RetryBatchRequest, context: Context) -> pb.RetryBatchResponse:
        """See the contract."""
        async with self._refused(context):
            stored, _ = await self._kept.retry(
                request.batch_id,
                request_id=request.request_id,
                method=f"{SERVICE}/RetryBatch",
                carrier=carrier_of(context),
            )
            return pb.RetryBatchResponse(batch=convert_kept.kept_batch(stored))

    async def DeleteBatch(self, request: pb.DeleteBatchRequest, context: Context) -> pb.DeleteBatchResponse:
        """See the contract."""
        async with self._refused(context):
            await self._kept.delete(request.batch_id)
            return pb.DeleteBatchResponse()


def _page(found: Sequence[Journalled], size: int) -> tuple[list[Journalled], bool]:
    """As many results as a page has, with their parts, as far as a message holds them; and whether that is all."""
    taken: list[Journalled] = []
    results, room = 0, MAX_MESSAGE_WEIGHT
    for entry in found:
        room -= weight(entry.event)
        # One event always fits: it is less than a message.
        if results == size or (taken and room < 0):
            return taken, False
        taken.append(entry)
        results += isinstance(entry.event, Result)
    return taken, True
