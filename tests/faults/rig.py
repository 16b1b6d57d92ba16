"""What the rig is made of: a backend and a service as processes, a caller that never gives up, and its history.

The caller keeps everything that it was told. What the service promises is checked as it comes (`History`), and once
more against what the service and the backend say in the end (`Caller.finish`).
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from tests.fakes.ollama import FakeModel, FakeOllama
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono._generated.unisono.v1 import event_pb2, item_pb2

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SLOTS = 8
MODEL = "first"
# A caller asks again so soon after its connection was cut.
_AGAIN_S = 0.02
# Statuses of a service that is not there, or is going.
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
_CHANNEL = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 50)]


class BrokenPromiseError(AssertionError):
    """The service did not do what it promises; the message names the promise."""


def promise(name: str, is_kept: object, what: object = "") -> None:
    """Raises BrokenPromiseError unless it is kept."""
    if not is_kept:
        raise BrokenPromiseError(f"{name}: {what}")


# -- The backend -----------------------------------------------------------------------------------------------


def _serve(pipe: Connection, settings: dict[str, Any]) -> None:
    async def serve() -> None:
        async with FakeOllama([FakeModel(name=MODEL)], num_parallel=SLOTS, **settings) as fake:
            pipe.send(fake.url)
            loop = asyncio.get_running_loop()
            while await loop.run_in_executor(None, pipe.recv) == "count":
                started = [
                    record.body["messages"][-1]["content"]
                    for record in fake.requests_to("/api/chat")
                    if record.started_ns is not None and record.body.get("messages")
                ]
                pipe.send(Counter(started))

    with contextlib.suppress(EOFError):
        asyncio.run(serve())


@dataclass(frozen=True)
class StandIn:
    """A stand-in for Ollama in a process of its own."""

    url: str
    pipe: Connection

    def calls(self) -> Counter[str]:
        """How often each prompt was begun to be answered."""
        self.pipe.send("count")
        found: Counter[str] = self.pipe.recv()
        return found


@contextlib.contextmanager
def stand_in(**settings: Any) -> Iterator[StandIn]:
    """A backend that ends with the context."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
    process.start()
    try:
        yield StandIn(ours.recv(), ours)
        ours.send("done")
    finally:
        ours.close()
        process.join(10)


# -- The service -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Up:
    """How long a service took from the start of its process until it answered, in seconds."""

    wall_s: float
    # Of these, it waited for a processor that other programs had.
    waited_s: float

    @property
    def own_s(self) -> float:
        """What it would have taken on a machine that does nothing else."""
        return self.wall_s - self.waited_s


class Service:
    """`unisono serve` as a process, which can be killed and started again."""

    def __init__(self, folder: Path, backend_url: str) -> None:
        """`folder`: for its data, its socket and its log; a short path, since a socket's may be no longer."""
        self.target = f"unix:{folder / 's'}"
        self._log = folder / "service.log"
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("UNISONO_", "OTEL_"))},
            "UNISONO_LISTEN": self.target,
            "UNISONO_DATA_DIR": str(folder / "data"),
            "UNISONO_STATE_DIR": "none",
            "UNISONO_METRICS_LISTEN": "none",
            "UNISONO_HTTP_LISTEN": "none",
            "UNISONO_OLLAMA_URL": backend_url,
            "UNISONO_DEFAULT_MODEL": MODEL,
            "UNISONO_SLOTS": str(SLOTS),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, failpoints: str = "") -> None:
        """Starts it; `failpoints`: see adapters/journal/failpoints.py."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "unisono", "serve"],
                env={**self._environ, "UNISONO_FAILPOINTS": failpoints},
                stderr=log,
                stdout=log,
            )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The one that was started last."""
        if self._process is None:
            raise RuntimeError("the service was not started")
        return self._process

    async def wait_up(self, limit_s: float = 60.0) -> Up | None:
        """Waits until it answers; with how long that took. None: it ended before."""
        began = time.monotonic()
        async with grpc.aio.insecure_channel(self.target, options=_CHANNEL) as channel:
            stub = pb_grpc.BatchInferenceStub(channel)
            while time.monotonic() - began < limit_s:
                if self.process.poll() is not None:
                    return None
                with contextlib.suppress(grpc.aio.AioRpcError):
                    _ = await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=1.0)
                    return Up(time.monotonic() - began, self._waited_s())
                await asyncio.sleep(_AGAIN_S)
        raise BrokenPromiseError(f"going again: it did not answer within {limit_s:g} s; see {self._log}")

    def _waited_s(self) -> float:
        """How long its main thread wanted a processor that others had; 0 where the system does not tell."""
        try:
            _, waited_ns, _ = Path(f"/proc/{self.process.pid}/schedstat").read_text().split()
        except (OSError, ValueError):
            return 0.0
        return int(waited_ns) / 1e9

    async def wait_dead(self, limit_s: float) -> bool:
        """Waits until it has ended; whether it has."""
        began = time.monotonic()
        while self.process.poll() is None:
            if time.monotonic() - began > limit_s:
                return False
            await asyncio.sleep(_AGAIN_S)
        return True

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Ends it, and waits for its end; with its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def complaints(self) -> list[str]:
        """Lines of its log that speak of an error or a defect."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return [line for line in lines if '"level": "error"' in line or line.startswith("Traceback")]


# -- Who calls it ----------------------------------------------------------------------------------------------


@dataclass
class History:
    """What a caller was told of one batch, in the order in which it was told."""

    request_id: str
    items: int
    batch_id: str = ""
    # Serialised, so that what is compared is everything.
    events: list[bytes] = field(default_factory=list)
    results: dict[str, bytes] = field(default_factory=dict)
    summary: event_pb2.Summary | None = None
    # Connections that it took.
    calls: int = 0
    _last_progress: int = 0

    def accepted(self, batch_id: str) -> None:
        """The service said that it has the batch."""
        promise("unique", self.batch_id in ("", batch_id), f"{self.request_id} is {self.batch_id} and {batch_id}")
        self.batch_id = batch_id

    def add(self, event: event_pb2.BatchEvent) -> None:
        """One more event."""
        if not event.HasField("sequence"):
            return
        promise("resumable", event.sequence == len(self.events) + 1, f"{event.sequence} after {len(self.events)}")
        promise("complete", self.summary is None, "something follows the summary")
        self.events.append(event.SerializeToString(deterministic=True))
        kind = event.WhichOneof("event")
        if kind == "result":
            item_id = event.result.item_id
            promise("unique", item_id not in self.results, f"{item_id} ended twice")
            self.results[item_id] = event.result.SerializeToString(deterministic=True)
        elif kind == "progress":
            counts = event.progress
            ended = counts.completed + counts.failed + counts.cancelled + counts.expired
            promise("monotone", ended >= self._last_progress, f"{ended} ended after {self._last_progress}")
            self._last_progress = ended
        elif kind == "summary":
            self.summary = event.summary

    def check_end(self) -> None:
        """What must be so when the last event has come."""
        promise("complete", self.summary is not None, f"{self.batch_id} has no summary")
        expected = {f"i{number}" for number in range(self.items)}
        promise("complete", set(self.results) == expected, f"{sorted(expected - set(self.results))[:5]} never ended")
        for packed in self.results.values():
            result = event_pb2.Result.FromString(packed)
            promise("complete", result.state == event_pb2.ITEM_STATE_COMPLETED, result)


class Caller:
    """Submits one batch after the other and follows each to its end, whatever becomes of its connection."""

    def __init__(self, target: str, backend: StandIn, *, items: int) -> None:
        self._target = target
        self._backend = backend
        self._items = items
        self.histories: list[History] = []
        self._is_last = False

    def stop(self) -> None:
        """The batch that is under way is the last one."""
        self._is_last = True

    async def run(self) -> None:
        """Until `stop`, and then to the end of the batch."""
        async with grpc.aio.insecure_channel(self._target, options=_CHANNEL) as channel:
            stub = pb_grpc.BatchInferenceStub(channel)
            while not self._is_last or not self.histories:
                history = History(f"r{len(self.histories)}", self._items)
                self.histories.append(history)
                await self._submit(stub, history)
                while history.summary is None:
                    await self._follow(stub, history)
                history.check_end()

    async def _submit(self, stub: Any, history: History) -> None:
        request = pb.SubmitBatchRequest(
            config=pb.BatchConfig(model=MODEL, request_id=history.request_id),
            items=self._messages(history.request_id),
        )
        while not history.batch_id:
            history.calls += 1
            try:
                answer = await stub.SubmitBatch(request, timeout=20.0)
            except grpc.aio.AioRpcError as error:
                # Whose disk is full may have room in a while.
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    await self._refused(error)
            else:
                history.accepted(answer.batch.batch_id)

    async def _follow(self, stub: Any, history: History) -> None:
        history.calls += 1
        request = pb.AttachBatchRequest(batch_id=history.batch_id, after_sequence=len(history.events))
        try:
            async for message in stub.AttachBatch(request):
                history.add(message.event)
        except grpc.aio.AioRpcError as error:
            await self._refused(error)

    async def _refused(self, error: grpc.aio.AioRpcError) -> None:
        promise("no loss", error.code() in _AWAY, f"{error.code()}: {error.details()}")
        await asyncio.sleep(_AGAIN_S)

    def _messages(self, request_id: str) -> Sequence[item_pb2.Item]:
        return [
            item_pb2.Item(
                item_id=f"i{number}",
                options=item_pb2.Options(num_predict=3 + number % 5),
                chat=item_pb2.ChatRequest(
                    messages=[item_pb2.Message(role=item_pb2.ROLE_USER, content=f"{request_id} i{number}")]
                ),
            )
            for number in range(self._items)
        ]

    async def finish(self) -> int:
        """The service says of all batches what it said then; answers with calls beyond one for each item."""
        async with grpc.aio.insecure_channel(self._target, options=_CHANNEL) as channel:
            stub = pb_grpc.BatchInferenceStub(channel)
            listed: list[str] = []
            token = ""
            while True:
                page = await stub.ListBatches(pb.ListBatchesRequest(page_size=7, page_token=token))
                listed += [batch.batch_id for batch in page.batches]
                token = page.next_page_token
                if not token:
                    break
            promise("unique", listed == [one.batch_id for one in reversed(self.histories)], listed)
            for history in self.histories:
                again = History(history.request_id, history.items, history.batch_id)
                async for message in stub.AttachBatch(pb.AttachBatchRequest(batch_id=history.batch_id)):
                    again.add(message.event)
                promise("stable", again.events == history.events, f"{history.batch_id} changed")
                kept = (await stub.GetBatch(pb.GetBatchRequest(batch_id=history.batch_id))).batch
                promise("accounted", kept.counts.completed == history.items == kept.counts.accepted, kept)
                promise("accounted", kept.last_sequence == len(history.events), kept)
                await self._check_results(stub, history)
        return self._check_calls()

    async def _check_results(self, stub: Any, history: History) -> None:
        found: dict[str, bytes] = {}
        token = ""
        while True:
            page = await stub.ListResults(
                pb.ListResultsRequest(batch_id=history.batch_id, page_size=50, page_token=token)
            )
            for event in page.events:
                found[event.result.item_id] = event.result.SerializeToString(deterministic=True)
            token = page.next_page_token
            if not token:
                break
        promise("stable", found == history.results, f"the results of {history.batch_id} are others")

    def _check_calls(self) -> int:
        calls = self._backend.calls()
        wanted = {f"{one.request_id} i{number}" for one in self.histories for number in range(one.items)}
        promise("accounted", set(calls) == wanted, "the backend was asked for something else")
        return calls.total() - len(wanted)
