"""The events of a kept batch, over as many calls as it takes.

A connection that is lost, or a service that is started again, is waited for as long as `Patience` says: the batch is
attached to again after the last event that was taken whole. The batch itself goes on whatever happens here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import grpc
import grpc.aio

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc, event_pb2
from unisono.core.durations import format_duration
from unisono.edge.cli.errors import ExitCode, StopError, problem_of_call
from unisono.edge.cli.patience import EndedEarlyError, Patience, is_lost
from unisono.edge.cli.session import LostError
from unisono.edge.cli.terminal import printable

# A machine takes minutes to start again, and the batch waits for its service.
GIVE_UP_AFTER_S = 600.0


class Follower:
    """Reads one batch to its end."""

    def __init__(
        self,
        stub: batch_inference_pb2_grpc.BatchInferenceStub,
        batch_id: str,
        *,
        after: int,
        on_connection: Callable[[str], None],
        give_up_after_s: float,
    ) -> None:
        """`after`: events after this one are read. `on_connection` is told when the connection is lost, and back."""
        self._stub = stub
        self._batch_id = batch_id
        self._after = after
        self._on_connection = on_connection
        self._give_up_after_s = give_up_after_s
        self._patience = Patience(give_up_after_s)
        self._is_lost = False

    async def events(self) -> AsyncGenerator[event_pb2.BatchEvent, None]:
        """Yields each event once, up to the summary.

        Raises LostError, and grpc.aio.AioRpcError where the service itself says what is wrong.
        """
        while True:
            request = rpc.AttachBatchRequest(batch_id=self._batch_id, after_sequence=self._after)
            call = self._stub.AttachBatch(request)
            try:
                async for response in call:
                    event = response.event
                    self._note_life()
                    yield event
                    # The parts of a result count when it is there: they are sent again with it.
                    if event.HasField("sequence") and not event.HasField("result_part"):
                        self._after = event.sequence
                    if event.HasField("summary"):
                        return
                ended: grpc.aio.AioRpcError | EndedEarlyError = EndedEarlyError("the stream ended before the batch")
            except grpc.aio.AioRpcError as error:
                ended = error
            finally:
                _ = call.cancel()
            await self._pause(ended)

    def _note_life(self) -> None:
        self._patience.regained()
        if self._is_lost:
            self._is_lost = False
            self._on_connection("the connection is there again")

    async def _pause(self, error: grpc.aio.AioRpcError | EndedEarlyError) -> None:
        """Returns when it is time for another try; raises where that is of no use."""
        why = str(error)
        if isinstance(error, grpc.aio.AioRpcError):
            problem = problem_of_call(error)
            why = problem.message
            # What is being stopped has a successor.
            if not is_lost(error) and problem.reason != "SHUTTING_DOWN":
                raise error
        pause_s = self._patience.lost()
        if pause_s is None:
            raise LostError(why) from error
        if not self._is_lost:
            self._is_lost = True
            self._on_connection(
                f"the connection was lost ({why}); batch {self._batch_id} goes on, and so does this command once it "
                f"is back, for up to {format_duration(self._give_up_after_s)}"
            )
        await asyncio.sleep(pause_s)


def stop_for_lost(error: LostError, target: str, command: str) -> StopError:
    """What to tell the user where the connection did not come back; `command` goes on."""
    return StopError(
        f"The service at {target}: the connection was lost: {printable(str(error), one_line=True)}",
        f"It was tried again for {format_duration(GIVE_UP_AFTER_S)}. The batch is kept, and goes on with its "
        "service; to go on with it here:",
        f"  {command}",
        code=ExitCode.UNREACHABLE,
    )
