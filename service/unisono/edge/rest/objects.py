"""Batches, files and lists as OpenAI's objects. Every field is there; what does not apply is null."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from unisono.core.durable import Tally
from unisono.core.events import BatchState
from unisono.core.files import FileBatch, FileBatchState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from unisono.core.durable import StoredBatch
    from unisono.core.files import StoredFile

VALIDATING: Final = "validating"
IN_PROGRESS: Final = "in_progress"
FINALIZING: Final = "finalizing"
CANCELLING: Final = "cancelling"

# Of a batch that is over, the moment that names its end.
_ENDS: Final[Mapping[FileBatchState, str]] = {
    FileBatchState.FAILED: "failed_at",
    FileBatchState.COMPLETED: "completed_at",
    FileBatchState.EXPIRED: "expired_at",
    FileBatchState.CANCELLED: "cancelled_at",
}


def status_of(batch: FileBatch, stored: StoredBatch | None) -> str:
    """How a batch stands. `stored`: the kept batch that it became, while it is open."""
    if batch.is_over:
        return batch.state.value
    is_cancelling = batch.cancelling_ns is not None or (stored is not None and stored.is_cancelling)
    if stored is not None and stored.is_over:
        return CANCELLING if is_cancelling or stored.state is BatchState.CANCELLED else FINALIZING
    if is_cancelling:
        return CANCELLING
    return VALIDATING if stored is None else IN_PROGRESS


def batch_object(batch: FileBatch, stored: StoredBatch | None, *, model: str = "") -> dict[str, object]:
    """A batch as it stands; see `status_of`. `model`: that of all its lines; empty: there is none such."""
    status = status_of(batch, stored)
    in_progress_ns, finalizing_ns = batch.in_progress_ns, batch.finalizing_ns
    tally = batch.tally or Tally()
    if stored is not None:
        in_progress_ns, tally = stored.created_ns, stored.tally
        finalizing_ns = stored.ended_ns
    is_cancelled = status in (CANCELLING, FileBatchState.CANCELLED.value)
    cancelling_ns = batch.cancelling_ns or (finalizing_ns if is_cancelled else None)
    ends = dict.fromkeys(_ENDS.values())
    value: dict[str, object] = {
        "id": batch.batch_id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": model or None,
        "errors": _errors(batch),
        "input_file_id": batch.input_file_id,
        "completion_window": batch.window,
        "status": status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": seconds(batch.created_ns),
        "in_progress_at": seconds(in_progress_ns),
        "expires_at": seconds(batch.expires_ns),
        # What ends by a cancel is not finalized: it has `cancelling_at` for that.
        "finalizing_at": None if is_cancelled else seconds(finalizing_ns),
        **ends,
        "cancelling_at": seconds(cancelling_ns),
        "request_counts": {"total": tally.items, "completed": tally.completed, "failed": tally.failed},
        "usage": _usage(tally, batch.cached_tokens),
        "metadata": dict(batch.metadata) or None,
    }
    if batch.is_over:
        value[_ENDS[batch.state]] = seconds(batch.ended_ns)
    return value


def kept_as_file_batch(stored: StoredBatch) -> FileBatch:
    """A kept batch that was made of no file, as if it had been: without a file, an endpoint, and files of results."""
    states = {
        BatchState.RUNNING: FileBatchState.OPEN,
        BatchState.COMPLETED: FileBatchState.COMPLETED,
        BatchState.CANCELLED: FileBatchState.CANCELLED,
        BatchState.EXPIRED: FileBatchState.EXPIRED,
    }
    return FileBatch(
        batch_id=stored.batch_id,
        input_file_id="",
        endpoint="",
        window="",
        # 0: never; see `BatchViews.object_of`.
        expires_ns=stored.deadline_ns or 0,
        created_ns=stored.created_ns,
        metadata=stored.metadata,
        state=states[stored.state],
        in_progress_ns=stored.started_ns,
        finalizing_ns=stored.ended_ns,
        ended_ns=stored.ended_ns,
        keep_until_ns=stored.keep_until_ns,
        tally=stored.tally,
    )


def _errors(batch: FileBatch) -> dict[str, object] | None:
    if not batch.errors:
        return None
    data = [{"code": one.code, "message": one.message, "param": one.param, "line": one.line} for one in batch.errors]
    return {"object": "list", "data": data}


def _usage(tally: Tally, cached_tokens: int) -> dict[str, object]:
    """Tokens of all items so far; how many the backend had computed before is known at the end."""
    return {
        "input_tokens": tally.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens},
        "output_tokens": tally.completion_tokens,
        # The backends do not count them apart.
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tally.prompt_tokens + tally.completion_tokens,
    }


def file_object(file: StoredFile) -> dict[str, object]:
    """A file."""
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": seconds(file.created_ns),
        "expires_at": seconds(file.expires_ns),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def list_object(data: Sequence[Mapping[str, object]], *, has_more: bool) -> dict[str, object]:
    """A page of a list; `last_id` is what to ask after for the next one."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def seconds(at_ns: int | None) -> int | None:
    """Seconds since 1970, as OpenAI counts them."""
    return None if at_ns is None else at_ns // 1_000_000_000
