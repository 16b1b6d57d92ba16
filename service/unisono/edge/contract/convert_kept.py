"""Kept batches, between the contract's messages and the house's values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from unisono._generated.unisono.v1 import event_pb2, kept_pb2
from unisono.core.errors import InvalidRequestError, Violation
from unisono.core.events import BatchState
from unisono.core.model import ItemState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from google.protobuf.timestamp_pb2 import Timestamp

    from unisono.core.durable import StoredBatch

T = TypeVar("T")

MAX_PAIRS: Final = 16
MAX_KEY_BYTES: Final = 64
MAX_VALUE_BYTES: Final = 512

_STATES: Final = {one: event_pb2.BatchState.Value(f"BATCH_STATE_{one.name}") for one in BatchState}
_STATE_OF: Final = {number: one for one, number in _STATES.items()}
_ITEM_STATE_OF: Final = {event_pb2.ItemState.Value(f"ITEM_STATE_{one.name}"): one for one in ItemState}


def kept_batch(stored: StoredBatch) -> kept_pb2.KeptBatch:
    """A kept batch as it stands."""
    tally = stored.tally
    message = kept_pb2.KeptBatch(
        batch_id=stored.batch_id,
        state=_STATES[stored.state],
        cancelling=stored.is_cancelling and not stored.is_over,
        counts=event_pb2.Progress(
            accepted=tally.items,
            queued=tally.items - tally.ended,
            completed=tally.completed,
            failed=tally.failed,
            cancelled=tally.cancelled,
            expired=tally.expired,
            completion_tokens=tally.completion_tokens,
        ),
        prompt_tokens=tally.prompt_tokens,
        request_id=stored.config.request_id,
        metadata=stored.metadata,
        parent_batch_id=stored.parent_id,
        restarts=stored.restarts,
        last_sequence=stored.last_sequence,
        input_open=not (stored.is_input_closed or stored.is_over),
    )
    _set(message.created_at, stored.created_ns)
    _set(message.started_at, stored.started_ns)
    _set(message.ended_at, stored.ended_ns)
    _set(message.expires_at, stored.deadline_ns)
    _set(message.kept_until, stored.keep_until_ns)
    return message


def metadata(asked: Mapping[str, str], path: str = "metadata") -> dict[str, str]:
    """The caller's own words; raises InvalidRequestError beyond their limits."""
    wrong = []
    if len(asked) > MAX_PAIRS:
        wrong.append(f"has {len(asked)} entries; at most {MAX_PAIRS} are kept")
    for key, value in asked.items():
        if not 0 < len(key.encode()) <= MAX_KEY_BYTES:
            wrong.append(f"has a key of {len(key.encode())} bytes; 1 to {MAX_KEY_BYTES} are kept")
        if len(value.encode()) > MAX_VALUE_BYTES:
            wrong.append(f"has {len(value.encode()):,} bytes under {key!r}; at most {MAX_VALUE_BYTES} are kept")
    if wrong:
        violations = [Violation(field=path, description=one) for one in wrong]
        raise InvalidRequestError(f"{path}: {wrong[0]}", violations=violations)
    return dict(asked)


def batch_states(asked: Iterable[event_pb2.BatchState.ValueType]) -> list[BatchState]:
    """States of batches; raises InvalidRequestError for what is none."""
    found = [_STATE_OF.get(number) for number in asked]
    return _all_known("states", found)


def item_states(asked: Iterable[event_pb2.ItemState.ValueType]) -> list[ItemState]:
    """States of items; raises InvalidRequestError for what is none."""
    found = [_ITEM_STATE_OF.get(number) for number in asked]
    return _all_known("states", found)


def _all_known(field: str, found: list[T | None]) -> list[T]:
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        what = f"has a value that is none, at place {found.index(None)}"
        raise InvalidRequestError(f"{field}: {what}", violations=[Violation(field=field, description=what)])
    return known


def _set(field: Timestamp, at_ns: int | None) -> None:
    if at_ns is not None:
        field.FromNanoseconds(at_ns)
