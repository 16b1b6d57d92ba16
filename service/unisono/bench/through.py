"""Unisono's side: the same requests through its gRPC service.

A batch goes as one RunBatch; independent callers send a RunBatch of one item each (or whatever rpc is given); a flood
goes as one StreamBatch, within its credit. The clock runs from the call to the end of its stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
import grpc.aio

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as rpc_grpc
from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.bench.backend import EXTRA, OLLAMA, Answer, Backend
from unisono.bench.counters import LEAST_CONFIDENCE
from unisono.bench.sides import UNISONO, Ran, cut
from unisono.bench.workloads import Ask, Phase, Sending

# A bench waits as long as it takes, but not for ever.
LIMIT_S = 3600.0
# Items of one message of a stream.
_CHUNK = 500

# Has one item answered: the events of a call that carries it.
AskOne = Callable[[rpc_grpc.BatchInferenceStub, item_pb2.Item], AsyncIterator[event_pb2.BatchEvent]]


async def ask_by_run_batch(
    stub: rpc_grpc.BatchInferenceStub, item: item_pb2.Item
) -> AsyncIterator[event_pb2.BatchEvent]:
    """One item as a batch of its own."""
    async for response in stub.RunBatch(rpc.RunBatchRequest(items=[item]), timeout=LIMIT_S):
        yield response.event


async def ask_by_infer(stub: rpc_grpc.BatchInferenceStub, item: item_pb2.Item) -> AsyncIterator[event_pb2.BatchEvent]:
    """One item by itself, that may join a wave of others."""
    async for response in stub.Infer(rpc.InferRequest(item=item), timeout=LIMIT_S):
        yield response.event


# How a caller with one request calls the service, by the rpc's name.
ONE_ITEM_RPCS: dict[str, AskOne] = {"RunBatch": ask_by_run_batch, "Infer": ask_by_infer}


class ThroughUnisono:
    """A side that asks the service."""

    name = UNISONO

    def __init__(
        self,
        target: str,
        backend: Backend,
        *,
        memory: Callable[[], int | None] = lambda: None,
        ask_one: AskOne = ask_by_run_batch,
    ) -> None:
        """`target`: where the service listens. `memory`: the bytes of memory that it has now."""
        self._target = target
        self._backend = backend
        self._memory = memory
        self._ask_one = ask_one

    async def run(self, phase: Phase, sending: Sending, *, callers: int) -> Ran:
        """See Side."""
        items = [item_of(self._backend, one) for one in phase.asks]
        before = self._memory()
        if sending is Sending.CALLERS:
            ran = await self._run_callers(items, callers)
        else:
            async with channel_to(self._target) as channel:
                stub = rpc_grpc.BatchInferenceStub(channel)
                await channel.channel_ready()
                reader = Reader([one.name for one in phase.asks])
                began = time.perf_counter()
                events = stream(stub, items) if sending is Sending.STREAM else run_batch(stub, items)
                async for event in events:
                    reader.hear(event)
                ran = Ran(seconds=time.perf_counter() - began, answers=reader.answers, passes=reader.passes)
        after = self._memory()
        if before is not None and after is not None:
            ran.memory_growth = after - before
        return ran

    async def _run_callers(self, items: Sequence[item_pb2.Item], callers: int) -> Ran:
        async with contextlib.AsyncExitStack() as stack:
            stubs = []
            for _ in range(callers):
                channel = await stack.enter_async_context(channel_to(self._target))
                await channel.channel_ready()
                stubs.append(rpc_grpc.BatchInferenceStub(channel))
            began = time.perf_counter()
            parts = zip(stubs, cut(items, callers), strict=True)
            found = await asyncio.gather(*[self._call(stub, part) for stub, part in parts])
            seconds = time.perf_counter() - began
        return Ran(seconds=seconds, answers=[answer for part in found for answer in part])

    async def _call(self, stub: rpc_grpc.BatchInferenceStub, items: Sequence[item_pb2.Item]) -> list[Answer]:
        answers: list[Answer] = []
        for item in items:
            reader = Reader([item.item_id])
            began = time.perf_counter()
            async for event in self._ask_one(stub, item):
                reader.hear(event)
            (answer,) = reader.answers
            # What the caller waited, the way there and back included.
            answer.latency_s = time.perf_counter() - began
            answers.append(answer)
        return answers


@contextlib.asynccontextmanager
async def channel_to(target: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel with a connection of its own."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        yield channel


def item_of(backend: Backend, one: Ask) -> item_pb2.Item:
    """A request as an item, with the options that the other sides send."""
    messages = [item_pb2.Message(role=item_pb2.ROLE_SYSTEM, content=one.system)] if one.system else []
    messages.append(item_pb2.Message(role=item_pb2.ROLE_USER, content=one.user))
    options = item_pb2.Options(num_predict=one.num_predict, temperature=0)
    if one.num_ctx:
        options.runner.num_ctx = one.num_ctx
    if backend.kind != OLLAMA:
        options.extra_options_json = json.dumps(EXTRA)
    return item_pb2.Item(
        item_id=one.name,
        model=backend.model_of(one),
        chat=item_pb2.ChatRequest(messages=messages),
        options=options,
    )


async def run_batch(
    stub: rpc_grpc.BatchInferenceStub, items: Sequence[item_pb2.Item], config: rpc.BatchConfig | None = None
) -> AsyncIterator[event_pb2.BatchEvent]:
    """The events of items that go as one batch."""
    async for response in stub.RunBatch(rpc.RunBatchRequest(config=config, items=items), timeout=LIMIT_S):
        yield response.event


async def stream(
    stub: rpc_grpc.BatchInferenceStub, items: Sequence[item_pb2.Item]
) -> AsyncIterator[event_pb2.BatchEvent]:
    """The events of items that go as one stream: as many at a time as the service gives credit for."""
    call = stub.StreamBatch(timeout=LIMIT_S)
    credit = 0
    more = asyncio.Event()

    async def write() -> None:
        opening = rpc.StreamBatchOpen(config=rpc.BatchConfig(release=rpc.ReleasePolicy(size=_CHUNK)))
        await call.write(rpc.StreamBatchRequest(open=opening))
        sent = 0
        while sent < len(items):
            if sent >= credit:
                more.clear()
                await call.write(rpc.StreamBatchRequest(release=rpc.Release()))
                _ = await more.wait()
                continue
            chunk = items[sent : min(sent + _CHUNK, credit)]
            sent += len(chunk)
            await call.write(rpc.StreamBatchRequest(add_items=rpc.AddItems(items=chunk)))
        await call.done_writing()

    writer = asyncio.get_running_loop().create_task(write())
    try:
        async for response in call:
            if response.HasField("credit"):
                credit = max(credit, response.credit.total_items)
                more.set()
            elif response.HasField("event"):
                yield response.event
        await writer
    finally:
        writer.cancel()


class Reader:
    """Puts the answers of a batch together from its events."""

    def __init__(self, names: Sequence[str]) -> None:
        self._answers = {name: Answer(name=name, error="no result came") for name in names}
        # Forward passes by the report; None until it came, or where it has none that are sure enough.
        self.passes: int | None = None
        # What the first of all answers says.
        self.sample = ""

    @property
    def answers(self) -> list[Answer]:
        """One for each name, in their order."""
        return list(self._answers.values())

    def hear(self, event: event_pb2.BatchEvent) -> None:
        """Takes an event."""
        if event.HasField("result"):
            result = event.result
            answer = self._answers[result.item_id]
            answer.error = "" if result.HasField("completion") else result.error.message or "failed"
            answer.tokens = result.usage.completion_tokens
            answer.prompt_tokens = result.usage.prompt_tokens
            answer.latency_s = result.timings.total.ToNanoseconds() / 1e9
            self.sample = self.sample or result.completion.content
        elif event.HasField("summary"):
            counted = [group.passes for group in event.summary.report.groups if group.HasField("passes")]
            if counted and min(each.confidence for each in counted) >= LEAST_CONFIDENCE:
                self.passes = sum(each.count for each in counted)
