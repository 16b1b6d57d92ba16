"""Every spelling of OTLP JSON that a Jaeger answers with is read, and nothing else is taken for it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from unisono.edge.cli.trace_spans import NotTraceError, Span, read_spans

TRACE, SPAN, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "00f067aa0ba902b7"
TRACE_64, SPAN_64, PARENT_64 = "CvdlGRbNQ92ESOshHIAxnA==", "t61rcWkgMzE=", "APBnqgupArc="


def answer(*spans: dict[str, Any]) -> dict[str, Any]:
    """An answer of Jaeger's."""
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "unisono"}}]}
    return {
        "result": {"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {}, "spans": list(spans)}]}]}
    }


def one(**fields: Any) -> Span:
    """The one span of an answer."""
    (span,) = read_spans(json.dumps(answer({"traceId": TRACE, "spanId": SPAN, **fields})))
    return span


@pytest.mark.parametrize(
    "ids", [(TRACE, SPAN, PARENT), (TRACE_64, SPAN_64, PARENT_64), (TRACE.upper(), SPAN, PARENT)]
)
def test_ids_in_either_spelling(ids: tuple[str, str, str]) -> None:
    """Hexadecimal or base64, also in links."""
    trace, span, parent = ids
    found = one(traceId=trace, spanId=span, parentSpanId=parent, links=[{"traceId": trace, "spanId": parent}])
    assert (found.trace_id, found.span_id, found.parent_id) == (TRACE, SPAN, PARENT)
    assert (found.links[0].trace_id, found.links[0].span_id) == (TRACE, PARENT)


@pytest.mark.parametrize("parent", ["", "0000000000000000", "AAAAAAAAAAA="])
def test_no_parent(parent: str) -> None:
    """Empty, or all zeros."""
    assert one(parentSpanId=parent).parent_id is None


def test_what_is_zero_is_left_out() -> None:
    """As the JSON of protobuf has it."""
    span = one()
    assert (span.name, span.kind, span.start_ns, span.end_ns, span.is_error) == ("", "UNSPECIFIED", 0, 0, False)
    assert (span.service, span.instance) == ("unisono", "")


@pytest.mark.parametrize("kind", [2, "SPAN_KIND_SERVER"])
@pytest.mark.parametrize("code", [2, "STATUS_CODE_ERROR"])
@pytest.mark.parametrize("at", [1_760_000_000_000_000_123, "1760000000000000123"], ids=["number", "text"])
def test_numbers_and_names(kind: int | str, code: int | str, at: int | str) -> None:
    """Enums, and numbers of 64 bits."""
    span = one(
        name="unisono.v1.BatchInference/RunBatch",
        kind=kind,
        startTimeUnixNano=at,
        endTimeUnixNano=at,
        status={"code": code, "message": "CANCELLED"},
        events=[{"name": "released", "timeUnixNano": at}],
    )
    assert span.is_batch
    assert span.is_error
    assert span.status_message == "CANCELLED"
    assert span.start_ns == span.end_ns == span.events[0].at_ns == 1_760_000_000_000_000_123


def test_what_is_not_as_it_should_be_is_read_all_the_same() -> None:
    """A kind of tomorrow, and names that are no texts."""
    span = one(kind=9, name=5, attributes=[{"key": 7, "value": {"intValue": 1}}], status={"code": 2, "message": 3})
    assert (span.kind, span.name, span.attributes, span.status_message) == ("UNSPECIFIED", "5", {"7": 1}, "3")


def test_values_of_every_type() -> None:
    """Also lists, and lists of pairs; a value of none is none."""
    values = {
        "text": {"stringValue": "x"},
        "whole": {"intValue": "7"},
        "share": {"doubleValue": 0.5},
        "flag": {"boolValue": True},
        "list": {"arrayValue": {"values": [{"stringValue": "a"}, {"intValue": 1}]}},
        "pairs": {"kvlistValue": {"values": [{"key": "k", "value": {"stringValue": "v"}}]}},
        "none": {},
        "empty": {"arrayValue": {}},
    }
    span = one(attributes=[{"key": key, "value": value} for key, value in values.items()])
    assert dict(span.attributes) == {
        "text": "x",
        "whole": 7,
        "share": 0.5,
        "flag": True,
        "list": ("a", 1),
        "pairs": (("k", "v"),),
        "none": None,
        "empty": (),
    }
    assert (span.count("whole"), span.count("flag"), span.count("text")) == (7, 0, 0)
    assert (span.text("text"), span.text("whole"), span.is_item) == ("x", "", False)


def test_several_answers_and_bare_ones() -> None:
    """As the gateway streams them, one after the other; a span that came twice is one; in the order of beginning."""
    late = {"traceId": TRACE, "spanId": SPAN, "startTimeUnixNano": 9}
    early = {"traceId": TRACE, "spanId": PARENT, "startTimeUnixNano": 3}
    body = json.dumps(answer(late)) + "\n" + json.dumps(answer(late, early)["result"])
    assert [span.span_id for span in read_spans(body.encode())] == [PARENT, SPAN]


@pytest.mark.parametrize(
    "body",
    [
        "<html>Jaeger UI</html>",
        "[1, 2]",
        '{"result": 3}',
        '{"result": {"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "xyz", "spanId": "1"}]}]}]}}',
        '{"result": {"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "x"}]}]}]}}',
        '{"result": {"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "AAAA", "spanId": "AAAA"}]}]}]}}',
        json.dumps(answer({"traceId": TRACE, "spanId": SPAN, "startTimeUnixNano": float("inf")})),
        "[" * 100_000,
        "\xff",
    ],
)
def test_what_is_no_trace(body: str) -> None:
    """It is said so, whatever it is."""
    with pytest.raises(NotTraceError, match="no trace in OTLP JSON"):
        read_spans(body.encode("latin-1"))


@pytest.mark.parametrize("body", ["", "{}", '{"result": {}}'])
def test_an_answer_without_spans(body: str) -> None:
    """It has none."""
    assert read_spans(body) == ()
