"""A whole service over a stand-in Ollama, as a caller meets it: through its gRPC port.

    async with house(pass_s=0.005) as h:
        seen = await h.run([chat("a", "Hello")])
        assert seen.results["a"].completion.content

When a house is left, nothing may have gone wrong in the service that was not expected: a reported defect, an error in
the log of gRPC or asyncio, or a backend connection that stays open fails the test.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tests.fakes.ollama import FakeModel, FakeOllama
from tests.fakes.ollama.models import DEFAULT_MODELS
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono._generated.unisono.v1 import event_pb2, item_pb2, kept_pb2
from unisono.app.batches import Batches
from unisono.app.ports import Backend
from unisono.bootstrap import running
from unisono.config import Settings

# What every wait of these tests is bounded by: far more than any of them needs.
LIMIT_S = 20.0
# The paths on which a backend is asked for answers, and nothing else.
WORK_PATHS = ("/api/chat", "/api/generate", "/api/embed")
DOMAIN = "unisono.dev"
MAX_SEND_BYTES = 4 * 1024 * 1024


# -- Requests --------------------------------------------------------------------------------------------------


def span(seconds: float) -> Duration:
    """A span of time."""
    made = Duration()
    made.FromNanoseconds(round(seconds * 1e9))
    return made


def user(text: str) -> item_pb2.Message:
    """A message of the caller's."""
    return item_pb2.Message(role=item_pb2.ROLE_USER, content=text)


def chat(item_id: str, text: str = "Hello", *, model: str = "", **options: Any) -> item_pb2.Item:
    """A conversation of one message; `options` are fields of Options."""
    request = item_pb2.ChatRequest(messages=[user(text)])
    return item_pb2.Item(item_id=item_id, chat=request, model=model, options=options_of(options))


def generate(item_id: str, prompt: str, *, model: str = "", **options: Any) -> item_pb2.Item:
    """A prompt to complete."""
    request = item_pb2.GenerateRequest(prompt=prompt)
    return item_pb2.Item(item_id=item_id, generate=request, model=model, options=options_of(options))


def embed(item_id: str, *texts: str, model: str = "fake-embed") -> item_pb2.Item:
    """Texts to embed."""
    return item_pb2.Item(item_id=item_id, embed=item_pb2.EmbedRequest(input=texts), model=model)


def options_of(fields: dict[str, Any]) -> item_pb2.Options | None:
    """Options of an item; None where there are none."""
    return item_pb2.Options(**fields) if fields else None


def chats(count: int, text: str = "Question {}", **options: Any) -> list[item_pb2.Item]:
    """Conversations named i0, i1 and so on."""
    return [chat(f"i{n}", text.format(n), **options) for n in range(count)]


def config(**fields: Any) -> pb.BatchConfig:
    """A batch's config, for the model `fake` unless it says otherwise."""
    return pb.BatchConfig(**{"model": "fake", **fields})


# -- What comes back -------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """The events of one batch, as one reader saw them."""

    events: list[event_pb2.BatchEvent] = field(default_factory=list)

    def add(self, event: event_pb2.BatchEvent) -> None:
        """One more."""
        assert event.ByteSize() <= MAX_SEND_BYTES
        self.events.append(event)

    def of(self, kind: str) -> list[Any]:
        """All events of a kind, in their order."""
        return [getattr(event, kind) for event in self.events if event.WhichOneof("event") == kind]

    @property
    def kinds(self) -> list[str]:
        """The kinds of all events, in their order."""
        return [event.WhichOneof("event") or "" for event in self.events]

    @property
    def batch_id(self) -> str:
        """The batch's name."""
        (accepted,) = self.of("accepted")
        return str(accepted.batch_id)

    @property
    def sequences(self) -> list[int]:
        """The numbers of the lasting events."""
        return [event.sequence for event in self.events if event.HasField("sequence")]

    @property
    def results(self) -> dict[str, event_pb2.Result]:
        """The results by item, put together again where they came in parts."""
        whole: dict[str, event_pb2.Result] = {}
        parts: list[event_pb2.ResultPart] = []
        for event in self.events:
            if event.WhichOneof("event") == "result_part":
                parts.append(event.result_part)
            elif event.WhichOneof("event") == "result":
                assert len(parts) == event.result.parts
                assert event.result.item_id not in whole, "an item ended twice"
                whole[event.result.item_id] = joined(parts, event.result)
                parts = []
        return whole

    @property
    def summary(self) -> event_pb2.Summary:
        """The end: exactly one, and the last of all events."""
        (summary,) = self.of("summary")
        assert self.kinds[-1] == "summary"
        assert isinstance(summary, event_pb2.Summary)
        return summary

    @property
    def report(self) -> event_pb2.Report:
        """The figures."""
        return self.summary.report

    def states(self) -> dict[str, str]:
        """How each item ended: "COMPLETED" and so on."""
        return {name: state_of(result) for name, result in self.results.items()}


def joined(parts: Sequence[event_pb2.ResultPart], result: event_pb2.Result) -> event_pb2.Result:
    """A result with its parts in front of what it holds."""
    whole = event_pb2.Result()
    whole.CopyFrom(result)
    if parts:
        done = whole.completion
        done.content = "".join(part.content for part in parts) + done.content
        done.thinking = "".join(part.thinking for part in parts) + done.thinking
        for name in ("embeddings", "logprobs"):
            entries = [entry for part in (*parts, result.completion) for entry in getattr(part, name)]
            done.ClearField(name)
            getattr(done, name).extend(entries)
    return whole


def state_of(result: event_pb2.Result) -> str:
    """How an item ended."""
    return event_pb2.ItemState.Name(result.state).removeprefix("ITEM_STATE_")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A status with its details taken apart."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    # Paths of the fields that are wrong.
    fields: list[str]
    descriptions: list[str]
    retry_after_s: float | None


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def refusal_of(status: status_pb2.Status) -> Refusal:
    """Takes a status apart; it must carry exactly one ErrorInfo."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    infos = [detail for detail in status.details if detail.Unpack(info)]
    assert len(infos) == 1, status
    assert info.domain == DOMAIN
    assert info.reason
    for detail in status.details:
        _ = detail.Unpack(bad)
    waits = any(detail.Unpack(retry) for detail in status.details)
    return Refusal(
        code=_CODES[status.code],
        message=status.message,
        reason=info.reason,
        metadata=dict(info.metadata),
        fields=[violation.field for violation in bad.field_violations],
        descriptions=[violation.description for violation in bad.field_violations],
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if waits else None,
    )


def reason_of(result: event_pb2.Result) -> str:
    """Why an item has no answer."""
    assert result.WhichOneof("outcome") == "error", result
    return refusal_of(result.error).reason


async def refused(call: Any) -> Refusal:
    """The error that a call ends with; what it says before is read."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.to_end() if hasattr(call, "to_end") else call)
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None, caught.value
    return refusal_of(status)


# -- A call that is read when one likes ------------------------------------------------------------------------


class Reading:
    """A RunBatch or AttachBatch call."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.seen = Seen()

    async def until(self, kind: str, which: Callable[[Any], object] = lambda _: True) -> Any:
        """Reads up to the next event of a kind (that satisfies `which`), and gives it."""
        async with asyncio.timeout(LIMIT_S):
            while await self._read_one():
                event = self.seen.events[-1]
                if event.WhichOneof("event") == kind and which(getattr(event, kind)):
                    return getattr(event, kind)
        raise AssertionError(f"the stream ended before {kind}; seen: {self.seen.kinds[-20:]}")

    async def to_end(self) -> Seen:
        """Reads the rest; raises where the call ends with an error."""
        async with asyncio.timeout(LIMIT_S):
            while await self._read_one():
                pass
        return self.seen

    async def lose(self) -> None:
        """The caller goes away."""
        _ = self.call.cancel()

    async def _read_one(self) -> bool:
        message = await self.call.read()
        if message is grpc.aio.EOF:
            return False
        self.seen.add(message.event)
        return True


# -- A stream of one's own -------------------------------------------------------------------------------------


class Stream:
    """A StreamBatch call: written to at will, and read when asked."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.seen = Seen()
        self.acks: list[pb.ItemAcknowledged] = []
        self.credits: list[int] = []
        # The order in which things came: "ack i0", "credit", "result i0", "accepted", …
        self.log: list[str] = []

    async def open(self, **fields: Any) -> Stream:
        """Opens a new batch."""
        return await self.send(open=pb.StreamBatchOpen(config=config(**fields)))

    async def reopen(self, batch_id: str, after: int = 0) -> Stream:
        """Goes on with a batch."""
        reopen = pb.ReopenBatch(batch_id=batch_id, after_sequence=after)
        return await self.send(open=pb.StreamBatchOpen(reopen=reopen))

    async def add(self, *items: item_pb2.Item) -> Stream:
        """More items."""
        return await self.send(add_items=pb.AddItems(items=items))

    async def release(self) -> Stream:
        """Releases what was added."""
        return await self.send(release=pb.Release())

    async def cancel_items(self, *item_ids: str) -> Stream:
        """Cancels some items, or all."""
        return await self.send(cancel_items=pb.CancelItems(item_ids=item_ids))

    async def send(self, **message: Any) -> Stream:
        """Any message."""
        async with asyncio.timeout(LIMIT_S):
            await self.call.write(pb.StreamBatchRequest(**message))
        return self

    async def half_close(self) -> Stream:
        """No more items."""
        await self.call.done_writing()
        return self

    async def until(self, condition: Callable[[Stream], object]) -> Stream:
        """Reads until a condition holds; fails where the stream ends before."""
        async with asyncio.timeout(LIMIT_S):
            while not condition(self):
                assert await self._read_one(), f"the stream ended; seen: {self.log[-20:]}"
        return self

    async def until_acked(self, count: int) -> Stream:
        """Reads until so many items are acknowledged."""
        return await self.until(lambda stream: len(stream.acks) >= count)

    async def to_end(self) -> Seen:
        """Reads the rest; raises where the call ends with an error."""
        async with asyncio.timeout(LIMIT_S):
            while await self._read_one():
                pass
        return self.seen

    async def _read_one(self) -> bool:
        message = await self.call.read()
        if message is grpc.aio.EOF:
            return False
        assert message.ByteSize() <= MAX_SEND_BYTES
        match message.WhichOneof("message"):
            case "event":
                self.seen.add(message.event)
                kind = message.event.WhichOneof("event")
                self.log.append(f"result {message.event.result.item_id}" if kind == "result" else kind)
            case "items_acknowledged":
                self.acks += message.items_acknowledged.items
                self.log += [f"ack {ack.item_id}" for ack in message.items_acknowledged.items]
            case "credit":
                self.credits.append(message.credit.total_items)
                self.log.append("credit")
            case _:
                raise AssertionError(message)
        return True


# -- The house -------------------------------------------------------------------------------------------------


class House:
    """A running service, the stand-in behind it, and a channel to it."""

    def __init__(
        self,
        fake: FakeOllama,
        target: str,
        batches: Batches,
        logs: Sequence[Any],
        *,
        metrics_url: str = "",
        http_url: str = "",
    ) -> None:
        self.fake = fake
        # Empty unless they were asked for.
        self.metrics_url = metrics_url
        self.http_url = http_url
        self.target = target
        self.batches = batches
        self.channel = self.dial()
        self.stub: Any = pb_grpc.BatchInferenceStub(self.channel)
        # Where this test provokes defects.
        self.expected_defects: set[str] = set()
        self.logs = logs

    @property
    def defects(self) -> list[tuple[str, BaseException]]:
        """What was reported as a defect: where, and what."""
        return [(entry["where"], entry["exc_info"][1]) for entry in self.logs if entry["event"] == "defect"]

    @property
    def backend(self) -> Backend:
        """The adapter, for tests that break it."""
        return self.batches._drivers["ollama"].backend

    def dial(self) -> grpc.aio.Channel:
        """A connection of its own."""
        return grpc.aio.insecure_channel(self.target, [("grpc.use_local_subchannel_pool", 1)])

    def run_batch(
        self, items: Iterable[item_pb2.Item], *, timeout: float | None = None, stub: Any = None, **fields: Any
    ) -> Reading:
        """A RunBatch call; `stub` is that of another connection."""
        request = pb.RunBatchRequest(config=config(**fields), items=items)
        return Reading((stub or self.stub).RunBatch(request, timeout=timeout))

    def infer(self, item: item_pb2.Item, *, timeout: float | None = None, **fields: Any) -> Reading:
        """An Infer call."""
        return Reading(self.stub.Infer(pb.InferRequest(item=item, config=config(**fields)), timeout=timeout))

    async def run(self, items: Iterable[item_pb2.Item], **fields: Any) -> Seen:
        """Runs a batch to its end."""
        return await self.run_batch(items, **fields).to_end()

    def attach_batch(self, batch_id: str, after: int = 0, **fields: Any) -> Reading:
        """An AttachBatch call."""
        request = pb.AttachBatchRequest(batch_id=batch_id, after_sequence=after, **fields)
        return Reading(self.stub.AttachBatch(request))

    async def attach(self, batch_id: str, after: int = 0) -> Seen:
        """Follows a batch to its end."""
        return await self.attach_batch(batch_id, after).to_end()

    async def until_running(self, count: int) -> None:
        """Until so many batches have not ended: that a caller has left is told to nobody."""
        async with asyncio.timeout(LIMIT_S):
            while self.batches.running != count:  # noqa: ASYNC110 - there is nothing to wait for
                await asyncio.sleep(0.005)

    async def cancel(self, batch_id: str, *item_ids: str) -> tuple[int, int]:
        """Cancels; how many, and how many had ended."""
        answer = await self.stub.CancelBatch(pb.CancelBatchRequest(batch_id=batch_id, item_ids=item_ids))
        return answer.cancelled, answer.already_ended

    async def submit(
        self, items: Iterable[item_pb2.Item], metadata: dict[str, str] | None = None, **fields: Any
    ) -> kept_pb2.KeptBatch:
        """Submits a batch."""
        request = pb.SubmitBatchRequest(config=config(**fields), items=items, metadata=metadata)
        answer = await self.stub.SubmitBatch(request, timeout=LIMIT_S)
        return answer.batch  # type: ignore[no-any-return]

    async def kept(self, batch_id: str) -> kept_pb2.KeptBatch:
        """How a kept batch stands."""
        answer = await self.stub.GetBatch(pb.GetBatchRequest(batch_id=batch_id), timeout=LIMIT_S)
        return answer.batch  # type: ignore[no-any-return]

    async def list_results(self, batch_id: str, page_size: int = 0, **fields: Any) -> Seen:
        """All results so far of a kept batch, page by page."""
        seen, token = Seen(), ""
        while True:
            request = pb.ListResultsRequest(batch_id=batch_id, page_size=page_size, page_token=token, **fields)
            page = await self.stub.ListResults(request, timeout=LIMIT_S)
            assert page.ByteSize() <= MAX_SEND_BYTES
            for event in page.events:
                seen.add(event)
            token = page.next_page_token
            if not token:
                return seen

    def stream(self) -> Stream:
        """A StreamBatch call."""
        return Stream(self.stub.StreamBatch())

    @property
    def work(self) -> list[Any]:
        """Requests for answers that the backend has received whole, loads left out."""
        return [
            request
            for request in self.fake.requests
            if request.path in WORK_PATHS and request.last_byte_ns is not None and not is_load(request.body)
        ]

    @property
    def loads(self) -> list[str]:
        """The models that were asked to be loaded, in their order; one for each request."""
        return [r.body["model"] for r in self.fake.requests if r.path in WORK_PATHS and is_load(r.body)]


def is_load(body: Any) -> bool:
    """Whether a request loads or unloads a model, and asks for no answer."""
    return isinstance(body, dict) and "keep_alive" in body


class _Problems(logging.Handler):
    """Collects what gRPC and asyncio complain about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(f"{record.name}: {record.getMessage()}")


@asynccontextmanager
async def house(
    *,
    models: Iterable[FakeModel] = DEFAULT_MODELS,
    settings: dict[str, Any] | None = None,
    starts_away: bool = False,
    with_metrics: bool = False,
    with_http: bool = False,
    keeps_in: Path | None = None,
    **fake_settings: Any,
) -> AsyncGenerator[House, None]:
    """A service over a stand-in; `fake_settings` are those of FakeOllama, `settings` those of the service.

    `keeps_in`: where it keeps batches; None: nowhere.
    """
    problems = _Problems()
    loggers = [logging.getLogger(name) for name in ("grpc", "asyncio")]
    for logger in loggers:
        logger.addHandler(problems)
    try:
        async with FakeOllama(models, **fake_settings) as fake:
            if starts_away:
                await fake.go_away()
            with structlog.testing.capture_logs() as logs:
                usual = {
                    "listen": "127.0.0.1:0",
                    "metrics_listen": "127.0.0.1:0",
                    "http_listen": "127.0.0.1:0",
                    "ollama_url": fake.url,
                    "drain": 0.0,
                    "state_dir": "none",
                    "data_dir": str(keeps_in),
                }
                made = Settings(**{**usual, **(settings or {})})
                async with running(
                    made, with_metrics=with_metrics, with_store=keeps_in is not None, with_http=with_http
                ) as service:
                    here = House(
                        fake,
                        service.target,
                        service.batches,
                        logs,
                        metrics_url=service.metrics_url,
                        http_url=service.http_url,
                    )
                    try:
                        yield here
                    finally:
                        await here.channel.close()
                for where, defect in here.defects:
                    if where not in here.expected_defects:
                        raise AssertionError(f"a defect in {where}") from defect
            await fake.wait_for(lambda f: f.open_connections == 0)
    finally:
        for logger in loggers:
            logger.removeHandler(problems)
    assert not problems.found
