"""Rows of the journal's tables → what the core speaks of, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unisono.adapters.journal import codec
from unisono.core.durable import StoredBatch, Tally
from unisono.core.events import BatchState, Result, ResultPart, Summary

if TYPE_CHECKING:
    from sqlalchemy import Row

    from unisono.adapters.journal.writer import Pending
    from unisono.core.durable import NewBatch
    from unisono.core.events import LastingEvent


def batch_row(new: NewBatch, lease: int) -> dict[str, Any]:
    """The row of a batch without items or events."""
    return {
        "batch_id": new.batch_id,
        "request_id": new.config.request_id or None,
        "fingerprint": new.fingerprint,
        "parent_id": new.parent_id or None,
        "config": codec.pack_config(new.config),
        "metadata": codec.pack_texts(dict(new.metadata)),
        "method": new.method,
        "carrier": codec.pack_texts(dict(new.carrier)),
        "created_ns": new.created_ns,
        "deadline_ns": new.deadline_ns,
        "state": BatchState.RUNNING.value,
        "is_cancelling": False,
        "is_input_closed": False,
        "lease": lease,
        "restarts": 0,
        "last_sequence": 0,
        "item_count": 0,
        "completed": 0,
        "failed": 0,
        "cancelled": 0,
        "expired": 0,
        "prompt_tokens": 0,
        "completion_tokens": 0,
    }


def stored(row: Row[Any]) -> StoredBatch:
    """A batch as its row says."""
    return StoredBatch(
        batch_id=row.batch_id,
        config=codec.unpack_config(row.config),
        fingerprint=row.fingerprint,
        parent_id=row.parent_id or "",
        metadata=codec.unpack_texts(row.metadata),
        method=row.method,
        carrier=codec.unpack_texts(row.carrier),
        created_ns=row.created_ns,
        deadline_ns=row.deadline_ns,
        started_ns=row.started_ns,
        ended_ns=row.ended_ns,
        keep_until_ns=row.keep_until_ns,
        state=BatchState(row.state),
        is_cancelling=row.is_cancelling,
        is_input_closed=row.is_input_closed,
        tally=Tally(
            items=row.item_count,
            completed=row.completed,
            failed=row.failed,
            cancelled=row.cancelled,
            expired=row.expired,
            prompt_tokens=row.prompt_tokens,
            completion_tokens=row.completion_tokens,
        ),
        restarts=row.restarts,
        last_sequence=row.last_sequence,
    )


def event_row(batch: int, sequence: int, event: LastingEvent, at_ns: int) -> dict[str, Any]:
    """The row of an event."""
    kind, packed = codec.pack_event(event)
    return {
        "batch": batch,
        "sequence": sequence,
        "at_ns": at_ns,
        "kind": kind,
        "item_index": event.index if isinstance(event, (Result, ResultPart)) else None,
        "item_state": event.state.value if isinstance(event, Result) else None,
        "packed": packed,
    }


def count_in(event: LastingEvent, changes: Pending, at_ns: int, *, keep_ns: int) -> None:
    """What an event changes in its batch's row. `keep_ns`: how long an ended batch is kept."""
    match event:
        case Result():
            grows = changes.grows
            grows[event.state.value] = grows.get(event.state.value, 0) + 1
            if event.usage is not None:
                grows["prompt_tokens"] = grows.get("prompt_tokens", 0) + event.usage.prompt_tokens
                grows["completion_tokens"] = grows.get("completion_tokens", 0) + event.usage.completion_tokens
        case Summary():
            changes.sets |= {"state": event.state.value, "ended_ns": at_ns, "keep_until_ns": at_ns + keep_ns}
        case _:
            pass
