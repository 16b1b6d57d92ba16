"""What `POST /api/batch/chat` and `/api/batch/generate` are asked, read with care."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.protobuf.duration_pb2 import Duration

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono.core.batch import BadItem
from unisono.core.durations import parse_duration
from unisono.core.errors import Violation
from unisono.edge.batchfile.body import Kind, read_body, read_options
from unisono.edge.batchfile.fields import FieldError, Fields, check_text, name_of, parse_json, quote
from unisono.edge.batchfile.line import take_id
from unisono.edge.contract import convert_config, convert_in
from unisono.edge.rest.errors import RefusedError

if TYPE_CHECKING:
    from unisono.core.batch import BatchConfig
    from unisono.core.limits import Limits
    from unisono.core.model import Item

# As a message of gRPC may have.
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
_MOST_S: Final = 366 * 86_400
_MOST_CONCURRENT: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """A batch that is to be run."""

    config: BatchConfig
    items: list[Item | BadItem]
    # The caller's own names for its requests; None where there is none.
    names: list[str | None]
    is_streamed: bool


def read(body: bytes, kind: Kind, limits: Limits) -> BatchRequest:
    """The request; raises RefusedError, and InvalidRequestError, where it cannot be run as a whole.

    What is wrong with one of `requests` is wrong with that one alone.
    """
    try:
        return _read(body, kind, limits)
    except FieldError as error:
        raise RefusedError(400, f"{error.path or 'the body'}: {error.problem}") from None


def _read(body: bytes, kind: Kind, limits: Limits) -> BatchRequest:
    try:
        fields = Fields(parse_json(body.decode()))
    except UnicodeDecodeError:
        raise FieldError("", "is not UTF-8") from None
    message = pb.BatchConfig(model=fields.text("model") or "", validation=pb.VALIDATION_MODE_PER_ITEM)
    options = read_options(fields, beside={})
    if options.ByteSize():
        message.options.CopyFrom(options)
    if (most := fields.whole("max_batch_size", 1, _MOST_CONCURRENT)) is not None:
        message.max_concurrency = most
    # All requests are here, so that none waits for company: it is kept whatever it says, and must say something.
    _ = duration_s(fields, "batch_timeout")
    keep_alive_s = duration_s(fields, "keep_alive")
    is_streamed = fields.flag("stream") or False
    requests = fields.many("requests")
    if requests is None:
        raise FieldError("requests", f"is missing: a list of bodies as /api/{kind.name.lower()} takes them")
    fields.end()
    if not requests:
        raise FieldError("requests", "is empty; a batch needs at least one request")
    if len(requests) > limits.max_items:
        raise FieldError("requests", f"has {len(requests):,} requests; at most {limits.max_items:,} are taken")
    items: list[Item | BadItem] = []
    names: list[str | None] = []
    for index, value in enumerate(requests):
        name, item, own_s = _item(value, str(index), kind, limits)
        names.append(name)
        items.append(item)
        # One runner serves them all: it stays for as long as the one that wants it longest says.
        if own_s is not None:
            keep_alive_s = max(own_s, keep_alive_s or 0.0)
    if keep_alive_s is not None:
        message.keep_alive.CopyFrom(_span(keep_alive_s))
    config = convert_config.config(message, path="", bounds=limits)
    return BatchRequest(config=config, items=items, names=names, is_streamed=is_streamed)


def _item(value: object, item_id: str, kind: Kind, limits: Limits) -> tuple[str | None, Item | BadItem, float | None]:
    """One of the requests: its name, the item, and how long the model should stay."""
    name: str | None = None
    try:
        fields = Fields(value)
        if fields.has("id"):
            name = take_id(fields, "id")
        keep_alive_s = duration_s(fields, "keep_alive")
        if not fields.has(kind.value):
            raise fields.wrong(kind.value, "is missing")
        message = read_body(fields, kind, system_beside_messages=False)
    except FieldError as error:
        what = Violation(field=error.path or "request", description=error.problem)
        return name, BadItem(item_id=item_id, violations=(what,)), None
    message.item_id = item_id
    return name, convert_in.item(message, bounds=limits), keep_alive_s


def duration_s(fields: Fields, name: str) -> float | None:
    """A span of time, as Ollama takes them: text with units ("500ms", "1h30m"), or a number of seconds."""
    value = fields.value(name)
    if value is None:
        return None
    if isinstance(value, str):
        try:
            seconds = parse_duration(check_text(value, fields.at(name)))
        except ValueError:
            raise fields.wrong(name, f"must be a span of time like 500ms or 5m, not {quote(value)}") from None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # Comparing first spares turning a whole number of 400 digits into a float.
        seconds = float(value) if 0 <= value <= _MOST_S else -1.0
    else:
        raise fields.wrong(name, f"must be a span of time, not {name_of(value)}")
    if not 0 <= seconds <= _MOST_S:
        raise fields.wrong(name, "must be a span of time from 0 to a year; a bare number means seconds")
    return seconds


def _span(seconds: float) -> Duration:
    made = Duration()
    made.FromNanoseconds(round(seconds * 1e9))
    return made
