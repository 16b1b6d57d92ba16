"""Errors of the house, and of requests, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from unisono.edge.status import row_of, utf8

if TYPE_CHECKING:
    from collections.abc import Mapping

    from unisono.core.errors import UnisonoError

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_SERVER_STATUS: Final = 500
# A path of the contract begins with the kind of request, or with what OpenAI writes beside it.
_PREFIXES: Final = ("chat.", "generate.", "embed.", "options.", "body.")


class ErrorBody(Protocol):
    """How an API writes an error."""

    def __call__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> Mapping[str, object]:
        """The answer's body. `param`: the place in the request; `code`: a name for what is wrong."""
        ...


class RefusedError(Exception):
    """A request cannot be done; raised at this edge alone, for what only this API knows."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """An error as OpenAI writes it. What it repeats of a request may hold halves of surrogate pairs."""
    where = None if param is None else utf8(param)
    return {"error": {"message": utf8(message), "type": type_of(status), "param": where, "code": code}}


def type_of(status: int) -> str:
    """OpenAI's name for the kind of error that has this status."""
    return _TYPES.get(status) or ("server_error" if status >= _SERVER_STATUS else "invalid_request_error")


def of_house(error: UnisonoError, write: ErrorBody) -> tuple[int, Mapping[str, object]]:
    """The status of an error of the house, and its body: `code` is its reason in small letters."""
    row = row_of(error)
    param = error.violations[0].field if error.violations else None
    return row.http, write(
        row.http,
        error.message,
        param=None if param is None else param_of(param),
        code=error.reason.lower(),
    )


def headers_of(error: UnisonoError) -> Mapping[str, str]:
    """When to try again, where that is known."""
    seconds = error.retry_after_s
    return {} if seconds is None else {"retry-after": str(max(1, round(seconds)))}


def param_of(path: str) -> str:
    """A field's path from the body on: "messages[0].role"."""
    for prefix in _PREFIXES:
        path = path.removeprefix(prefix)
    return path
