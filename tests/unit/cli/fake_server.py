"""A service for tests of the command line: speaks the contract, computes nothing, and does what an item tells it to.

What an item asks for decides its fate: a prompt (or the last message) that begins with "fail", "refuse", "hold",
"big", "tools", "think" or "malformed" has that done; all others are answered with "echo: " and the prompt. Items
run on `slots` slots, a token for each word of the answer, so passes and counts are as a service would tell them.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc, event_pb2, item_pb2, kept_pb2

BATCH_ID = "b-1"
CREATED_S = 1_700_000_000

Context = grpc.aio.ServicerContext[rpc.StreamBatchRequest, rpc.StreamBatchResponse]


def status(
    reason: str, message: str, *violations: tuple[str, str], code: int = code_pb2.INVALID_ARGUMENT
) -> status_pb2.Status:
    """A status with the details that a service gives."""
    made = status_pb2.Status(code=code, message=message)
    made.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="unisono.dev"))
    if violations:
        request = error_details_pb2.BadRequest()
        for path, description in violations:
            request.field_violations.add(field=path, description=description)
        made.details.add().Pack(request)
    return made


def asks(item: item_pb2.Item) -> str:
    """What the item says last."""
    if item.HasField("chat"):
        return item.chat.messages[-1].content
    return item.generate.prompt if item.HasField("generate") else " ".join(item.embed.input)


@dataclass
class Script:
    """How the service behaves."""

    slots: int = 4
    # Credit at the start, and how much more for each item that ended.
    first_credit: int = 1000
    # Items that the batch takes; its credit grows no further.
    most_items: int = 1_000_000
    # Items go as they come, as if the time of the release policy had passed.
    is_eager: bool = False
    # Heartbeats sent before the second message is read: a client that does not read meanwhile blocks both.
    chatter: int = 0
    # How long it takes to read each message.
    read_pause_s: float = 0.0
    # What the call ends with, and after how many results.
    abort: tuple[grpc.StatusCode, status_pb2.Status] | None = None
    abort_after: int = 0
    # An answer to CancelBatch never comes.
    ignores_cancel: bool = False
    # So many calls of SubmitBatch do what they are asked, and are lost before their answer.
    lost_submits: int = 0
    # What the first calls of SubmitBatch are refused with, one each; nothing is kept then.
    refusals: list[tuple[grpc.StatusCode, status_pb2.Status]] = field(default_factory=list)
    # After how many events the next AttachBatch is cut.
    cut_after: int | None = None
    info: rpc.GetServerInfoResponse = field(default_factory=rpc.GetServerInfoResponse)
    models: rpc.ListModelsResponse = field(default_factory=rpc.ListModelsResponse)


class FakeServer(batch_inference_pb2_grpc.BatchInferenceServicer):
    """The service, and what it saw."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.target = ""
        self.backend_description = "a stand-in"
        # What was received, in order.
        self.requests: list[rpc.StreamBatchRequest] = []
        self.items: list[item_pb2.Item] = []
        # Batches that are kept with their events, by id, the oldest first; and all requests to keep one.
        self.kept: dict[str, tuple[kept_pb2.KeptBatch, list[event_pb2.BatchEvent]]] = {}
        self.submitted: list[rpc.SubmitBatchRequest] = []
        self.config = rpc.BatchConfig()
        self.most_over_credit = 0
        self.was_cancelled = False
        # Set while an item that was told to hold is running.
        self.is_holding = asyncio.Event()
        self.call_ended = asyncio.Event()
        self._cancel = asyncio.Event()
        self._passes: list[list[int]] = []
        # Of each item, its passes.
        self._passes_of: defaultdict[int, list[int]] = defaultdict(list)

    # grpc.aio also takes a coroutine that writes to its context, which the annotations do not know.
    async def StreamBatch(  # type: ignore[override]
        self, requests: AsyncIterator[rpc.StreamBatchRequest], context: Context
    ) -> None:
        """Runs the one batch."""
        try:
            await _Batch(self, requests, context).run()
        finally:
            self.call_ended.set()

    async def CancelBatch(self, request: rpc.CancelBatchRequest, context: object) -> rpc.CancelBatchResponse:
        """Ends what hangs, unless told not to."""
        assert request.batch_id == BATCH_ID
        self.was_cancelled = True
        if not self.script.ignores_cancel:
            self._cancel.set()
        return rpc.CancelBatchResponse(cancelled=1)

    async def ListPasses(self, request: rpc.ListPassesRequest, context: object) -> rpc.ListPassesResponse:
        """Three passes a page, so that there are pages."""
        start = int(request.page_token or 0)
        answer = rpc.ListPassesResponse()
        for number, indexes in list(enumerate(self._passes))[start : start + 3]:
            answer.passes.add(number=number, item_indexes=indexes)
        if start + 3 < len(self._passes):
            answer.next_page_token = str(start + 3)
        return answer

    async def GetServerInfo(self, request: object, context: object) -> rpc.GetServerInfoResponse:
        """As the script says."""
        return self.script.info

    async def ListModels(self, request: object, context: object) -> rpc.ListModelsResponse:
        """As the script says."""
        return self.script.models

    def RunBatch(self, request: object, context: object) -> AsyncIterator[rpc.RunBatchResponse]:
        """Not used by the command line."""
        raise NotImplementedError

    def Infer(self, request: object, context: object) -> AsyncIterator[rpc.InferResponse]:
        """Not asked for by the command line."""
        raise NotImplementedError

    def Benchmark(self, request: object, context: object) -> AsyncIterator[rpc.BenchmarkResponse]:
        """Not asked for by the command line."""
        raise NotImplementedError

    async def AttachBatch(self, request: rpc.AttachBatchRequest, context: Any) -> None:  # type: ignore[override]
        """The events of a kept batch; the first call may be cut."""
        _, events = await self._find(request.batch_id, context)
        cut, self.script.cut_after = self.script.cut_after, None
        for event in events[request.after_sequence :][:cut]:
            await context.write(rpc.AttachBatchResponse(event=event))
        if cut is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    async def PlanBatch(self, request: object, context: object) -> rpc.PlanBatchResponse:
        """Not used by the command line."""
        raise NotImplementedError

    async def SubmitBatch(self, request: rpc.SubmitBatchRequest, context: Any) -> rpc.SubmitBatchResponse:
        """Keeps a batch that has ended already; the first calls may be cut off after that."""
        self.submitted.append(request)
        if self.script.refusals:
            await _abort(context, *self.script.refusals.pop(0))
        if request.config.request_id not in {batch.request_id for batch, _ in self.kept.values()}:
            await self._keep(request)
        if self.script.lost_submits:
            self.script.lost_submits -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
        return rpc.SubmitBatchResponse(batch=list(self.kept.values())[-1][0])

    async def _keep(self, request: rpc.SubmitBatchRequest) -> None:
        async def messages() -> AsyncIterator[rpc.StreamBatchRequest]:
            yield rpc.StreamBatchRequest(open=rpc.StreamBatchOpen(config=request.config))
            yield rpc.StreamBatchRequest(add_items=rpc.AddItems(items=request.items))

        # The map is that of the newest batch.
        self._passes.clear()
        self._passes_of.clear()
        events: list[event_pb2.BatchEvent] = []
        run = _Batch(self, messages(), _Collecting(events))  # type: ignore[arg-type]
        await run.run()
        batch = kept_pb2.KeptBatch(
            batch_id=f"k-{len(self.kept) + 1}",
            state=event_pb2.BATCH_STATE_COMPLETED,
            counts=run.counts,
            request_id=request.config.request_id,
            metadata=request.metadata,
            last_sequence=len(events),
        )
        for name in ("created_at", "started_at", "ended_at"):
            getattr(batch, name).seconds = CREATED_S
        events[0].accepted.batch_id = events[-1].summary.report.batch_id = batch.batch_id
        self.kept[batch.batch_id] = (batch, events)

    async def _find(self, batch_id: str, context: Any) -> tuple[kept_pb2.KeptBatch, list[event_pb2.BatchEvent]]:
        if batch_id not in self.kept:
            details = status("BATCH_NOT_FOUND", f"there is no batch {batch_id!r}", code=code_pb2.NOT_FOUND)
            await _abort(context, grpc.StatusCode.NOT_FOUND, details)
        return self.kept[batch_id]

    async def GetBatch(self, request: rpc.GetBatchRequest, context: Any) -> rpc.GetBatchResponse:
        """As it was kept."""
        batch, _ = await self._find(request.batch_id, context)
        return rpc.GetBatchResponse(batch=batch)

    async def ListBatches(self, request: rpc.ListBatchesRequest, context: object) -> rpc.ListBatchesResponse:
        """Two a page, so that there are pages."""
        found = [batch for batch, _ in self.kept.values() if not request.states or batch.state in request.states]
        start, size = int(request.page_token or 0), min(2, request.page_size)
        answer = rpc.ListBatchesResponse(batches=found[::-1][start : start + size])
        if start + size < len(found):
            answer.next_page_token = str(start + size)
        return answer

    async def ListResults(self, request: rpc.ListResultsRequest, context: Any) -> rpc.ListResultsResponse:
        """An event a page, so that parts stand on pages before their results."""
        _, events = await self._find(request.batch_id, context)
        found = [
            event
            for event in events
            if (event.HasField("result") and (not request.states or event.result.state in request.states))
            or (event.HasField("result_part") and not request.states)
        ]
        start = int(request.page_token or 0)
        answer = rpc.ListResultsResponse(events=found[start : start + 1])
        if start + 1 < len(found):
            answer.next_page_token = str(start + 1)
        return answer

    async def RetryBatch(self, request: object, context: object) -> rpc.RetryBatchResponse:
        """Left to the tests of the real service."""
        raise NotImplementedError

    async def DeleteBatch(self, request: rpc.DeleteBatchRequest, context: Any) -> rpc.DeleteBatchResponse:
        """Forgets it."""
        _ = await self._find(request.batch_id, context)
        del self.kept[request.batch_id]
        return rpc.DeleteBatchResponse()


class _Collecting:
    """Where a kept batch's events go, instead of to a caller."""

    def __init__(self, events: list[event_pb2.BatchEvent]) -> None:
        self._events = events

    async def write(self, message: rpc.StreamBatchResponse) -> None:
        if message.HasField("event"):
            self._events.append(message.event)


async def _abort(context: Any, code: grpc.StatusCode, details: status_pb2.Status) -> None:
    context.set_trailing_metadata(grpc.aio.Metadata(("grpc-status-details-bin", details.SerializeToString())))
    await context.abort(code, details.message)


class _Batch:
    """One call."""

    def __init__(self, server: FakeServer, requests: AsyncIterator[rpc.StreamBatchRequest], context: Context) -> None:
        self.server = server
        self.script = server.script
        self.requests = requests
        self.context = context
        self.sequence = 0
        self.credit = self.script.first_credit
        self.accepted = 0
        self.waiting: list[tuple[int, item_pb2.Item]] = []
        self.counts = event_pb2.Progress()

    async def run(self) -> None:
        await self.say(accepted=event_pb2.Accepted(batch_id=BATCH_ID))
        await self.context.write(rpc.StreamBatchResponse(credit=rpc.Credit(total_items=self.credit)))
        for _ in range(self.script.chatter):
            await self.context.write(
                rpc.StreamBatchResponse(event=event_pb2.BatchEvent(heartbeat=event_pb2.Heartbeat()))
            )
        async for request in self.requests:
            self.server.requests.append(request)
            kind = request.WhichOneof("message")
            if kind == "open":
                self.server.config = request.open.config
            elif kind == "add_items":
                await self.add(request.add_items)
                if self.script.is_eager:
                    await self.work()
            elif kind == "release":
                await self.work()
            await asyncio.sleep(self.script.read_pause_s)
        await self.work()
        await self.summarise()

    async def say(self, **event: object) -> None:
        self.sequence += 1
        made = event_pb2.BatchEvent(sequence=self.sequence, **event)  # type: ignore[arg-type]
        made.time.seconds = CREATED_S
        await self.context.write(rpc.StreamBatchResponse(event=made))

    async def add(self, added: rpc.AddItems) -> None:
        acknowledged = rpc.ItemsAcknowledged()
        for item in added.items:
            self.server.items.append(item)
            entry = acknowledged.items.add(item_id=item.item_id)
            if asks(item).startswith("refuse"):
                entry.refusal.CopyFrom(
                    status("INVALID_REQUEST", "one field is wrong", ("items[0].options.top_p", "must be from 0 to 1"))
                )
                continue
            if self.accepted == self.script.most_items:
                entry.refusal.CopyFrom(status("BATCH_FULL", "open another", code=code_pb2.RESOURCE_EXHAUSTED))
                continue
            entry.index = self.accepted
            self.waiting.append((self.accepted, item))
            self.accepted += 1
            self.server.most_over_credit = max(self.server.most_over_credit, self.accepted - self.credit)
        await self.context.write(rpc.StreamBatchResponse(items_acknowledged=acknowledged))

    async def work(self) -> None:
        """Answers what is waiting, `slots` at a time."""
        if not self.waiting:
            return
        group = event_pb2.GroupPlanned(backend="stand-in", model="tiny", item_count=self.accepted)
        await self.say(group_planned=group)
        await self.say(released=event_pb2.Released(item_count=len(self.waiting)))
        running: list[tuple[int, item_pb2.Item, int]] = []
        while self.waiting or running:
            while self.waiting and len(running) < self.script.slots:
                index, item = self.waiting.pop(0)
                words = 2 + len(asks(item).split())
                running.append((index, item, 0 if asks(item).startswith(("fail", "malformed")) else words))
            if speaking := [index for index, _, left in running if left]:
                for index in speaking:
                    self.server._passes_of[index].append(len(self.server._passes))
                self.server._passes.append(speaking)
            still = []
            if all(asks(item).startswith("hold") for _, item, _ in running):
                self.server.is_holding.set()
                await self.server._cancel.wait()
            for index, item, left in running:
                if self.server._cancel.is_set():
                    await self.end(index, item)
                elif asks(item).startswith("hold"):
                    still.append((index, item, left))
                elif left > 1:
                    still.append((index, item, left - 1))
                else:
                    await self.end(index, item)
            running = still
        await self.say(progress=self.progress())

    def progress(self) -> event_pb2.Progress:
        self.counts.accepted = self.accepted
        self.counts.passes = len(self.server._passes)
        self.counts.completion_tokens = sum(map(len, self.server._passes))
        return self.counts

    async def end(self, index: int, item: item_pb2.Item) -> None:
        result = event_pb2.Result(item_id=item.item_id, index=index, attempts=1, group=0)
        said = asks(item)
        mine = [self.server._passes[number] for number in self.server._passes_of[index]]
        if self.server._cancel.is_set():
            result.state = event_pb2.ITEM_STATE_CANCELLED
            result.error.CopyFrom(status("CANCELLED", "the caller cancelled it", code=code_pb2.CANCELLED))
            self.counts.cancelled += 1
        elif said.startswith("fail"):
            result.state = event_pb2.ITEM_STATE_FAILED
            missing = status("MODEL_NOT_FOUND", "the model 'big' is not there", code=code_pb2.NOT_FOUND)
            result.error.CopyFrom(missing)
            self.counts.failed += 1
        elif said.startswith("malformed"):
            result.state = event_pb2.ITEM_STATE_FAILED
            path = f"items[{index}].generate.prompt"
            result.error.CopyFrom(status("INVALID_REQUEST", "the item is malformed", (path, "is bad")))
            self.counts.failed += 1
        else:
            await self.answer(result, item, said)
            result.passes = len(mine)
            result.shared_with = len({other for each in mine for other in each} - {index})
            result.usage.completion_tokens = len(mine)
            self.counts.completed += 1
        await self.say(result=result)
        ended = self.counts.completed + self.counts.failed + self.counts.cancelled
        if self.script.abort is not None and ended > self.script.abort_after:
            await _abort(self.context, *self.script.abort)
        self.credit = min(self.credit + 1, self.script.most_items)
        await self.context.write(rpc.StreamBatchResponse(credit=rpc.Credit(total_items=self.credit)))

    async def answer(self, result: event_pb2.Result, item: item_pb2.Item, said: str) -> None:
        result.state = event_pb2.ITEM_STATE_COMPLETED
        completion = result.completion
        completion.model = item.model or self.server.config.model or "tiny"
        completion.finish_reason = item_pb2.FINISH_REASON_STOP
        result.usage.prompt_tokens = 5
        result.timings.queued.FromMilliseconds(1)
        result.timings.total.FromMicroseconds(12_345)
        if item.HasField("embed"):
            completion.finish_reason = item_pb2.FINISH_REASON_EMBEDDED
            for number, _ in enumerate(item.embed.input):
                completion.embeddings.add(values=[0.1, float(number)])
        elif said.startswith("big"):
            for number, text in enumerate(("first ", "second ")):
                part = event_pb2.ResultPart(item_id=item.item_id, index=result.index, part=number, content=text)
                await self.say(result_part=part)
            result.parts = 2
            completion.content = "last"
        elif said.startswith("tools"):
            completion.tool_calls.add(id="c1", name="weather", arguments_json='{"z":1,"a":2.50}')
            completion.finish_reason = item_pb2.FINISH_REASON_TOOL_CALLS
        else:
            completion.content = f"echo: {said}"
            if said.startswith("think"):
                completion.thinking = "hm"
            if said.startswith("cut"):
                completion.finish_reason = item_pb2.FINISH_REASON_LENGTH

    async def summarise(self) -> None:
        passes = self.server._passes
        tokens = sum(len(each) for each in passes)
        report = event_pb2.Report(batch_id=BATCH_ID, counts=self.progress(), completion_tokens=tokens)
        report.duration.FromMilliseconds(8400)
        if self.accepted:
            group = report.groups.add(waves=1, completion_tokens=tokens)
            group.group.CopyFrom(event_pb2.GroupPlanned(backend="stand-in", model="tiny", item_count=self.accepted))
            group.group.slots.count = self.script.slots
            group.group.slots.source = event_pb2.SLOT_SOURCE_TOLD
            group.passes.count = len(passes)
            group.passes.method = event_pb2.PASS_METHOD_ARRIVAL
            group.passes.confidence = 1.0
            if passes:
                group.items_per_pass = tokens / len(passes)
        state = event_pb2.BATCH_STATE_CANCELLED if self.server._cancel.is_set() else event_pb2.BATCH_STATE_COMPLETED
        await self.say(summary=event_pb2.Summary(state=state, report=report))


@asynccontextmanager
async def serving(
    script: Script | None = None, *, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[FakeServer]:
    """The service on a free port, until the context is left; in the clear, or over TLS."""
    fake = FakeServer(script or Script())
    server = grpc.aio.server()
    batch_inference_pb2_grpc.add_BatchInferenceServicer_to_server(fake, server)
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    fake.target = f"127.0.0.1:{port}"
    try:
        yield fake
    finally:
        await server.stop(None)
