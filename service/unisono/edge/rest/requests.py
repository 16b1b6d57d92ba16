"""What requests of the REST edge say, read with care: pages, expiry, and a batch that is to be created."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from unisono.core.durations import parse_duration
from unisono.edge.batchfile.fields import FieldError, Fields, check_text, name_of, parse_json
from unisono.edge.batchfile.line import FORMS
from unisono.edge.contract.convert_config import MAX_REQUEST_ID_BYTES
from unisono.edge.rest.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.datastructures import QueryParams

MAX_BODY_BYTES: Final = 1024 * 1024
MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512
# OpenAI's own bounds of `expires_after`, in seconds.
LEAST_KEEP_S, MOST_KEEP_S = 3_600, 2_592_000
_MOST_WINDOW_S: Final = 30 * 86_400
_MOST_DIGITS: Final = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatchRequest:
    """A batch that is to be created."""

    input_file_id: str
    endpoint: str
    window: str
    window_s: float
    metadata: Mapping[str, str]
    output_keep_s: int | None


def single(query: QueryParams, name: str) -> str:
    """A parameter of the query, empty where it is absent; raises RefusedError where it is there twice."""
    found = query.getlist(name)
    if len(found) > 1:
        raise RefusedError(400, f"{name} is given {len(found)} times; once is meant.", param=name)
    return found[0] if found else ""


def sequence(text: str, name: str) -> int:
    """The number of an event after which more are wanted; 0 where none is said. Raises RefusedError."""
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise RefusedError(400, f"{name} must be the number of an event, 0 or more.", param=name)
    return int(text)


def read_retry(body: bytes) -> str:
    """The body of `POST …/retry`, which may be empty: its `request_id`. Raises RefusedError."""
    if not body:
        return ""
    try:
        fields = Fields(parse_json(body.decode()))
        request_id = fields.text("request_id") or ""
        fields.end()
    except UnicodeDecodeError:
        raise RefusedError(400, "The body: is not UTF-8.") from None
    except FieldError as error:
        what = f"{error.path or 'The body'}: {error.problem}."
        raise RefusedError(400, what, param=error.path or None) from None
    if len(request_id.encode()) > MAX_REQUEST_ID_BYTES:
        what = f"request_id is longer than {MAX_REQUEST_ID_BYTES} bytes."
        raise RefusedError(400, what, param="request_id")
    return request_id


def whole_limit(query: QueryParams, *, default: int, most: int) -> int:
    """How many of a list are wanted; raises RefusedError."""
    text = single(query, "limit")
    if not text:
        return default
    # More digits than these are of a number that is too large too.
    found = int(text[:10]) if text.isascii() and text.isdigit() else None
    if found is None or not 1 <= found <= most:
        code = "invalid_value"
        if found is not None:
            code = "integer_below_min_value" if found < 1 else "integer_above_max_value"
        raise RefusedError(400, f"limit must be a whole number from 1 to {most:,}.", param="limit", code=code)
    return found


def is_oldest_first(query: QueryParams) -> bool:
    """The order of a list; raises RefusedError."""
    order = single(query, "order") or "desc"
    if order not in ("asc", "desc"):
        raise RefusedError(400, "order must be asc or desc.", param="order", code="invalid_value")
    return order == "asc"


def read_batch(body: bytes) -> NewBatchRequest:
    """The body of `POST /v1/batches`; raises RefusedError."""
    try:
        return _read_batch(body)
    except FieldError as error:
        what = f"{error.path or 'The body'}: {error.problem}."
        raise RefusedError(400, what, param=error.path or None, code=_code_of(error)) from None


def _code_of(error: FieldError) -> str | None:
    """OpenAI's name for what is wrong with a field; none where there is no field."""
    if not error.path:
        return None
    return "unknown_parameter" if error.is_unknown else "invalid_value"


def _read_batch(body: bytes) -> NewBatchRequest:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise FieldError("", "is not UTF-8") from None
    fields = Fields(parse_json(text))
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not fields.has(name):
            raise RefusedError(
                400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
            )
    input_file_id = fields.text("input_file_id") or ""
    endpoint = _endpoint(fields.text("endpoint") or "")
    window = fields.text("completion_window") or ""
    request = NewBatchRequest(
        input_file_id=input_file_id,
        endpoint=endpoint,
        window=window,
        window_s=_window_s(window),
        metadata=_metadata(fields.value("metadata")),
        output_keep_s=_output_keep_s(fields.child("output_expires_after")),
    )
    fields.end()
    return request


def _endpoint(endpoint: str) -> str:
    if endpoint not in FORMS:
        what = f"Invalid value: '{endpoint[:80]}'. Supported values are: {', '.join(FORMS)}."
        raise RefusedError(400, what, param="endpoint", code="invalid_value")
    return endpoint


def _window_s(window: str) -> float:
    """OpenAI knows "24h" only; any other span of time is taken too."""
    try:
        seconds = parse_duration(window)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _MOST_WINDOW_S:
        what = f"Invalid value: '{window[:80]}'. Write 24h, or another span of time up to 30d."
        raise RefusedError(400, what, param="completion_window", code="invalid_value")
    return seconds


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FieldError("metadata", f"must be an object, not {name_of(value)}")
    if len(value) > MAX_PAIRS:
        raise FieldError("metadata", f"has {len(value)} entries; at most {MAX_PAIRS} are kept")
    found: dict[str, str] = {}
    for key, text in value.items():
        _ = check_text(key, "metadata")
        if not isinstance(text, str):
            raise FieldError(f"metadata.{key[:MAX_KEY]}", f"must be text, not {name_of(text)}")
        if not 0 < len(key) <= MAX_KEY:
            raise FieldError("metadata", f"has a key of {len(key)} characters; 1 to {MAX_KEY} are kept")
        if len(text) > MAX_VALUE:
            raise FieldError(f"metadata.{key}", f"has {len(text):,} characters; at most {MAX_VALUE} are kept")
        found[key] = check_text(text, f"metadata.{key}")
    return found


def _output_keep_s(fields: Fields | None) -> int | None:
    if fields is None:
        return None
    if fields.text("anchor") != "created_at":
        raise fields.wrong("anchor", "must be created_at")
    seconds = fields.whole("seconds", LEAST_KEEP_S, MOST_KEEP_S)
    if seconds is None:
        raise fields.wrong("seconds", "is missing")
    fields.end()
    return seconds


def purpose(form: Mapping[str, str]) -> str:
    """What a file is for; raises RefusedError for all but batches."""
    found = form.get("purpose")
    if found is None:
        raise RefusedError(400, "Missing required parameter: 'purpose'.", param="purpose")
    if found != "batch":
        what = f"Invalid value: '{found[:80]}'. Files are for batches here: the purpose must be batch."
        raise RefusedError(400, what, param="purpose", code="invalid_value")
    return found


def keep_s(form: Mapping[str, str]) -> int | None:
    """How long a file is to be kept, from a form's `expires_after[…]`; None: it does not say. Raises RefusedError."""
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise RefusedError(400, "expires_after[anchor] must be created_at.", param="expires_after[anchor]")
    is_whole = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) <= 9
    if seconds is None or not is_whole or not LEAST_KEEP_S <= int(seconds) <= MOST_KEEP_S:
        what = f"expires_after[seconds] must be a whole number from {LEAST_KEEP_S:,} to {MOST_KEEP_S:,}."
        raise RefusedError(400, what, param="expires_after[seconds]")
    return int(seconds)
