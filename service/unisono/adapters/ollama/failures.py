"""What Ollama says when something is wrong, as errors of this house: the one table for it.

Ollama's status codes do not say who is at fault (a caller's wrong option is a 500, a dead runner under
`/api/embed` a 400), so the message decides, and the status only where no row knows the message.
Source of the messages: recordings of Ollama 0.32.15, and its server/routes.go, server/sched.go, server/images.go,
llm/llama_server.go, llm/status.go, api/types.go.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from unisono.core.errors import (
    BackendBusyError,
    BackendFailedError,
    BackendUnavailableError,
    LoadFailedError,
    ModelLacksCapabilityError,
    ModelNotFoundError,
    NotAuthorizedError,
    OutOfMemoryError,
    PromptTooLongError,
    RefusedByBackendError,
    RunnerDiedError,
    UnisonoError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

# Longer messages (a runner's last words, a model's broken tool call) are cut.
LONGEST_MESSAGE: Final = 500
LONGEST_NAME: Final = 200


@dataclass(frozen=True, slots=True)
class _Row:
    """What a message means in which this pattern is found."""

    pattern: re.Pattern[str]
    kind: type[UnisonoError]
    # Only what the pattern matches is passed on.
    is_wrapper: bool = False


def _row(pattern: str, kind: type[UnisonoError]) -> _Row:
    return _Row(re.compile(pattern, re.IGNORECASE), kind)


def _wrapper(pattern: str, kind: type[UnisonoError]) -> _Row:
    return _Row(re.compile(pattern, re.IGNORECASE), kind, is_wrapper=True)


# These statuses come from whoever stands before Ollama, whatever they say.
_FOREIGN: Final[dict[int, type[UnisonoError]]] = {
    401: NotAuthorizedError,
    403: NotAuthorizedError,
    407: NotAuthorizedError,
    502: BackendUnavailableError,
    504: BackendUnavailableError,
}

# Then the first row that matches decides. In this order:
# 1. Ollama's words around the last words of a runner. These hold every error of the runner's life, those of other
#    requests too: they are neither judged by nor passed on. (At a start the life is short, and they tell why.)
# 2. The prompt does not fit.
# 3. A model that is not there, or a name that can't be one.
# 4. Something that the model cannot do.
# 5. A full queue.
# 6. The caller's mistakes that do not come as such (other 4xx are refusals anyway).
# 7. Too little memory while loading; while answering (Ollama then drops the runner by itself).
# 8. The runner could not be started.
# 9. The runner died, or does not answer.
# 10. Failures that come as a 400 of /api/embed.
_TABLE: Final[tuple[_Row, ...]] = (
    _wrapper(r"^an error was encountered while running the model", RunnerDiedError),
    _wrapper(r"^model runner has unexpectedly stopped", RunnerDiedError),
    _wrapper(r"^(llama-server|llama runner) process no longer running", RunnerDiedError),
    _row(r"^(llama-server|llama runner) process has terminated", LoadFailedError),
    _row(r"^(timed out waiting for|llama-server reported out-of-memory during startup)", LoadFailedError),
    _row(r"exceed_context_size_error|exceeds the available context size", PromptTooLongError),
    _row(r"(exceeds|longer than) (the |maximum )*context length", PromptTooLongError),
    _row(r"^model ['\"].*['\"] not found|try pulling it|^invalid model name", ModelNotFoundError),
    _row(r"^raw mode does not support", RefusedByBackendError),
    _row(r"does not support|multimodal data provided|image input is not supported", ModelLacksCapabilityError),
    _row(r"only supports one image|image generation models are not", ModelLacksCapabilityError),
    _row(r"server busy|maximum pending requests|no slots? available|^loading model$", BackendBusyError),
    _row(r"^option \".*\" must be of|^invalid format|^invalid think value|^think must be", RefusedByBackendError),
    _row(r"failed to parse grammar|json schema conversion|^template:|^template error", RefusedByBackendError),
    _row(r"no longer compatible with your version|requires a newer version", RefusedByBackendError),
    _row(r"requires more system memory|unable to load full model", LoadFailedError),
    _row(
        r"out of (device )?memory|not enough memory|insufficient memory|(cuda|hip)malloc failed"
        r"|allocation failed|failed to allocate|erroroutofmemory|vk_error_out_of_device_memory",
        OutOfMemoryError,
    ),
    _row(r"error loading model|(unable|failed) to load model|may be incompatible with your version", LoadFailedError),
    _row(r"error starting|startup failed|binary not found", LoadFailedError),
    _row(r"server not responding|unexpected server status|health (resp|unmarshal)", RunnerDiedError),
    _row(r"connection (refused|reset)|error reading .*response|do embedding request", RunnerDiedError),
    # Something of Ollama's own ran into the end; by itself it is the end of a caller's JSON.
    _row(r"^(?!(unexpected )?EOF$).*\bEOF$", RunnerDiedError),
    _row(r"NaN or Inf|unmarshal embedding|empty embedding response|context canceled", BackendFailedError),
)

# And where no row knows the message, the status; other 4xx are refusals, and the rest failures.
_BY_STATUS: Final[dict[int, type[UnisonoError]]] = {
    408: BackendBusyError,
    425: BackendBusyError,
    429: BackendBusyError,
    # Ollama's "request canceled".
    499: BackendFailedError,
    501: ModelLacksCapabilityError,
    # A proxy again: Ollama's own 503 is in the table.
    503: BackendUnavailableError,
}

_COUNTS: Final = {
    "n_prompt_tokens": re.compile(r"n_prompt_tokens\W+(\d+)|\((\d+) tokens\) exceeds"),
    "n_ctx": re.compile(r"n_ctx\W+(\d+)|context size \((\d+) tokens\)"),
}


class _Nested(msgspec.Struct):
    message: str = ""


class _Body(msgspec.Struct):
    error: str | _Nested = ""


def failure(
    status: int,
    body: bytes,
    *,
    backend: str,
    model: str,
    is_loading: bool = False,
    retry_after_s: float | None = None,
) -> UnisonoError:
    """The error that an answer with this status, or an error line of a stream (status 200), means.

    `is_loading`: it answers a request that loads a model, so that what nobody knows is a failed load.
    """
    # More lines are what the runner said last (llm/llama_server.go, statusErrorMessage): see the table, 1.
    raw = _message_of(body).partition("\n")[0].strip()
    message = _inner(raw)
    kind, shown = _judged(status, raw, message)
    if is_loading and kind in {BackendFailedError, OutOfMemoryError, RunnerDiedError}:
        kind = LoadFailedError
    metadata = {"backend": backend, "model": model}
    if status != 200:
        metadata["http_status"] = str(status)
    if kind is PromptTooLongError:
        metadata |= _counts(raw)
    text = _worded(kind, shown[:LONGEST_MESSAGE] or f"HTTP status {status}", backend, model)
    return kind(text, metadata=metadata, retry_after_s=retry_after_s)


def retry_after_s(headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """After how many seconds the backend wants to be asked again; None: it does not say."""
    values = [value.decode("latin-1") for name, value in headers if name.lower() == b"retry-after"]
    return float(values[0]) if values and values[0].isascii() and values[0].isdigit() else None


def _judged(status: int, raw: str, message: str) -> tuple[type[UnisonoError], str]:
    """What the message means, and as much of it as is passed on."""
    if status in _FOREIGN:
        return _FOREIGN[status], message
    for row in _TABLE:
        # The type of an inner error is in the raw message only.
        if found := row.pattern.search(message) or row.pattern.search(raw):
            return row.kind, found[0] if row.is_wrapper else message
    return _BY_STATUS.get(status, RefusedByBackendError if 300 <= status < 500 else BackendFailedError), message


def _message_of(body: bytes) -> str:
    """`{"error": message}` or OpenAI's `{"error": {"message": …}}`; text that is no JSON is the message itself."""
    try:
        error = msgspec.json.decode(body, type=_Body).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode("utf-8", errors="replace").strip()
    return (error if isinstance(error, str) else error.message).strip()


def _inner(message: str) -> str:
    """What llama.cpp's server said, where Ollama passes its JSON on inside its own message."""
    if not message.startswith("{"):
        return message
    try:
        error = msgspec.json.decode(message, type=_Body).error
    except msgspec.DecodeError:
        return message
    return (error if isinstance(error, str) else error.message).strip() or message


def _counts(raw: str) -> dict[str, str]:
    found = {name: pattern.search(raw) for name, pattern in _COUNTS.items()}
    return {name: match[1] or match[2] for name, match in found.items() if match}


def _worded(kind: type[UnisonoError], message: str, backend: str, model: str) -> str:
    if kind is ModelNotFoundError:
        name = model[:LONGEST_NAME]
        if "invalid" in message.lower():
            return f"backend {backend}: {name!r} cannot be the name of a model"
        return f"backend {backend} has no model {name!r}; get it with: ollama pull {name}"
    return f"backend {backend}: {message}"
