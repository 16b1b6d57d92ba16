"""Spans as Jaeger's query API gives them (OTLP JSON) → values.

Of the same JSON there are several spellings, and all are read: ids in hexadecimal (OTLP's own, and Jaeger 2) or
base64 (protobuf's), enums as numbers or names, 64-bit numbers as text or not, the whole in `result` or bare, and
several such answers one after the other, as gRPC's gateway streams them.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Value = str | bool | int | float | tuple[Any, ...] | None
Attributes = Mapping[str, Value]

_KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
_ERROR = (2, "STATUS_CODE_ERROR")
_TRACE_ID_BYTES, _SPAN_ID_BYTES = 16, 8
# Spans of this service's rpcs; the name is that of the rpc.
BATCH_PREFIX = "unisono.v1.BatchInference/"


class NotTraceError(ValueError):
    """The answer is no trace in OTLP JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A point in time of a span."""

    name: str
    at_ns: int
    attributes: Attributes

    @property
    def attempt(self) -> int:
        """The attempt of the item that it belongs to."""
        return whole(self.attributes.get("unisono.attempt"), 1)

    @property
    def held_ns(self) -> int:
        """Of a release: how long the request had been held before; 0 where that is not known."""
        held_s = self.attributes.get("unisono.held_s")
        return round(held_s * 1e9) if isinstance(held_s, int | float) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A reference to a span, perhaps of another trace."""

    trace_id: str
    span_id: str
    attributes: Attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A span as it was stored."""

    # In hexadecimal.
    trace_id: str
    span_id: str
    # None for the first of a trace.
    parent_id: str | None = None
    name: str
    # "SERVER", "CLIENT", "INTERNAL" …
    kind: str = "INTERNAL"
    start_ns: int
    end_ns: int
    attributes: Attributes = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    links: tuple[Link, ...] = ()
    is_error: bool = False
    status_message: str = ""
    # The name of the service that sent it, and which of its processes that was; empty where it did not say.
    service: str = ""
    instance: str = ""

    @property
    def is_batch(self) -> bool:
        """Whether it is a batch's own: that of an rpc of this service."""
        return self.kind == "SERVER" and self.name.startswith(BATCH_PREFIX)

    @property
    def is_item(self) -> bool:
        """Whether it is an item's, whether that ran or not."""
        return "unisono.index" in self.attributes

    @property
    def is_attempt(self) -> bool:
        """Whether it is one of several attempts of an item."""
        return not self.is_item and "unisono.attempt" in self.attributes

    def text(self, name: str) -> str:
        """An attribute that is a text; empty where it is none."""
        value = self.attributes.get(name)
        return value if isinstance(value, str) else ""

    def count(self, name: str) -> int:
        """An attribute that is a whole number; 0 where it is none."""
        return whole(self.attributes.get(name), 0)


def whole(value: object, default: int) -> int:
    """A whole number, or what stands for it."""
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def read_spans(body: str | bytes) -> tuple[Span, ...]:
    """The spans of an answer, each once, in the order of their beginning. Raises NotTraceError."""
    spans: dict[tuple[str, str], Span] = {}
    try:
        for document in _documents(body.decode() if isinstance(body, bytes) else body):
            for span in _spans(document):
                spans[span.trace_id, span.span_id] = span
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise NotTraceError(f"the answer is no trace in OTLP JSON: {error}") from error
    return tuple(sorted(spans.values(), key=lambda span: (span.start_ns, -span.end_ns, span.span_id)))


def _documents(text: str) -> Iterator[dict[str, Any]]:
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        document, at = decoder.raw_decode(text, at)
        yield document


def _spans(document: dict[str, Any]) -> Iterator[Span]:
    for resource in document.get("result", document).get("resourceSpans") or ():
        who = _attributes((resource.get("resource") or {}).get("attributes"))
        for scope in resource.get("scopeSpans") or ():
            for span in scope.get("spans") or ():
                yield _span(span, who)


def _span(span: dict[str, Any], who: Attributes) -> Span:
    status = span.get("status") or {}
    # OTLP's JSON leaves out what is zero.
    start_ns = int(span.get("startTimeUnixNano") or 0)
    return Span(
        trace_id=_id(span["traceId"], _TRACE_ID_BYTES),
        span_id=_id(span["spanId"], _SPAN_ID_BYTES),
        parent_id=_id(span.get("parentSpanId") or "", _SPAN_ID_BYTES) or None,
        name=str(span.get("name") or ""),
        kind=_kind(span.get("kind") or 0),
        start_ns=start_ns,
        end_ns=max(start_ns, int(span.get("endTimeUnixNano") or 0)),
        attributes=_attributes(span.get("attributes")),
        events=tuple(
            Event(
                name=str(event.get("name") or ""),
                at_ns=int(event.get("timeUnixNano") or 0),
                attributes=_attributes(event.get("attributes")),
            )
            for event in span.get("events") or ()
        ),
        links=tuple(
            Link(
                trace_id=_id(link.get("traceId") or "", _TRACE_ID_BYTES),
                span_id=_id(link.get("spanId") or "", _SPAN_ID_BYTES),
                attributes=_attributes(link.get("attributes")),
            )
            for link in span.get("links") or ()
        ),
        is_error=status.get("code") in _ERROR,
        status_message=str(status.get("message") or ""),
        service=str(who.get("service.name") or ""),
        instance=str(who.get("service.instance.id") or ""),
    )


def _id(text: str, size: int) -> str:
    """An id in hexadecimal; empty where it is empty, or all zeros.

    The two spellings cannot be mixed up: 16 bytes are 32 digits or 24 characters, 8 bytes 16 or 12.
    """
    if len(text) == 2 * size:
        found = bytes.fromhex(text)
    else:
        try:
            found = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"{text!r} is no id") from error
        if len(found) not in {0, size}:
            raise ValueError(f"{text!r} is no id of {size} bytes")
    return found.hex() if any(found) else ""


def _kind(kind: int | str) -> str:
    """Its name; a number that is not known to us is no more than not specified."""
    if isinstance(kind, str):
        return kind.removeprefix("SPAN_KIND_")
    return _KINDS[kind] if 0 <= kind < len(_KINDS) else _KINDS[0]


def _attributes(pairs: Sequence[dict[str, Any]] | None) -> Attributes:
    return MappingProxyType({str(pair["key"]): _value(pair.get("value") or {}) for pair in pairs or ()})


def _value(value: dict[str, Any]) -> Value:
    for which, plain in value.items():
        match which:
            case "intValue":
                return int(plain)
            case "doubleValue":
                # "NaN" and "Infinity" are texts in JSON.
                return float(plain)
            case "arrayValue":
                return tuple(_value(one) for one in plain.get("values") or ())
            case "kvlistValue":
                return tuple((pair["key"], _value(pair.get("value") or {})) for pair in plain.get("values") or ())
            case "boolValue":
                return bool(plain)
            case _:
                return str(plain)
    return None
