"""What llama.cpp's server says when something is wrong, as errors of this house: the one table for it.

Source of the messages and types: answers of the server (xllamacpp 2026.10), and its format_error_response.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import msgspec

from unisono.core.errors import (
    BackendBusyError,
    BackendFailedError,
    BackendUnavailableError,
    ModelLacksCapabilityError,
    ModelNotFoundError,
    NotAuthorizedError,
    PromptTooLongError,
    RefusedByBackendError,
    UnisonoError,
)

LONGEST_MESSAGE: Final = 500


class _Error(msgspec.Struct):
    message: str = ""
    type: str = ""
    code: int | str | None = None
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class _Body(msgspec.Struct):
    error: _Error | str | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """Messages or types that match mean this error."""

    pattern: re.Pattern[str]
    kind: type[UnisonoError]


def _row(pattern: str, kind: type[UnisonoError]) -> _Row:
    return _Row(re.compile(pattern, re.IGNORECASE), kind)


# The first row that matches "TYPE: MESSAGE" decides; then the status.
_TABLE: Final = (
    _row(r"^exceed_context_size_error|exceeds the available context|is too large to process", PromptTooLongError),
    _row(r"model ('.*' )?(is )?not found", ModelNotFoundError),
    _row(r"^not_supported_error|is not supported|does not support", ModelLacksCapabilityError),
    _row(r"^authentication_error|^permission_error|invalid api key", NotAuthorizedError),
    _row(r"^unavailable_error|loading model", BackendBusyError),
    _row(r"^invalid_request_error|^not_found_error|json\.exception|failed to parse", RefusedByBackendError),
)
_BY_STATUS: Final[dict[int, type[UnisonoError]]] = {
    401: NotAuthorizedError,
    403: NotAuthorizedError,
    408: BackendBusyError,
    429: BackendBusyError,
    501: ModelLacksCapabilityError,
    # Whoever stands before the server cannot reach it.
    502: BackendUnavailableError,
    503: BackendBusyError,
    504: BackendUnavailableError,
}


def failure(status: int, body: bytes, *, backend: str, model: str) -> UnisonoError:
    """The error that an answer with this status, or an error within a stream (status 200), means."""
    error = _error_of(body)
    said = f"{error.type}: {error.message}"
    kind = next((row.kind for row in _TABLE if row.pattern.search(said)), None)
    if kind is None:
        kind = _BY_STATUS.get(status, RefusedByBackendError if 300 <= status < 500 else BackendFailedError)
    metadata = {"backend": backend, "model": model}
    if status != 200:
        metadata["http_status"] = str(status)
    for name in ("n_prompt_tokens", "n_ctx"):
        if (value := getattr(error, name)) is not None:
            metadata[name] = str(value)
    message = error.message.partition("\n")[0].strip()[:LONGEST_MESSAGE] or f"HTTP status {status}"
    return kind(f"backend {backend}: {message}", metadata=metadata)


def _error_of(body: bytes) -> _Error:
    text = body.removeprefix(b"error:").strip()
    try:
        error = msgspec.json.decode(text, type=_Body).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _Error(message=body.decode("utf-8", errors="replace"))
    return error if isinstance(error, _Error) else _Error(message=error or "")
