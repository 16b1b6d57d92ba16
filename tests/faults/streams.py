"""Who calls the service by durable StreamBatch: adds items in pieces, and reopens the stream whenever it is lost.

What was acknowledged must be there for good; what was not is sent again. An item that was kept and whose
acknowledgement was lost comes twice then, and must run once.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from tests.faults.backend import MODEL
from tests.faults.callers import Caller, dial, items_of, refused
from tests.faults.history import History
from tests.faults.validators import promise
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc as pb_grpc

# Items of one message.
_PIECE = 8
# A stream of which nothing is heard for so long is opened anew: the connection may be gone without a word.
_SILENT_S = 20.0


class Streamer(Caller):
    """As `Caller`, over streams."""

    letter = "s"

    def __init__(self, target: str, *, items: int, letter: str = "") -> None:
        super().__init__(target, items=items, letter=letter)
        # Items of the batch under way that were acknowledged.
        self._acked: set[str] = set()

    async def one(self, history: History) -> None:
        """One batch, to its end."""
        self._acked = set()
        while not history.is_over:
            # A channel each: a stream that was lost takes its connection along.
            async with dial(self.target) as channel:
                await self._stream(pb_grpc.BatchInferenceStub(channel), history)
        # Of a batch that had ended when the stream came back, the results say it.
        known = self._acked | {end.item_id for end in history.ends}
        promise("complete", known == history.wanted, f"{history.name}: items were never acknowledged")

    async def _stream(self, stub: Any, history: History) -> None:
        """One stream, for as long as it lasts."""
        call = stub.StreamBatch()
        connection = history.connect()
        if history.ids:
            reopen = pb.ReopenBatch(batch_id=history.batch_id, after_sequence=connection.after)
            opened = pb.StreamBatchOpen(reopen=reopen)
        else:
            # Nobody knows whether an earlier one was kept: the same request is the same batch.
            config = pb.BatchConfig(model=MODEL, request_id=history.name, detach_grace=Duration(seconds=600))
            opened = pb.StreamBatchOpen(config=config, durable=True)
        writing = asyncio.ensure_future(self._write(call, opened, history))
        try:
            while (message := await asyncio.wait_for(call.read(), _SILENT_S)) is not grpc.aio.EOF:
                self._heard(message, history)
        except TimeoutError:
            _ = call.cancel()
        except grpc.aio.AioRpcError as error:
            # A new batch may find no room.
            await refused(error, allows=[] if history.ids else [grpc.StatusCode.RESOURCE_EXHAUSTED])
        finally:
            _ = writing.cancel()
            _ = await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, call: Any, opened: pb.StreamBatchOpen, history: History) -> None:
        # What ends the writing ends the reading too, which tells why.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(pb.StreamBatchRequest(open=opened))
            # The last piece that was acknowledged comes again: that must change nothing.
            left = [item for item in items_of(history.name, self.items) if item.item_id not in self._acked]
            known = [item for item in items_of(history.name, self.items) if item.item_id in self._acked][-2:]
            left = [*known, *left] if history.ids else left
            for start in range(0, len(left), _PIECE):
                await call.write(pb.StreamBatchRequest(add_items=pb.AddItems(items=left[start : start + _PIECE])))
                await asyncio.sleep(0.005)
            await call.done_writing()

    def _heard(self, message: pb.StreamBatchResponse, history: History) -> None:
        match message.WhichOneof("message"):
            case "event":
                if message.event.WhichOneof("event") == "accepted":
                    history.ids.append(message.event.accepted.batch_id)
                history.add(message.event)
            case "items_acknowledged":
                for ack in message.items_acknowledged.items:
                    promise("no loss", not ack.HasField("refusal"), f"{history.name} {ack.item_id}: {ack.refusal}")
                    self._acked.add(ack.item_id)
            case _:
                pass
