"""The servicer of `unisono.v1.BatchInference`: parse, ask the application, convert, answer. No decisions.

Every error of the house leaves through `_refused`, as one rich status.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import grpc.aio
from grpc_status import rpc_status

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono.app import intake
from unisono.app.benchmark import measure
from unisono.app.follow import follow
from unisono.core.batch import CoScheduling
from unisono.core.errors import (
    InternalError,
    UnisonoError,
)
from unisono.edge.contract import (
    convert_benchmark,
    convert_config,
    convert_in,
    convert_kept,
    convert_out,
)
from unisono.edge.grpc.calls import SERVICE, carrier_of, fingerprint_of, wrong
from unisono.edge.grpc.kept import KeptBatches
from unisono.edge.grpc.questions import Questions, ServerFacts
from unisono.edge.grpc.stream import BatchStream
from unisono.edge.status import to_status

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence

    from unisono._generated.unisono.v1 import event_pb2, item_pb2
    from unisono.app.batches import Batches
    from unisono.app.driver import BackendDriver
    from unisono.app.durable import DurableBatches
    from unisono.app.ports import Clock
    from unisono.app.run_batch import RunningBatch
    from unisono.core.batch import BadItem, BatchConfig, DeltaSettings
    from unisono.core.model import Item
    from unisono.edge.grpc.calls import Context

# The item of an Infer call that names none.
_ONLY_ITEM = "0"
# A call's deadline is met this much earlier, or by a tenth of it if that is less, so that the end is still heard.
_DEADLINE_MARGIN_S = 0.5
_DEADLINE_SHARE = 0.1


class BatchInferenceServicer(KeptBatches, Questions):
    """See the contract for what each rpc promises. More of it: `kept.py`, and what only asks: `questions.py`."""

    def __init__(
        self,
        *,
        batches: Batches,
        drivers: Mapping[str, BackendDriver],
        clock: Clock,
        facts: ServerFacts,
        report_defect: Callable[[str, BaseException], None],
        durable: DurableBatches | None = None,
    ) -> None:
        """`durable`: None where the service keeps no batches."""
        self._batches = batches
        self._durable = durable
        self._drivers = drivers
        self._clock = clock
        self._facts = facts
        self._report_defect = report_defect

    # -- Batches that run ----------------------------------------------------------------------------------

    # Streams are written, not yielded: so they end when their call does, and not when a generator is collected.

    async def RunBatch(  # type: ignore[override]  # a coroutine that writes; the stub knows generators alone
        self, request: pb.RunBatchRequest, context: Context
    ) -> None:
        """See the contract."""
        async with self._refused(context):
            config = convert_config.config(request.config, bounds=self._batches.limits)
            deltas = convert_config.delta_settings(request.config)
            items = await self._batches.check(await self._converted(request.items), config)
            async with self._whole(items, config, request, context, method="RunBatch") as batch:
                del items, request
                await self._send(batch, context, lambda event: pb.RunBatchResponse(event=event), deltas=deltas)

    async def Infer(  # type: ignore[override]  # a coroutine that writes; the stub knows generators alone
        self, request: pb.InferRequest, context: Context
    ) -> None:
        """See the contract."""
        async with self._refused(context):
            config = convert_config.config(request.config, bounds=self._batches.limits)
            config = replace(config, is_single=True, is_strict=True)
            deltas = convert_config.delta_settings(request.config)
            _refuse_required(config, "config")
            item = convert_in.item(request.item, bounds=self._batches.limits)
            item = replace(item, item_id=item.item_id or _ONLY_ITEM)
            items = await self._batches.check([item], config, path="item")
            async with self._whole(items, config, request, context, method="Infer") as batch:
                del items, item, request
                await self._send(batch, context, lambda event: pb.InferResponse(event=event), deltas=deltas)

    async def StreamBatch(  # type: ignore[override]  # a coroutine that writes; the stub knows generators alone
        self,
        request_iterator: AsyncIterator[pb.StreamBatchRequest],
        context: Context,
    ) -> None:
        """See the contract."""
        async with self._refused(context):
            first = await anext(aiter(request_iterator), None)
            if first is None or first.WhichOneof("message") != "open":
                raise wrong("open", "must be the first message of a stream")
            opened = first.open
            is_reopened = opened.WhichOneof("batch") == "reopen"
            if is_reopened:
                asked = opened.reopen
                after, deltas = asked.after_sequence, convert_config.delta_settings(asked, path="open.reopen")
                is_kept = self._keeps(asked.batch_id)
                found = await self._kept.reopen(asked.batch_id) if is_kept else self._batches.get(asked.batch_id)
                if found is None:
                    await self._replay(asked.batch_id, after, context)
                    return
                batch = found
            elif opened.WhichOneof("batch") == "config":
                config = convert_config.config(opened.config, path="open.config", bounds=self._batches.limits)
                _refuse_required(config, "open.config")
                after, deltas = 0, convert_config.delta_settings(opened.config, path="open.config")
                is_kept = opened.durable
                fingerprint = fingerprint_of(opened) if config.request_id else b""
                method, carrier = f"{SERVICE}/StreamBatch", carrier_of(context)
                if is_kept:
                    metadata = convert_kept.metadata(opened.metadata, path="open.metadata")
                    batch_id, found, is_new = await self._kept.open_stream(
                        config, method=method, carrier=carrier, metadata=metadata, fingerprint=fingerprint
                    )
                    if found is None:
                        await self._replay(batch_id, after, context)
                        return
                    batch = found
                else:
                    batch, is_new = self._batches.open(
                        config, method=method, carrier=carrier, fingerprint=fingerprint
                    )
                is_reopened = not is_new
            else:
                raise wrong("open.batch", "is required: config, or reopen")
            stream = BatchStream(
                batch,
                self._clock,
                write=context.write,
                after=after,
                deltas=deltas,
                is_reopened=is_reopened,
                limits=self._batches.limits,
                kept=self._kept if is_kept else None,
            )
            async with self._calling(batch, context, is_new=not is_reopened, on_replaced=stream.replace):
                await stream.serve(request_iterator)

    async def AttachBatch(  # type: ignore[override]  # a coroutine that writes; the stub knows generators alone
        self,
        request: pb.AttachBatchRequest,
        context: Context,
    ) -> None:
        """See the contract."""
        async with self._refused(context):
            deltas = convert_config.delta_settings(request)
            after = request.after_sequence
            if self._keeps(request.batch_id):
                found = self._kept.follow(request.batch_id, after=after, deltas=deltas)
            else:
                found = follow(self._batches.get(request.batch_id), self._clock, after=after, deltas=deltas)
            async with aclosing(found) as events:
                async for event in events:
                    message = convert_out.batch_event(event, self._clock.time_ns())
                    await context.write(pb.AttachBatchResponse(event=message))

    async def CancelBatch(self, request: pb.CancelBatchRequest, context: Context) -> pb.CancelBatchResponse:
        """See the contract."""
        async with self._refused(context):
            if self._keeps(request.batch_id):
                cancelled, ended = await self._kept.cancel(request.batch_id, list(request.item_ids))
            else:
                cancelled, ended = self._batches.get(request.batch_id).cancel(list(request.item_ids))
            return pb.CancelBatchResponse(cancelled=cancelled, already_ended=ended)

    async def Benchmark(  # type: ignore[override]  # a coroutine that writes; the stub knows generators alone
        self, request: pb.BenchmarkRequest, context: Context
    ) -> None:
        """See the contract."""
        async with self._refused(context):
            asked = convert_benchmark.benchmark(request, bounds=self._batches.limits)
            found = measure(
                asked, self._batches, self._clock, method=f"{SERVICE}/Benchmark", carrier=carrier_of(context)
            )
            async with aclosing(found) as measured:
                async for each in measured:
                    await context.write(convert_benchmark.response(each))

    # -- What all calls share ------------------------------------------------------------------------------

    async def _converted(self, messages: Sequence[item_pb2.Item]) -> list[Item | BadItem]:
        """All items of a request; while many are converted, others have the loop now and then."""
        intake.refuse_count(len(messages), self._batches.limits)
        items: list[Item | BadItem] = []
        for start in range(0, len(messages), intake.AT_A_TIME):
            items += convert_in.items(messages[start : start + intake.AT_A_TIME], bounds=self._batches.limits)
            await asyncio.sleep(0)
        return items

    @asynccontextmanager
    async def _whole(
        self,
        items: list[intake.Checked],
        config: BatchConfig,
        request: pb.RunBatchRequest | pb.InferRequest,
        context: Context,
        *,
        method: str,
    ) -> AsyncGenerator[RunningBatch, None]:
        """A batch whose items came in one message: a new one, or the one that the same request opened before."""
        batch, is_new = self._batches.open(
            config,
            method=f"{SERVICE}/{method}",
            carrier=carrier_of(context),
            fingerprint=fingerprint_of(request) if config.request_id else b"",
            item_count=len(items),
        )
        del request
        async with self._calling(batch, context, is_new=is_new):
            if is_new:
                batch.run_whole(items)
            del items
            yield batch

    async def _send(
        self,
        batch: RunningBatch,
        context: Context,
        response: Callable[[event_pb2.BatchEvent], object],
        *,
        deltas: DeltaSettings | None,
        after: int = 0,
    ) -> None:
        """Writes the batch's events, up to its end."""
        async with aclosing(follow(batch, self._clock, after=after, deltas=deltas)) as events:
            async for event in events:
                await context.write(response(convert_out.batch_event(event, self._clock.time_ns())))

    @asynccontextmanager
    async def _refused(self, context: Context) -> AsyncGenerator[None, None]:
        """Turns an error of the house into the call's status. A defect becomes INTERNAL, and is reported."""
        try:
            yield
        except UnisonoError as error:
            await _abort(context, error)
        except grpc.aio.InternalError as lost:
            # A write that failed: the call is over, and word of that is on its way.
            raise asyncio.CancelledError from lost
        except Exception as defect:  # noqa: BLE001 - a defect must cost one call, and be seen
            self._report_defect("a call", defect)
            await _abort(context, InternalError(f"a defect of this service: {type(defect).__name__}"))

    @asynccontextmanager
    async def _calling(
        self,
        batch: RunningBatch,
        context: Context,
        *,
        is_new: bool,
        on_replaced: Callable[[], None] | None = None,
    ) -> AsyncGenerator[None, None]:
        """The time of a call on which a batch lives. The deadline of the call that made it is the batch's own."""
        batch.callers.join(on_replaced)
        remaining_s: Any = context.time_remaining()  # None without a deadline, which the stub does not know
        if is_new and remaining_s is not None and not (batch.config.detaches or batch.is_kept):
            margin_s = min(_DEADLINE_MARGIN_S, _DEADLINE_SHARE * remaining_s)
            batch.expire_at(self._clock.monotonic_s() + remaining_s - margin_s)
        try:
            yield
        finally:
            batch.callers.lose()


async def _abort(context: Context, error: UnisonoError) -> NoReturn:
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


def _refuse_required(config: BatchConfig, path: str) -> None:
    """Refuses a batch that must run whole on a call which does not give it whole, or has one item anyway."""
    if config.co_scheduling is CoScheduling.REQUIRED:
        raise wrong(f"{path}.co_scheduling", "is REQUIRED, which is for RunBatch only; ask for TOGETHER here")
