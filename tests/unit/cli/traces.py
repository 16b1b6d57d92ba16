"""A whole trace, by names, to be broken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from unisono.edge.cli.trace_spans import Event, Link, Span

MS = 1_000_000
Spans = dict[str, Span]
LINK = Link(trace_id="other", span_id="wave", attributes={"unisono.attempt": 1})


def span(name: str, parent: str | None, start_ms: float, end_ms: float, /, **fields: Any) -> Span:
    """A span of the service; its id is its name."""
    usual = {"name": name, "service": "unisono", "instance": "1"}
    return Span(
        trace_id="t",
        span_id=name,
        parent_id=parent,
        start_ns=int(start_ms * MS),
        end_ns=int(end_ms * MS),
        **{**usual, **fields},
    )


def event(name: str, at_ms: float, /, **attributes: Any) -> Event:
    """An event of an item."""
    return Event(name=name, at_ns=int(at_ms * MS), attributes=attributes)


# After it was held for 5 ms.
RELEASED = event("released", 30, **{"unisono.held_s": 0.005})


def item(name: str, index: int, /, **fields: Any) -> Span:
    """An answered item, which went with the first wave unless its events say otherwise."""
    attributes = {
        "unisono.index": index,
        "unisono.item_id": name,
        "unisono.state": "completed",
        "unisono.attempts": 1,
        "unisono.passes": 13,
        "gen_ai.operation.name": "chat",
    }
    events = (RELEASED, event("first_token", 35))
    usual = {"name": "chat smol", "kind": "CLIENT", "attributes": attributes, "events": events}
    return span(name, "group", 30, 90, **{**usual, **fields})


def whole_trace() -> Spans:
    """A batch of two items, of which `b` was tried twice."""
    again = (
        RELEASED,
        event("first_token", 35),
        event("retry", 45),
        event("released", 60, **{"unisono.wave": 1, "unisono.attempt": 2}),
        event("first_token", 70, **{"unisono.attempt": 2}),
    )
    batch = {"unisono.batch_id": "batch_1", "unisono.items": 2, "unisono.state": "completed"}
    both = item("b", 1)
    made = [
        span("caller", None, 0, 110, name="ask", service="shop", instance="9"),
        span(
            "batch",
            "caller",
            1,
            100,
            name="unisono.v1.BatchInference/RunBatch",
            kind="SERVER",
            attributes={**batch, "unisono.items_completed": 2},
        ),
        span("plan", "batch", 1, 2),
        span("group", "batch", 2, 90, name="group smol", attributes={"unisono.group": 0}),
        span("load", "group", 3, 20),
        span("release", "group", 30, 30.2, attributes={"unisono.wave": 0, "unisono.items": 2, "unisono.others": 0}),
        item("a", 0),
        item("b", 1, events=again, attributes={**both.attributes, "unisono.attempts": 2}),
        span(
            "attempt 1",
            "b",
            30,
            45,
            attributes={"unisono.attempt": 1},
            is_error=True,
            status_message="CONNECTION_LOST",
        ),
        span("attempt 2", "b", 60, 90, attributes={"unisono.attempt": 2}),
    ]
    return {each.span_id: each for each in made}


def shared_wave(*, stands: bool | None, links: tuple[Link, ...]) -> Spans:
    """The same with a first wave that other callers' items were in; `stands`: this trace's span stands for it."""
    spans = whole_trace()
    said = {} if stands is None else {"unisono.stands_for_wave": stands}
    attributes = {"unisono.wave": 0, "unisono.items": 2, "unisono.others": 3, **said}
    spans["release"] = span("release", "group", 30, 30.2, attributes=attributes)
    for name in ("a", "b"):
        was = spans[name]
        spans[name] = item(
            name, was.count("unisono.index"), events=was.events, attributes=was.attributes, links=links
        )
    return spans


def id_of(name: str, size: int) -> str:
    """An id of so many bytes, in hexadecimal; the same for the same name."""
    return hashlib.sha256(name.encode()).hexdigest()[: 2 * size]


def as_answer(spans: Iterable[Span]) -> str:
    """What Jaeger answers for these spans."""
    resources = [
        {
            "resource": {"attributes": _pairs({"service.name": one.service, "service.instance.id": one.instance})},
            "scopeSpans": [{"scope": {}, "spans": [_as_json(one)]}],
        }
        for one in spans
    ]
    return json.dumps({"result": {"resourceSpans": resources}})


def _as_json(one: Span) -> dict[str, Any]:
    return {
        "traceId": id_of(one.trace_id, 16),
        "spanId": id_of(one.span_id, 8),
        **({"parentSpanId": id_of(one.parent_id, 8)} if one.parent_id else {}),
        "name": one.name,
        "kind": {"INTERNAL": 1, "SERVER": 2, "CLIENT": 3}[one.kind],
        "startTimeUnixNano": str(one.start_ns),
        "endTimeUnixNano": str(one.end_ns),
        "attributes": _pairs(one.attributes),
        "events": [
            {"name": each.name, "timeUnixNano": str(each.at_ns), "attributes": _pairs(each.attributes)}
            for each in one.events
        ],
        "status": {"code": 2, "message": one.status_message} if one.is_error else {},
    }


def _pairs(attributes: Any) -> list[dict[str, Any]]:
    return [
        {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
        for key, value in attributes.items()
    ]
