"""Kept batches in words, as rows of a table, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from google.protobuf.timestamp_pb2 import Timestamp
from rich.cells import cell_len

from unisono._generated.unisono.v1 import event_pb2, kept_pb2
from unisono.core.durations import format_duration
from unisono.edge.cli.forms import FORMS_KEY
from unisono.edge.cli.report import labelled
from unisono.edge.cli.terminal import printable

STATES = {
    event_pb2.BATCH_STATE_RUNNING: "running",
    event_pb2.BATCH_STATE_COMPLETED: "completed",
    event_pb2.BATCH_STATE_CANCELLED: "cancelled",
    event_pb2.BATCH_STATE_EXPIRED: "expired",
}
_Time = Literal["created_at", "started_at", "ended_at", "expires_at", "kept_until"]
_TIMES: tuple[_Time, ...] = ("created_at", "started_at", "ended_at", "expires_at", "kept_until")


def failed_of(counts: event_pb2.Progress) -> int:
    """Items that ended without an answer."""
    return counts.failed + counts.expired + counts.cancelled


def state_of(batch: kept_pb2.KeptBatch) -> str:
    """How it stands, in a word or two."""
    state = STATES.get(batch.state, "unknown")
    if batch.state != event_pb2.BATCH_STATE_RUNNING:
        return state
    if batch.cancelling:
        return "cancelling"
    return state if batch.HasField("started_at") else "waiting"


def ran_for_s(batch: kept_pb2.KeptBatch, now: datetime) -> float | None:
    """Seconds from its beginning to its end, or until now; None: it waits for its turn."""
    if not batch.HasField("started_at"):
        return None
    until = batch.ended_at.ToDatetime(UTC) if batch.HasField("ended_at") else now
    return max(0.0, _seconds_since(batch.started_at, until))


def draw_batch(batch: kept_pb2.KeptBatch, now: datetime) -> list[str]:
    """How it stands: a heading, and a line for each thing that is known."""
    counts = batch.counts
    state = state_of(batch)
    if state == "waiting":
        state = "waiting for its turn"
    if batch.restarts:
        times = "once" if batch.restarts == 1 else f"{batch.restarts:,} times"
        state += f"; the service was started again {times} meanwhile"
    items = [f"{counts.completed:,} of {counts.accepted:,} completed"]
    items += [
        f"{number:,} {name}"
        for name, number in (
            ("failed", counts.failed),
            ("expired", counts.expired),
            ("cancelled", counts.cancelled),
            ("not ended", counts.queued),
        )
        if number
    ]
    lines = [printable(batch.batch_id, one_line=True), labelled("state", state), labelled("items", ", ".join(items))]
    if counts.completion_tokens or batch.prompt_tokens:
        lines.append(labelled("tokens", f"{counts.completion_tokens:,} answered, {batch.prompt_tokens:,} of prompts"))
    labels = ("submitted", "started", "ended", "expires", "kept until")
    for label, name in zip(labels, _TIMES, strict=True):
        if batch.HasField(name):
            lines.append(labelled(label, _time(getattr(batch, name), now)))
    if batch.parent_batch_id:
        lines.append(labelled("tries again", f"what failed of {printable(batch.parent_batch_id, one_line=True)}"))
    if words := words_of(batch):
        lines.append(labelled("metadata", words))
    return lines


def draw_table(batches: Sequence[kept_pb2.KeptBatch], now: datetime) -> list[str]:
    """A row for each, under a head; columns are aligned."""
    rows = [("BATCH", "STATE", "DONE", "FAILED", "SUBMITTED", "METADATA")]
    for batch in batches:
        counts = batch.counts
        rows.append((
            printable(batch.batch_id, one_line=True),
            state_of(batch),
            f"{counts.accepted - counts.queued:,}/{counts.accepted:,}",
            f"{failed_of(counts):,}",
            f"{format_duration(max(0, round(_seconds_since(batch.created_at, now))))} ago",
            words_of(batch),
        ))  # fmt: skip
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def words_of(batch: kept_pb2.KeptBatch) -> str:
    """The caller's own words: "job=night, user=ann"."""
    return ", ".join(
        printable(f"{key}={value}", one_line=True)
        for key, value in sorted(batch.metadata.items())
        if key != FORMS_KEY
    )


def to_object(batch: kept_pb2.KeptBatch) -> dict[str, object]:
    """For programs: all that the service tells; times in UTC, null where there is none."""
    counts = batch.counts
    return {
        "id": batch.batch_id,
        "state": STATES.get(batch.state, "unknown"),
        "cancelling": batch.cancelling,
        "items": counts.accepted,
        "not_ended": counts.queued,
        "completed": counts.completed,
        "failed": counts.failed,
        "expired": counts.expired,
        "cancelled": counts.cancelled,
        "prompt_tokens": batch.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        **{name: _iso(getattr(batch, name)) if batch.HasField(name) else None for name in _TIMES},
        "request_id": batch.request_id or None,
        "parent_id": batch.parent_batch_id or None,
        "restarts": batch.restarts,
        "last_sequence": batch.last_sequence,
        "metadata": {key: value for key, value in sorted(batch.metadata.items()) if key != FORMS_KEY},
    }


def _iso(time: Timestamp) -> str:
    return time.ToDatetime(UTC).isoformat(timespec="milliseconds")


def _time(time: Timestamp, now: datetime) -> str:
    """Where the reader lives, and how long ago, or how long until then."""
    ago_s = round(_seconds_since(time, now))
    written = time.ToDatetime(UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f"{written} ({format_duration(ago_s)} ago)" if ago_s >= 0 else f"{written} (in {format_duration(-ago_s)})"


def _seconds_since(time: Timestamp, now: datetime) -> float:
    return (now - time.ToDatetime(UTC)).total_seconds()
