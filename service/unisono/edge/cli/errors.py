"""What went wrong, in words: a reason, a message, the fields at fault, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.cli.terminal import printable

_DOMAIN = "unisono.dev"
_DETAILS_KEY = "grpc-status-details-bin"


class ExitCode(IntEnum):
    """How a command ended, for scripts; the README and `--help` list them."""

    DONE = 0
    ITEMS_FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    INTERRUPTED = 130


class StopError(Exception):
    """A command cannot go on; its lines say why, and are all that the user sees."""

    def __init__(self, *lines: str, code: ExitCode) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """An error as a reader needs it."""

    # A name from the list in core/errors.py, or gRPC's own name of the status.
    reason: str
    message: str
    # "items[3].chat.messages[0].role: what is wrong", one a field.
    violations: tuple[str, ...] = ()
    # After how many seconds another try may help.
    retry_after_s: float | None = None
    # What else the service says of it: "batch_id", say.
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All in one line."""
        return "; ".join((self.message, *(line for line in self.violations if line not in self.message)))


# What to do, by reason; the service's own message comes first and may say it better.
_REMEDIES = {
    "MODEL_NOT_FOUND": "See `unisono doctor` for the models there are, or get it with `ollama pull MODEL`.",
    "BACKEND_UNAVAILABLE": "Is the backend running? `unisono doctor` looks for it.",
    "LIMIT_EXCEEDED": "Send less at once, or wait until other batches have ended.",
    "SHUTTING_DOWN": "The service is being stopped; try again once it is back.",
    "BATCH_NOT_FOUND": "The service was restarted, or has forgotten the batch.",
    "UNIMPLEMENTED": "What answers there is not Unisono, or an older version of it.",
    "UNAVAILABLE": "Is it running? Start one with `unisono serve`, or leave --server out to have one started.",
    "DEADLINE_EXCEEDED": "It is there but did not answer in time.",
}


def problem_of_status(status: status_pb2.Status) -> Problem:
    """Reads a status with its details."""
    reason, retry_after_s = "", None
    metadata: dict[str, str] = {}
    violations: list[str] = []
    for detail in status.details:
        info, request, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        try:
            if detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(request):
                violations += [f"{each.field}: {each.description}" for each in request.field_violations]
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        except DecodeError:  # a detail that says something else than its type
            continue
    return Problem(
        reason=reason or _code_name(status.code),
        message=status.message or "no message",
        violations=tuple(violations),
        retry_after_s=retry_after_s,
        metadata=metadata,
    )


def is_of_service(error: grpc.aio.AioRpcError) -> bool:
    """Whether a call ended as the service said, and not as the connection happened to."""
    return any(key == _DETAILS_KEY for key, _ in error.trailing_metadata() or ())


def problem_of_call(error: grpc.aio.AioRpcError) -> Problem:
    """Reads what a call ended with."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return problem_of_status(status_pb2.Status.FromString(value))
            except DecodeError:
                break
    return Problem(reason=error.code().name, message=error.details() or "no message")


def stop_for_call(error: grpc.aio.AioRpcError, target: str) -> StopError:
    """What to tell the user when a call to the service failed, and how to end."""
    problem = problem_of_call(error)
    is_away = error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
    )
    is_wrong = error.code() is grpc.StatusCode.INVALID_ARGUMENT
    code = ExitCode.UNREACHABLE if is_away else ExitCode.USAGE if is_wrong else ExitCode.ITEMS_FAILED
    return StopError(*describe(problem, f"The service at {target}"), code=code)


def describe(problem: Problem, who: str, remedy: str | None = None) -> list[str]:
    """A problem for the terminal: what, the fields one a line, what to do; by default what usually helps."""
    lines = [f"{who}: {printable(problem.message, one_line=True)} ({problem.reason})"]
    lines += [f"  {printable(violation, one_line=True)}" for violation in problem.violations]
    if remedy := remedy or _REMEDIES.get(problem.reason):
        lines.append(remedy)
    if problem.retry_after_s:
        lines.append(f"Trying again may help after {problem.retry_after_s:g} s.")
    return lines


def failed_result(item_id: str, reason: str, message: str) -> event_pb2.Result:
    """The result of a line that is no item."""
    result = event_pb2.Result(item_id=item_id, state=event_pb2.ITEM_STATE_FAILED)
    result.error.code = code_pb2.INVALID_ARGUMENT
    result.error.message = message
    result.error.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=_DOMAIN))
    return result


def _code_name(code: int) -> str:
    try:
        return code_pb2.Code.Name(code_pb2.Code.ValueType(code))
    except ValueError:
        return f"STATUS_{code}"
