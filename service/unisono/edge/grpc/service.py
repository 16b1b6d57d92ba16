"""The servicer of `unisono.v1.BatchInference`: parse, ask the application, convert, answer. No decisions.

Every error of the house leaves through `_refused`, as one rich status.
"""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import grpc.aio
from grpc_status import rpc_status

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import server_pb2
from unisono.app import intake
from unisono.app.benchmark import measure
from unisono.app.follow import follow
from unisono.core.batch import CoScheduling
from unisono.core.errors import (
    BackendUnavailableError,
    InternalError,
    InvalidRequestError,
    UnisonoError,
    Violation,
)
from unisono.core.model import RunnerSpec
from unisono.core.preview import order_of
from unisono.edge.contract import (
    convert_benchmark,
    convert_config,
    convert_figures,
    convert_in,
    convert_kept,
    convert_out,
    convert_server,
)
from unisono.edge.grpc import pages
from unisono.edge.grpc.kept import KeptBatches
from unisono.edge.grpc.stream import BatchStream
from unisono.edge.status import to_status

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence

    from google.protobuf.message import Message

    from unisono._generated.unisono.v1 import event_pb2, item_pb2
    from unisono.app.batches import Batches
    from unisono.app.driver import BackendDriver
    from unisono.app.durable import DurableBatches
    from unisono.app.ports import Clock
    from unisono.app.run_batch import RunningBatch
    from unisono.core.batch import BadItem, BatchConfig, DeltaSettings
    from unisono.core.model import Item

    _Context = grpc.aio.ServicerContext[Any, Any]

_SERVICE = "unisono.v1.BatchInference"
# The item of an Infer call that names none.
_ONLY_ITEM = "0"
# A call's deadline is met this much earlier, or by a tenth of it if that is less, so that the end is still heard.
_DEADLINE_MARGIN_S = 0.5
_DEADLINE_SHARE = 0.1
# How long a backend may take to say how it is.
_STATUS_TIMEOUT_S = 2.0
_PLAN_PAGE, _MAX_PLAN_PAGE = 10_000, 50_000
_PASSES_PAGE, _MAX_PASSES_PAGE = 1_000, 10_000
_MAX_LISTED = 1_000
# Participations of a page, of three bytes each, so that its message stays below 4 MiB.
_PAGE_MEMBERS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What the service knows of itself."""

    version: str
    started_at_ns: int
    max_receive_bytes: int
    max_send_bytes: int


class BatchInferenceServicer(KeptBatches):
    """See the contract for what each rpc promises. What is about kept batches stands in `kept.py`."""

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
        self, request: pb.RunBatchRequest, context: _Context
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
        self, request: pb.InferRequest, context: _Context
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
        context: _Context,
    ) -> None:
        """See the contract."""
        async with self._refused(context):
            first = await anext(aiter(request_iterator), None)
            if first is None or first.WhichOneof("message") != "open":
                raise _wrong("open", "must be the first message of a stream")
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
                fingerprint = _fingerprint(opened) if config.request_id else b""
                method, carrier = f"{_SERVICE}/StreamBatch", _carrier(context)
                if is_kept:
                    metadata = convert_kept.metadata(opened.metadata, path="open.metadata")
                    batch, is_new = await self._kept.open_stream(
                        config, method=method, carrier=carrier, metadata=metadata, fingerprint=fingerprint
                    )
                else:
                    batch, is_new = self._batches.open(
                        config, method=method, carrier=carrier, fingerprint=fingerprint
                    )
                is_reopened = not is_new
            else:
                raise _wrong("open.batch", "is required: config, or reopen")
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
        context: _Context,
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

    async def CancelBatch(self, request: pb.CancelBatchRequest, context: _Context) -> pb.CancelBatchResponse:
        """See the contract."""
        async with self._refused(context):
            if self._keeps(request.batch_id):
                cancelled, ended = await self._kept.cancel(request.batch_id, list(request.item_ids))
            else:
                cancelled, ended = self._batches.get(request.batch_id).cancel(list(request.item_ids))
            return pb.CancelBatchResponse(cancelled=cancelled, already_ended=ended)

    async def Benchmark(  # type: ignore[override]  # a coroutine that writes; the stub knows generators alone
        self, request: pb.BenchmarkRequest, context: _Context
    ) -> None:
        """See the contract."""
        async with self._refused(context):
            asked = convert_benchmark.benchmark(request, bounds=self._batches.limits)
            found = measure(
                asked, self._batches, self._clock, method=f"{_SERVICE}/Benchmark", carrier=_carrier(context)
            )
            async with aclosing(found) as measured:
                async for each in measured:
                    await context.write(convert_benchmark.response(each))

    # -- Questions -----------------------------------------------------------------------------------------

    async def PlanBatch(self, request: pb.PlanBatchRequest, context: _Context) -> pb.PlanBatchResponse:
        """See the contract."""
        async with self._refused(context):
            size = pages.size(request.page_size, default=_PLAN_PAGE, most=_MAX_PLAN_PAGE)
            start = pages.place(request.page_token)
            config = convert_config.config(request.config, bounds=self._batches.limits)
            plan = await self._batches.plan(await self._converted(request.items), config)
            response = pb.PlanBatchResponse()
            is_together = config.co_scheduling is not CoScheduling.FASTEST
            most = config.max_concurrency or 2**16
            orders = [
                order_of(group, lanes=min(state.limit, most), is_together=is_together) for group, state in plan.groups
            ]
            ids = [
                group.items[place].item_id
                for (group, _), order in zip(plan.groups, orders, strict=True)
                for place, _ in order
            ]
            reasons = [reason for order in orders for _, reason in order]
            end = pages.end(ids, start, size)
            before = 0
            for number, (group, state) in enumerate(plan.groups):
                # This page's share of the ids, which are numbered through all groups.
                share = slice(max(before, start), min(before + len(group.items), end))
                response.groups.append(
                    convert_server.group_plan(number, group, state, zip(ids[share], reasons[share], strict=True))
                )
                before += len(group.items)
            places = {item.item_id: item.index for group, _ in plan.groups for item in group.items}
            response.warnings.extend(
                convert_server.plan_warning(warning, f"items[{places.get(warning.item_id, 0)}].")
                for warning in plan.warnings[:_MAX_LISTED]
            )
            response.refusals.extend(
                convert_server.plan_refusal(item_id, index, error)
                for item_id, index, error in plan.refused[:_MAX_LISTED]
            )
            if end < len(ids):
                response.next_page_token = pages.token(end)
            return response

    async def ListPasses(self, request: pb.ListPassesRequest, context: _Context) -> pb.ListPassesResponse:
        """See the contract."""
        async with self._refused(context):
            size = pages.size(request.page_size, default=_PASSES_PAGE, most=_MAX_PASSES_PAGE)
            start = pages.place(request.page_token)
            batch = self._batches.get(request.batch_id)
            # One more than asked for tells whether there is another page.
            found = batch.passes(start, size + 1)
            response = pb.ListPassesResponse(unmapped_passes=batch.unmapped_passes)
            members = 0
            for place, group, each in found:
                members += len(each.members)
                if len(response.passes) == size or (response.passes and members > _PAGE_MEMBERS):
                    response.next_page_token = pages.token(place)
                    break
                response.passes.append(convert_figures.forward_pass(group, each))
            return response

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: _Context) -> pb.GetServerInfoResponse:
        """See the contract."""
        async with self._refused(context):
            response = pb.GetServerInfoResponse(
                version=self._facts.version,
                limits=convert_server.server_limits(
                    self._batches.limits,
                    max_receive_bytes=self._facts.max_receive_bytes,
                    max_send_bytes=self._facts.max_send_bytes,
                ),
                backends=await asyncio.gather(*(self._status(driver) for driver in self._drivers.values())),
                running_batches=self._batches.running,
            )
            response.started_at.FromNanoseconds(self._facts.started_at_ns)
            return response

    async def ListModels(self, request: pb.ListModelsRequest, context: _Context) -> pb.ListModelsResponse:
        """See the contract."""
        async with self._refused(context):
            if request.backend and request.backend not in self._drivers:
                known = ", ".join(self._drivers)
                raise _wrong("backend", f"is {request.backend!r}, which is not configured; there are: {known}")
            response = pb.ListModelsResponse()
            asked = [driver for name, driver in sorted(self._drivers.items()) if request.backend in ("", name)]
            for found in await asyncio.gather(*map(self._models, asked)):
                if isinstance(found, server_pb2.BackendStatus):
                    response.unreachable.append(found)
                else:
                    response.models.extend(found)
            return response

    async def _models(self, driver: BackendDriver) -> list[server_pb2.Model] | server_pb2.BackendStatus:
        """The models of a backend; how it is, where it does not say."""
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                models, loaded = await driver.backend.models(), await driver.backend.loaded()
        except (UnisonoError, TimeoutError):
            return await self._status(driver)
        found: list[server_pb2.Model] = []
        for model in sorted(models, key=lambda model: model.name):
            own = [runner for runner in driver.known_slots if runner.digest == model.digest]
            # What is configured, remembered or certain is known before it had any work.
            any_runner = RunnerSpec(backend=driver.backend.name, model=model.name, digest=model.digest)
            states = {runner: driver.slot_state(runner, model) for runner in own or [any_runner]}
            found.append(convert_server.model(model, convert_server.runners(model.digest, loaded, states)))
        return found

    async def _status(self, driver: BackendDriver) -> server_pb2.BackendStatus:
        """How a backend is, also when it is away."""
        backend = driver.backend
        status = server_pb2.BackendStatus(
            name=backend.name,
            kind=backend.kind,
            url=backend.url,
            queued=driver.queued,
            in_flight=driver.in_flight,
        )
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                status.version = await backend.version()
                status.runners.extend(convert_server.runners(None, await backend.loaded(), driver.known_slots))
                status.reachable = True
        except UnisonoError as error:
            status.error.CopyFrom(to_status(error))
        except TimeoutError:
            silent = BackendUnavailableError(f"{backend.url} did not answer within {_STATUS_TIMEOUT_S:g} s")
            status.error.CopyFrom(to_status(silent))
        return status

    async def _converted(self, messages: Sequence[item_pb2.Item]) -> list[Item | BadItem]:
        """All items of a request; while many are converted, others have the loop now and then."""
        intake.refuse_count(len(messages), self._batches.limits)
        items: list[Item | BadItem] = []
        for start in range(0, len(messages), intake.AT_A_TIME):
            items += convert_in.items(messages[start : start + intake.AT_A_TIME], bounds=self._batches.limits)
            await asyncio.sleep(0)
        return items

    # -- What all calls share ------------------------------------------------------------------------------

    @asynccontextmanager
    async def _whole(
        self,
        items: list[intake.Checked],
        config: BatchConfig,
        request: pb.RunBatchRequest | pb.InferRequest,
        context: _Context,
        *,
        method: str,
    ) -> AsyncGenerator[RunningBatch, None]:
        """A batch whose items came in one message: a new one, or the one that the same request opened before."""
        batch, is_new = self._batches.open(
            config,
            method=f"{_SERVICE}/{method}",
            carrier=_carrier(context),
            fingerprint=_fingerprint(request) if config.request_id else b"",
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
        context: _Context,
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
    async def _refused(self, context: _Context) -> AsyncGenerator[None, None]:
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
        context: _Context,
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


async def _abort(context: _Context, error: UnisonoError) -> NoReturn:
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


def _wrong(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{field}: {description}", violations=[Violation(field=field, description=description)]
    )


def _refuse_required(config: BatchConfig, path: str) -> None:
    """Refuses a batch that must run whole on a call which does not give it whole, or has one item anyway."""
    if config.co_scheduling is CoScheduling.REQUIRED:
        raise _wrong(f"{path}.co_scheduling", "is REQUIRED, which is for RunBatch only; ask for TOGETHER here")


def _carrier(context: _Context) -> dict[str, str]:
    """The call's metadata as text, for the trace context."""
    metadata = context.invocation_metadata() or ()
    return {key: value for key, value in metadata if isinstance(value, str)}


def _fingerprint(message: Message) -> bytes:
    """Stands for the content of a request, to be compared with what comes under the same request_id."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
