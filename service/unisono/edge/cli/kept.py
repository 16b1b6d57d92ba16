"""`unisono status`, `list`, `cancel`, `retry`, `delete`: how kept batches stand, and what is done to them."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from datetime import UTC, datetime
from typing import TypeVar

import grpc
import grpc.aio
import msgspec

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import event_pb2, kept_pb2
from unisono.edge.cli.connect import Connection, Wish, connect_to_running
from unisono.edge.cli.errors import ExitCode, StopError, describe, problem_of_call, stop_for_call
from unisono.edge.cli.kept_lines import STATES, draw_batch, draw_table, failed_of, to_object
from unisono.edge.cli.terminal import Terminal, paint, write

T = TypeVar("T")

# For an answer to a small question.
PATIENCE_S = 30.0
# How an item ends that has no answer.
UNANSWERED = (event_pb2.ITEM_STATE_FAILED, event_pb2.ITEM_STATE_EXPIRED, event_pb2.ITEM_STATE_CANCELLED)
_PAGE = 200
# What the caller has wrong, and no other try would mend.
_WRONG = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
)
_REMEDIES = {
    "BATCH_NOT_FOUND": "`unisono list` names the batches that it keeps.",
    "BATCH_RUNNING": "`unisono watch` follows it, `unisono cancel` ends it.",
    "UNAVAILABLE": "Is it running? What it has accepted is not lost.",
}


def stop_for_kept(error: grpc.aio.AioRpcError, target: str) -> StopError:
    """What to tell the user when a call about a kept batch failed, and how to end."""
    problem = problem_of_call(error)
    lines = describe(problem, f"The service at {target}", _REMEDIES.get(problem.reason))
    code = ExitCode.USAGE if error.code() in _WRONG else stop_for_call(error, target).code
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # It is there, and takes nothing at this moment: for a script, the same as one that is away.
        code = ExitCode.UNREACHABLE
    return StopError(*lines, code=code)


async def ask(connection: Connection, call: Awaitable[T]) -> T:
    """What a call answers. Raises StopError."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise stop_for_kept(error, connection.target) from None


async def get_batch(connection: Connection, batch_id: str) -> kept_pb2.KeptBatch:
    """How a batch stands. Raises StopError."""
    request = rpc.GetBatchRequest(batch_id=batch_id)
    answer = await ask(connection, connection.stub.GetBatch(request, timeout=PATIENCE_S))
    return answer.batch


async def show_status(wish: Wish, batch_id: str, terminal: Terminal, *, as_json: bool) -> int:
    """Tells how a batch stands; items without an answer so far are the exit code 1. Raises StopError."""
    async with connect_to_running(wish) as connection:
        batch = await get_batch(connection, batch_id)
    if as_json:
        write(terminal.out, _json(batch))
    else:
        paint(terminal.out, draw_batch(batch, datetime.now(UTC)))
    return ExitCode.ITEMS_FAILED if failed_of(batch.counts) else ExitCode.DONE


async def show_list(wish: Wish, states: Sequence[str], limit: int, terminal: Terminal, *, as_json: bool) -> int:
    """Tells of the newest batches, of all states or of some. Raises StopError."""
    numbers: dict[str, event_pb2.BatchState.ValueType] = {name: number for number, name in STATES.items()}
    found: list[kept_pb2.KeptBatch] = []
    token = ""
    async with connect_to_running(wish) as connection:
        while len(found) < limit and (token or not found):
            request = rpc.ListBatchesRequest(
                page_size=min(_PAGE, limit - len(found)), page_token=token, states=[numbers[name] for name in states]
            )
            page = await ask(connection, connection.stub.ListBatches(request, timeout=PATIENCE_S))
            found += page.batches
            token = page.next_page_token
            if not token:
                break
    if as_json:
        for batch in found:
            write(terminal.out, _json(batch))
    elif found:
        head, *rows = draw_table(found, datetime.now(UTC))
        write(terminal.out, head, "bold")
        for row in rows:
            write(terminal.out, row)
    else:
        terminal.say("unisono: no such batch is kept" if states else "unisono: no batch is kept")
    if token:
        terminal.say(f"unisono: these are the newest {len(found):,}; --limit shows more", "dim")
    return ExitCode.DONE


async def cancel(wish: Wish, batch_id: str, item_ids: Sequence[str], terminal: Terminal) -> int:
    """Cancels a batch, or some of its items. Raises StopError."""
    request = rpc.CancelBatchRequest(batch_id=batch_id, item_ids=item_ids)
    async with connect_to_running(wish) as connection:
        answer = await ask(connection, connection.stub.CancelBatch(request, timeout=PATIENCE_S))
    told = f"unisono: {answer.cancelled:,} item{'' if answer.cancelled == 1 else 's'} cancelled"
    terminal.say(told + (f"; {answer.already_ended:,} had ended" if answer.already_ended else ""))
    return ExitCode.DONE


async def delete(wish: Wish, batch_id: str, terminal: Terminal) -> int:
    """Deletes a batch that has ended. Raises StopError."""
    request = rpc.DeleteBatchRequest(batch_id=batch_id)
    async with connect_to_running(wish) as connection:
        _ = await ask(connection, connection.stub.DeleteBatch(request, timeout=PATIENCE_S))
    terminal.say(f"unisono: batch {batch_id} is deleted, with its items and results")
    return ExitCode.DONE


def _json(batch: kept_pb2.KeptBatch) -> str:
    return msgspec.json.encode(to_object(batch)).decode()
