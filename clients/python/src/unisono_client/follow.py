"""Calls that answer with the events of one batch: followed to the end over connections that may be lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

import grpc.aio

from unisono_client._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono_client._generated.unisono.v1 import event_pb2
from unisono_client.ledger import ProtocolError
from unisono_client.patience import EndedEarlyError, Patience, in_time
from unisono_client.results import Delta, Report, Result, joined
from unisono_client.transport import Transport

# How long the service is given to hear that a batch is left.
_GOODBYE_S = 2.0
# Metadata of a call.
Metadata = Sequence[tuple[str, str | bytes]]
_Attached = grpc.aio.UnaryStreamCall[pb.AttachBatchRequest, pb.AttachBatchResponse]
_Inferred = grpc.aio.UnaryStreamCall[pb.InferRequest, pb.InferResponse]
# Begins a call that makes a batch.
Begin = Callable[[], _Inferred]


@dataclass(slots=True)
class _Said:
    """How much of an item's text was told, in bytes of UTF-8, of which attempt."""

    attempt: int = 0
    content: int = 0
    thinking: int = 0


class Follower:
    """Follows one batch."""

    def __init__(
        self,
        transport: Transport,
        metadata: Metadata,
        *,
        give_up_after_s: float,
        deltas: pb.DeltaConfig | None = None,
        batch_id: str = "",
        after_sequence: int = 0,
    ) -> None:
        self._transport = transport
        self._metadata = metadata
        self._patience = Patience(transport.target, give_up_after_s, is_secure=transport.is_secure)
        self._deltas = deltas
        self.batch_id = batch_id
        self.last_sequence = after_sequence
        self.report: Report | None = None
        self._parts: list[event_pb2.ResultPart] = []
        self._said: dict[str, _Said] = {}

    async def follow(self, begin: Begin | None = None, *, answers: int = 0) -> AsyncGenerator[Result | Delta, None]:
        """The results, and what items say meanwhile where deltas are asked for.

        `begin` makes the batch, under a request_id, so that it can be called again until the batch is known; None:
        the batch is known. `answers`: after so many results nothing is missing but the report; 0: nobody knows.
        Raises UnreachableError, BatchLostError, RefusedError.
        """
        told_results = 0
        while self.report is None:
            call = begin() if begin is not None and not self.batch_id else self._attach()
            failure: Exception | None = None
            try:
                while isinstance(response := await in_time(call.read()), pb.AttachBatchResponse | pb.InferResponse):
                    self._patience.regained()
                    for told in self._hear(response.event):
                        told_results += isinstance(told, Result)
                        yield told
            except (grpc.aio.AioRpcError, EndedEarlyError, ProtocolError) as error:
                failure = error
            finally:
                _ = call.cancel()
            if failure is None and self.report is None:
                failure = EndedEarlyError("the stream ended before its batch did")
            if failure is not None:
                if answers and told_results == answers:
                    return
                await self._patience.lost(failure, batch_id=self.batch_id, after_sequence=self.last_sequence)

    def _attach(self) -> _Attached:
        request = pb.AttachBatchRequest(
            batch_id=self.batch_id, after_sequence=self.last_sequence, deltas=self._deltas
        )
        return self._transport.stub.AttachBatch(request, metadata=self._metadata)

    def _hear(self, event: event_pb2.BatchEvent) -> list[Result | Delta]:
        if event.HasField("sequence"):
            if event.sequence <= self.last_sequence:
                return []
            if event.sequence != self.last_sequence + 1:
                raise ProtocolError(f"event {event.sequence} came after {self.last_sequence}")
            self.last_sequence = event.sequence
        match event.WhichOneof("event"):
            case "accepted":
                self.batch_id = event.accepted.batch_id
            case "deltas":
                told = [self._delta(each) for each in event.deltas.items]
                return [each for each in told if each.content or each.thinking]
            case "result_part":
                self._parts.append(event.result_part)
            case "result":
                parts, self._parts = self._parts, []
                return [Result(joined(parts, event.result), event.result.index)]
            case "summary":
                self.report = Report(event.summary)
            case _:
                pass
        return []

    def _delta(self, delta: event_pb2.Delta) -> Delta:
        """What is new: a caller that comes back is first sent what running items have said so far."""
        said = self._said.setdefault(delta.item_id, _Said())
        if delta.attempt != said.attempt:
            said.attempt, said.content, said.thinking = delta.attempt, 0, 0
        content = delta.content.encode()[max(0, said.content - delta.content_offset) :]
        thinking = delta.thinking.encode()[max(0, said.thinking - delta.thinking_offset) :]
        said.content += len(content)
        said.thinking += len(thinking)
        return Delta(delta.item_id, delta.attempt, content.decode(), thinking.decode())


async def cancel_batch(
    transport: Transport, give_up_after_s: float, metadata: Metadata, batch_id: str, item_ids: Sequence[str]
) -> tuple[int, int]:
    """Cancels items of a batch, or all; how many were, and how many had ended before. Safe to do twice.

    Raises UnreachableError, BatchLostError (there is no such batch), RefusedError.
    """
    patience = Patience(transport.target, give_up_after_s, is_secure=transport.is_secure)
    request = pb.CancelBatchRequest(batch_id=batch_id, item_ids=item_ids)
    while True:
        try:
            response = await transport.stub.CancelBatch(request, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            await patience.lost(error, batch_id=batch_id, after_sequence=0)
        else:
            return response.cancelled, response.already_ended


async def most_items(transport: Transport, give_up_after_s: float, metadata: Metadata) -> int:
    """How many items the service takes in one batch. Raises UnreachableError, RefusedError."""
    patience = Patience(transport.target, give_up_after_s, is_secure=transport.is_secure)
    while True:
        try:
            response = await transport.stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            await patience.lost(error, batch_id="", after_sequence=0)
        else:
            return response.limits.max_items


async def say_goodbye(transport: Transport, metadata: Metadata, batch_id: str) -> None:
    """Cancels a batch whose caller leaves; where that is not heard, the service does so by itself, a little later."""
    request = pb.CancelBatchRequest(batch_id=batch_id)
    # Whoever leaves may be cancelled meanwhile, by the end of the event loop: that is no reason not to say it.
    for _ in range(2):
        # A client that is closed already has no connection for it.
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.UsageError):
            try:
                _ = await transport.stub.CancelBatch(request, timeout=_GOODBYE_S, metadata=metadata)
            except asyncio.CancelledError:
                continue
        return
