"""Errors of this service → statuses of gRPC and HTTP: the one table for it.

Theory of operation. A class of `core/errors.py` has one row here; nothing else in the house knows a status code.
A status travels with its details (`google.rpc`): one ErrorInfo whose reason programs can rely on, a BadRequest where
fields are named, a RetryInfo where waiting helps. All of it goes into the trailers of a call, for which clients
keep 8 KiB by default, the message there a second time and percent-encoded; so messages and lists are cut, and say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import grpc
from google.rpc import error_details_pb2, status_pb2

from unisono.core import errors
from unisono.core.errors import RequestError, UnisonoError, Violation

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DOMAIN: Final = "unisono.dev"

# Bytes of a status that fit into trailers of 8 KiB: 5.4 KiB in base64, and its message again in `grpc-message`.
TRAILER_BYTES: Final = 4096
# The least room that a status can be given.
LEAST_BYTES: Final = 1024

# How long to wait where waiting helps and nobody knows better.
_RETRY_AFTER_S: Final = 1.0
# Nobody waits longer than this for a single try, whatever a backend said.
_LONGEST_RETRY_S: Final = 3600.0

# Bytes of the parts of a status, before they are cut. The message may hold three bytes for each of these in trailers.
_MESSAGE_BYTES: Final = 600
_VALUE_BYTES: Final = 128
_FIELD_BYTES: Final = 200
_DESCRIPTION_BYTES: Final = 400
# What tags, lengths and the type's address add: to an entry of a list, and to a packed detail.
_ENTRY_BYTES: Final = 12
_DETAIL_BYTES: Final = 64
_CUT: Final = "… (cut)"


@dataclass(frozen=True, slots=True)
class Row:
    """What a class of errors is called elsewhere."""

    code: grpc.StatusCode
    http: int
    # With INVALID_ARGUMENT: the field at fault where the error names none, as a path from the item on.
    field: str = ""


_Code = grpc.StatusCode

# One row for each class that can be raised. What stands above them in the tree (RequestError, …) has no reason of
# its own and is never raised; it would be a defect, and has the first row.
TABLE: Final[Mapping[type[UnisonoError], Row]] = {
    # A defect of this service.
    UnisonoError: Row(_Code.INTERNAL, 500),
    errors.InternalError: Row(_Code.INTERNAL, 500),
    # Requests that cannot be taken.
    errors.InvalidRequestError: Row(_Code.INVALID_ARGUMENT, 400),
    errors.DuplicateItemError: Row(_Code.ALREADY_EXISTS, 409),
    errors.CreditExceededError: Row(_Code.RESOURCE_EXHAUSTED, 429),
    errors.LimitExceededError: Row(_Code.RESOURCE_EXHAUSTED, 429),
    errors.BatchFullError: Row(_Code.RESOURCE_EXHAUSTED, 429),
    errors.BatchNotFoundError: Row(_Code.NOT_FOUND, 404),
    errors.ItemNotFoundError: Row(_Code.NOT_FOUND, 404),
    errors.SequenceOutOfRangeError: Row(_Code.OUT_OF_RANGE, 416),
    errors.RequestIdReusedError: Row(_Code.ALREADY_EXISTS, 409),
    errors.InputClosedError: Row(_Code.FAILED_PRECONDITION, 409),
    errors.BatchRunningError: Row(_Code.FAILED_PRECONDITION, 409),
    errors.NothingKeptError: Row(_Code.FAILED_PRECONDITION, 409),
    errors.NotEnoughSlotsError: Row(_Code.FAILED_PRECONDITION, 409),
    errors.StreamReplacedError: Row(_Code.ABORTED, 409),
    errors.ShuttingDownError: Row(_Code.UNAVAILABLE, 503),
    # What only the backend could know to be wrong. INVALID_ARGUMENT is for what is wrong whatever is installed
    # there; a model that lacks something, or credentials that are not taken, can be replaced.
    errors.ModelNotFoundError: Row(_Code.NOT_FOUND, 404),
    errors.ModelLacksCapabilityError: Row(_Code.FAILED_PRECONDITION, 400),
    errors.ContextConflictError: Row(_Code.INVALID_ARGUMENT, 400, field="options.runner.num_ctx"),
    errors.PromptTooLongError: Row(_Code.INVALID_ARGUMENT, 400, field="request"),
    errors.RefusedByBackendError: Row(_Code.INVALID_ARGUMENT, 400, field="request"),
    errors.RepetitionError: Row(_Code.FAILED_PRECONDITION, 422),
    errors.NotAuthorizedError: Row(_Code.FAILED_PRECONDITION, 502),
    # What the backend could not do: UNAVAILABLE where the same item may do well next time; UNKNOWN where all that is
    # known is its own word, so that INTERNAL is always a defect of this service.
    errors.BackendUnavailableError: Row(_Code.UNAVAILABLE, 503),
    errors.BackendBusyError: Row(_Code.RESOURCE_EXHAUSTED, 503),
    errors.OutOfMemoryError: Row(_Code.RESOURCE_EXHAUSTED, 503),
    errors.ConnectionLostError: Row(_Code.UNAVAILABLE, 502),
    errors.RunnerDiedError: Row(_Code.UNAVAILABLE, 502),
    errors.LoadFailedError: Row(_Code.UNAVAILABLE, 502),
    errors.BackendStalledError: Row(_Code.UNAVAILABLE, 504),
    errors.BadAnswerError: Row(_Code.UNKNOWN, 502),
    errors.BackendFailedError: Row(_Code.UNKNOWN, 502),
    # What ended an item from outside.
    errors.CancelledItemError: Row(_Code.CANCELLED, 499),
    errors.QueueTimeoutError: Row(_Code.DEADLINE_EXCEEDED, 504),
    errors.ItemTimeoutError: Row(_Code.DEADLINE_EXCEEDED, 504),
    errors.BatchDeadlineError: Row(_Code.DEADLINE_EXCEEDED, 504),
}


def row_of(error: UnisonoError) -> Row:
    """The row of an error's class, or of the nearest class above it."""
    return next(row for kind in type(error).__mro__ if (row := TABLE.get(kind)) is not None)


def to_status(error: UnisonoError, prefix: str = "", *, max_bytes: int = TRAILER_BYTES) -> status_pb2.Status:
    """An error as it travels, in at most so many bytes (1,024 or more).

    `prefix` goes before the paths of fields: "items[3].". What is too long is cut, and says so.
    """
    row = row_of(error)
    code: int = row.code.value[0]
    message = cut(error.message, min(_MESSAGE_BYTES, max_bytes * 3 // 8))
    status = status_pb2.Status(code=code, message=message)
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=DOMAIN, metadata=_metadata(error.metadata, max_bytes // 8)
    )
    status.details.add().Pack(info)
    delay_s = _delay_s(error)
    if delay_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(delay_s * 1e9))
        status.details.add().Pack(retry)
    violations = error.violations
    if not violations and row.field:
        violations = (Violation(field=row.field, description=error.message),)
    if violations:
        # Room is kept for the detail's own frame, and for the note that its list was cut.
        room = max_bytes - status.ByteSize() - 2 * _DETAIL_BYTES
        bad = error_details_pb2.BadRequest(field_violations=_listed(violations, prefix, room))
        if (count := len(bad.field_violations)) < len(violations):
            status.message += f" (only the first {count} listed)"
        status.details.add().Pack(bad)
    return status


def utf8(text: str) -> str:
    r"""The text as messages can hold it: halves of a surrogate pair are joined, or replaced where one is alone.

    They come from JSON escapes ("\ud83d") that a model wrote, or that a backend cut in two.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", errors="surrogatepass").decode("utf-16-le", errors="replace")
    return text


def cut(text: str, max_bytes: int) -> str:
    """The text in at most so many bytes of UTF-8; one that was cut ends with "… (cut)"."""
    # A text of many megabytes is not encoded as a whole to keep its first few bytes.
    text = utf8(text[: max_bytes + 1])
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    room = max_bytes - len(_CUT.encode())
    return encoded[:room].decode(errors="ignore") + _CUT


def _metadata(metadata: Mapping[str, str], room: int) -> dict[str, str]:
    """As many entries as there is room for, in their order."""
    kept: dict[str, str] = {}
    for name, text in metadata.items():
        value = cut(text, _VALUE_BYTES)
        room -= len(name.encode()) + len(value.encode()) + _ENTRY_BYTES
        if room < 0:
            break
        kept[name] = value
    return kept


def _delay_s(error: UnisonoError) -> float | None:
    if error.retry_after_s is not None:
        # Written so that NaN is no delay at all.
        return min(error.retry_after_s, _LONGEST_RETRY_S) if error.retry_after_s >= 0 else None
    return _RETRY_AFTER_S if isinstance(error, RequestError) and error.is_retryable else None


def _listed(
    violations: Iterable[Violation], prefix: str, room: int
) -> list[error_details_pb2.BadRequest.FieldViolation]:
    """The first violations, as many as there is room for; the very first always, cut to it."""
    listed: list[error_details_pb2.BadRequest.FieldViolation] = []
    for violation in violations:
        field = cut(prefix + violation.field, min(_FIELD_BYTES, room // 2))
        left = room - len(field.encode()) - _ENTRY_BYTES
        description = cut(violation.description, min(_DESCRIPTION_BYTES, left) if not listed else _DESCRIPTION_BYTES)
        room = left - len(description.encode())
        if room < 0:
            break
        listed.append(error_details_pb2.BadRequest.FieldViolation(field=field, description=description))
    return listed
