"""One tree of errors.

Theory of operation: every failure that a caller can meet is a class here. Its `reason` is the name that
travels in `google.rpc.ErrorInfo`; `is_retryable` says whether sending the same thing again can help;
`costs_attempt` whether a retry counts against an item's attempts. Adapters translate what they meet into
these classes, in one table each; `edge/` translates them into statuses, in one table. Nothing else in the
house may invent a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A field that is wrong, and how."""

    # The path from the request's top: "items[3].chat.messages[0].role".
    field: str
    # What is wrong and what would be right.
    description: str


class UnisonoError(Exception):
    """Something went wrong; the parent of all errors of this service."""

    reason: ClassVar[str] = "INTERNAL"
    is_retryable: ClassVar[bool] = False
    costs_attempt: ClassVar[bool] = True
    # The backend has too much to do, or too little memory: fewer should be in flight for a while.
    lowers_load: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        # What happened where, as strings: model, backend, limit.
        self.metadata: dict[str, str] = dict(metadata or {})
        self.violations: tuple[Violation, ...] = tuple(violations)
        # After how long another try may help; None where it is not known.
        self.retry_after_s = retry_after_s
        # Part of the answer was passed on to the caller before: whatever it was, nothing is tried again.
        self.is_final = False


def reasons(*parents: type[UnisonoError]) -> tuple[str, ...]:
    """The reasons of these classes and of all below them, each once."""
    found: dict[str, None] = {}
    for parent in parents:
        below = [kind for kind in parent.__subclasses__() if kind.__module__ == __name__]
        found |= dict.fromkeys(reasons(*below) if below else (parent.reason,))
    return tuple(found)


class InternalError(UnisonoError):
    """A defect of this service. It costs the item or the call that met it, and nothing else."""


# -- Requests that cannot be taken ---------------------------------------------------------------------------


class RequestError(UnisonoError):
    """A request to this service that cannot be taken as it is."""


class InvalidRequestError(RequestError):
    """Fields of the request are wrong; `violations` names each."""

    reason = "INVALID_REQUEST"


class DuplicateItemError(RequestError):
    """The batch already has an item of this id."""

    reason = "DUPLICATE_ITEM"


class CreditExceededError(RequestError):
    """More items were sent on a stream than it had credit for."""

    reason = "CREDIT_EXCEEDED"
    is_retryable = True


class LimitExceededError(RequestError):
    """A limit of the service is reached."""

    reason = "LIMIT_EXCEEDED"
    is_retryable = True


class BatchFullError(RequestError):
    """The batch has as many items as a batch may have; waiting does not help."""

    reason = "BATCH_FULL"


class BatchNotFoundError(RequestError):
    """No such batch, or no longer."""

    reason = "BATCH_NOT_FOUND"


class ItemNotFoundError(RequestError):
    """The batch has no such item."""

    reason = "ITEM_NOT_FOUND"


class SequenceOutOfRangeError(RequestError):
    """Events after that sequence are not kept, or it was never reached."""

    reason = "SEQUENCE_OUT_OF_RANGE"


class RequestIdReusedError(RequestError):
    """The request_id was used before, with other content."""

    reason = "REQUEST_ID_REUSED"


class InputClosedError(RequestError):
    """The batch takes no more items."""

    reason = "INPUT_CLOSED"


class BatchRunningError(RequestError):
    """That can only be done with a batch that has ended."""

    reason = "BATCH_RUNNING"


class NothingKeptError(RequestError):
    """This service keeps no batches."""

    reason = "NOTHING_KEPT"


class NotEnoughSlotsError(RequestError):
    """The batch's items must all run at one time, and so many slots are not known."""

    reason = "NOT_ENOUGH_SLOTS"


class StreamReplacedError(RequestError):
    """Another stream has reopened this batch and taken its place."""

    reason = "STREAM_REPLACED"


class ShuttingDownError(RequestError):
    """The service is being stopped."""

    reason = "SHUTTING_DOWN"
    is_retryable = True


# -- What the caller asked for, and only the backend could know to be wrong ------------------------------------


class CallerError(UnisonoError):
    """The item cannot be answered, however often it is sent."""


class ModelNotFoundError(CallerError):
    """No backend has the model."""

    reason = "MODEL_NOT_FOUND"


class ModelLacksCapabilityError(CallerError):
    """The model cannot do what is asked: chat, tools, thinking, pictures or embeddings."""

    reason = "MODEL_LACKS_CAPABILITY"


class ContextConflictError(CallerError):
    """Items of one model ask for contexts of different sizes, in a batch whose caller forbids that."""

    reason = "CONTEXT_CONFLICT"


class PromptTooLongError(CallerError):
    """The prompt does not fit into the context."""

    reason = "PROMPT_TOO_LONG"


class RefusedByBackendError(CallerError):
    """The backend called the request wrong."""

    reason = "REFUSED_BY_BACKEND"


class RepetitionError(CallerError):
    """The model repeated itself without end, and the backend stopped it."""

    reason = "REPETITION"


class NotAuthorizedError(CallerError):
    """The backend refused this service's credentials."""

    reason = "BACKEND_NOT_AUTHORIZED"


# -- What the backend could not do -----------------------------------------------------------------------------


class BackendError(UnisonoError):
    """The backend failed; the same item may do well next time."""

    is_retryable = True


class BackendUnavailableError(BackendError):
    """The backend cannot be reached."""

    reason = "BACKEND_UNAVAILABLE"
    costs_attempt = False


class BackendBusyError(BackendError):
    """The backend's queue is full."""

    reason = "BACKEND_BUSY"


class ConnectionLostError(BackendError):
    """The connection ended before the answer was whole."""

    reason = "CONNECTION_LOST"


class RunnerDiedError(BackendError):
    """The process that holds the model died."""

    reason = "RUNNER_DIED"


class LoadFailedError(BackendError):
    """The model could not be loaded."""

    reason = "LOAD_FAILED"


class BackendStalledError(BackendError):
    """The backend holds requests and says nothing to any of them."""

    reason = "BACKEND_STALLED"


class OutOfMemoryError(BackendError):
    """The backend ran out of memory while it answered."""

    reason = "OUT_OF_MEMORY"
    lowers_load = True


class BadAnswerError(BackendError):
    """The backend's answer cannot be read."""

    reason = "BAD_ANSWER"


class BackendFailedError(BackendError):
    """The backend reported a failure of its own."""

    reason = "BACKEND_FAILED"


# -- What ended an item from outside ---------------------------------------------------------------------------


class ItemStoppedError(UnisonoError):
    """The item was ended before it had an answer."""


class CancelledItemError(ItemStoppedError):
    """The caller cancelled the item, or went away."""

    reason = "CANCELLED"


class QueueTimeoutError(ItemStoppedError):
    """The item had not spoken within its queue_timeout."""

    reason = "QUEUE_TIMEOUT"


class ItemTimeoutError(ItemStoppedError):
    """The item had spoken, and was silent for its item_timeout."""

    reason = "ITEM_TIMEOUT"


class BatchDeadlineError(ItemStoppedError):
    """The batch's deadline passed before the item ended."""

    reason = "BATCH_DEADLINE"


def _all_below(parent: type[UnisonoError]) -> Iterator[type[UnisonoError]]:
    for child in parent.__subclasses__():
        yield child
        yield from _all_below(child)


# A parent has no reason of its own: it inherits INTERNAL.
_CLASSES: dict[str, type[UnisonoError]] = {
    one.reason: one for one in _all_below(UnisonoError) if "reason" in vars(one)
}


def error_class(reason: str) -> type[UnisonoError]:
    """The class with that reason; InternalError for one that this version does not know."""
    return _CLASSES.get(reason, InternalError)
