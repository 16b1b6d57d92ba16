"""Who calls the service by gRPC: submits batches and follows them, whatever becomes of the connections.

A caller never gives up, keeps all that it was told in a `History`, and judges nothing but what a call may be refused
with while the service is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from tests.faults.backend import MODEL
from tests.faults.history import History, end_of, packed, tokens_of
from tests.faults.service import AGAIN_S, CHANNEL
from tests.faults.validators import promise
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc
from unisono._generated.unisono.v1 import item_pb2

if TYPE_CHECKING:
    from unisono._generated.unisono.v1 import event_pb2

# Statuses of a service that is not there, or is going; and of a stream that another one has replaced.
AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
)
# What gRPC's client says of a stream that was cut while it wrote; no service sends it.
_LOST = "Internal error from Core"
_SUBMIT_S = 20.0


def dial(target: str) -> grpc.aio.Channel:
    """A channel with connections of its own."""
    return grpc.aio.insecure_channel(target, options=CHANNEL)


def items_of(name: str, count: int) -> list[item_pb2.Item]:
    """The items of a batch: i0, i1 and so on, with prompts that name batch and item."""
    return [
        item_pb2.Item(
            item_id=f"i{number}",
            options=item_pb2.Options(num_predict=tokens_of(f"i{number}")),
            chat=item_pb2.ChatRequest(
                messages=[item_pb2.Message(role=item_pb2.ROLE_USER, content=f"{name} i{number}")]
            ),
        )
        for number in range(count)
    ]


async def refused(error: grpc.aio.AioRpcError, *, allows: Sequence[grpc.StatusCode] = ()) -> None:
    """A call ended with an error: that of a service that is away, and a moment has passed."""
    is_away = error.code() in (*AWAY, *allows) or error.details() == _LOST
    promise("no loss", is_away, f"{error.code()}: {error.details()}")
    await asyncio.sleep(AGAIN_S)


class Caller:
    """Has one batch run after the other, and follows each to its end."""

    # What its batches are called by.
    letter = "g"

    def __init__(self, target: str, *, items: int, letter: str = "") -> None:
        self.target = target
        self.items = items
        self.letter = letter or self.letter
        self.histories: list[History] = []
        self._is_last = False

    def stop(self) -> None:
        """The batch that is under way is the last one."""
        self._is_last = True

    async def run(self) -> None:
        """Until `stop`, and then to the end of the batch."""
        while not self._is_last or not self.histories:
            name = f"{self.letter}{len(self.histories)}"
            history = History(name, {f"i{number}" for number in range(self.items)})
            self.histories.append(history)
            await self.one(history)

    async def one(self, history: History) -> None:
        """One batch, to its end."""
        async with dial(self.target) as channel:
            stub = pb_grpc.BatchInferenceStub(channel)
            await submit(stub, history)
            while not history.is_over:
                await follow(stub, history)

    async def finish(self, stub: Any) -> None:
        """All is over: what the service says of its batches now."""
        for history in self.histories:
            await read_again(stub, history)


# -- Calls -----------------------------------------------------------------------------------------------------


async def submit(stub: Any, history: History) -> None:
    """Asks for the batch until it was accepted."""
    request = pb.SubmitBatchRequest(
        config=pb.BatchConfig(model=MODEL, request_id=history.name),
        items=items_of(history.name, len(history.wanted)),
    )
    while not history.ids:
        try:
            answer = await stub.SubmitBatch(request, timeout=_SUBMIT_S)
        except grpc.aio.AioRpcError as error:
            # Whose disk is full may have room in a while.
            await refused(error, allows=[grpc.StatusCode.RESOURCE_EXHAUSTED])
        else:
            history.ids.append(answer.batch.batch_id)


async def follow(stub: Any, history: History) -> None:
    """One connection that goes on from the last event that came, for as long as it lasts."""
    request = pb.AttachBatchRequest(batch_id=history.batch_id, after_sequence=history.connect().after)
    try:
        async for message in stub.AttachBatch(request):
            history.add(message.event)
    except grpc.aio.AioRpcError as error:
        await refused(error)


async def read_again(stub: Any, history: History) -> None:
    """All events once more, the results page by page, and the counters."""
    batch_id = history.batch_id
    history.again = [packed(event) for event in await events_of(stub, batch_id)]
    history.pages = [(event.result.item_id, packed(event.result)) for event in await results_of(stub, batch_id)]
    kept = (await stub.GetBatch(pb.GetBatchRequest(batch_id=batch_id))).batch
    counts = kept.counts
    history.counters.update(
        accepted=counts.accepted,
        completed=counts.completed,
        failed=counts.failed,
        cancelled=counts.cancelled,
        expired=counts.expired,
        last_sequence=kept.last_sequence,
    )


async def events_of(stub: Any, batch_id: str) -> list[event_pb2.BatchEvent]:
    """All lasting events of a batch that has ended."""
    call = stub.AttachBatch(pb.AttachBatchRequest(batch_id=batch_id))
    return [message.event async for message in call if message.event.HasField("sequence")]


async def results_of(stub: Any, batch_id: str) -> list[event_pb2.BatchEvent]:
    """All results of a batch, by pages."""
    found: list[event_pb2.BatchEvent] = []
    token = ""
    while True:
        page = await stub.ListResults(pb.ListResultsRequest(batch_id=batch_id, page_size=50, page_token=token))
        found += page.events
        token = page.next_page_token
        if not token:
            return found


async def calls_by_item(stub: Any, batch_id: str) -> dict[str, int]:
    """How often each item of a batch was sent to a backend, as its result says."""
    ends = [end_of(event.result) for event in await results_of(stub, batch_id)]
    return {end.item_id: end.calls for end in ends}


async def batch_ids(stub: Any) -> list[str]:
    """All batches that are kept, by pages."""
    found: list[str] = []
    token = ""
    while True:
        page = await stub.ListBatches(pb.ListBatchesRequest(page_size=7, page_token=token))
        found += [batch.batch_id for batch in page.batches]
        token = page.next_page_token
        if not token:
            return found


def all_histories(callers: Iterable[Caller]) -> list[History]:
    """What all of them were told."""
    return [history for caller in callers for history in caller.histories]
