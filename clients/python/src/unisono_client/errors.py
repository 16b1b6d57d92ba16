"""What can go wrong with a call, as exceptions; what goes wrong with one item is a value: see `Result.error`.

`UnisonoError` stands above all of them. `reason` is a name that programs can rely on, from the list in the service's
README ("BATCH_NOT_FOUND"), or one of this client's own where no service was reached ("UNREACHABLE").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

DOMAIN: Final = "unisono.dev"
# Where gRPC carries a status with its details.
_DETAILS: Final = "grpc-status-details-bin"
# Codes that gRPC itself gives a call whose connection was cut; with a reason of the service's they mean other things.
_CUT: Final = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}
)


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field that is wrong."""

    # A path through the message that was sent: "chat.messages[0].role".
    field: str
    description: str


class UnisonoError(Exception):
    """Something went wrong; `reason` says what, for programs, and the message for people."""

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        code: str = "",
        metadata: Mapping[str, str] | None = None,
        fields: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        # The name of gRPC's status code ("NOT_FOUND"); "" where no service was asked.
        self.code = code
        self.metadata = dict(metadata or {})
        # With INVALID_REQUEST: every field that is wrong.
        self.fields = tuple(fields)
        # Where waiting helps: how long, in seconds.
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class ItemError(UnisonoError):
    """Why an item has no answer. A value of its result, and raised only by `Result.raise_for_error`."""


class RefusedError(UnisonoError):
    """The service refused a call, or ended it."""


class UnreachableError(UnisonoError):
    """The service could not be reached, or reached again, for as long as the client tries.

    `batch_id` names the batch that was under way ("" where none was accepted), `after_sequence` the last of its
    events that arrived: `client.attach(batch_id, after_sequence=…)` has the rest, while the service keeps the batch.
    """

    def __init__(self, message: str, *, batch_id: str = "", after_sequence: int = 0) -> None:
        super().__init__(message, reason="UNREACHABLE", code="UNAVAILABLE")
        self.batch_id = batch_id
        self.after_sequence = after_sequence


class BatchLostError(UnisonoError):
    """The service does not know the batch any more (it was started anew), or not all of its events.

    Results that were given before are good. What was not answered has to be sent again, as a new batch.
    """

    def __init__(self, message: str, *, reason: str, code: str, batch_id: str) -> None:
        super().__init__(message, reason=reason, code=code)
        self.batch_id = batch_id


class ClosedError(UnisonoError):
    """The client or the session was closed, and takes nothing more."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="CLOSED")


def refused(error: grpc.aio.AioRpcError) -> RefusedError | None:
    """What the service itself says of a call's end; None where the connection was lost, so that nobody knows."""
    status = _status_of(error)
    told = item_error(status) if status is not None else None
    if told is not None and told.reason:
        return RefusedError(
            told.message,
            reason=told.reason,
            code=told.code,
            metadata=told.metadata,
            fields=told.fields,
            retry_after_s=told.retry_after_s,
        )
    if error.code() in _CUT:
        return None
    return RefusedError(error.details() or "", reason=error.code().name, code=error.code().name)


def item_error(status: status_pb2.Status) -> ItemError:
    """A status of the contract as an error; its reason is "" where no service of ours wrote it."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    reason, retry_after_s = "", None
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason = info.reason
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        else:
            _ = detail.Unpack(bad)
    return ItemError(
        status.message,
        reason=reason,
        code=_CODES.get(status.code, "UNKNOWN"),
        metadata=info.metadata,
        fields=[FieldViolation(each.field, each.description) for each in bad.field_violations],
        retry_after_s=retry_after_s,
    )


_CODES: Final[Mapping[int, str]] = {code.value[0]: code.name for code in grpc.StatusCode}


def _status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return None
