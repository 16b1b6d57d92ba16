"""Tracing is bounded: in spans, in memory, and in what it costs."""

from __future__ import annotations

import gc
import time

from opentelemetry.sdk.trace import Span

from tests.fakes.otlp import Kind, OtlpReceiver, tree_of
from tests.fakes.scripted_batch import (
    METHOD,
    MS,
    START_NS,
    Place,
    ScriptedBatch,
    arrived,
    chat_item,
    completed,
    context_of,
    of_item,
    stopped,
    tracing,
)
from unisono.adapters.telemetry import item_spans
from unisono.adapters.telemetry.setup import configure
from unisono.core.errors import (
    CancelledItemError,
    ConnectionLostError,
    ItemTimeoutError,
    RunnerDiedError,
)
from unisono.core.events import BatchState
from unisono.core.model import ItemState

CAPTURE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"


def test_large_batches_are_sampled_and_their_failures_kept(otlp: OtlpReceiver) -> None:
    """Of 1,500 items the first 1,000 have spans; of the others those that failed or ran out of time, whole."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.plan("smol", items=1500)
    items = [chat_item(index) for index in range(1500)]
    headers = batch.stage(*items)
    batch.release(*items)
    released_ns = batch.now_ns
    batch.speak(*items)
    ends = {
        7: stopped(items[7], ConnectionLostError("")),
        1200: stopped(items[1200], ItemTimeoutError(""), ItemState.EXPIRED),
        1300: stopped(items[1300], CancelledItemError(""), ItemState.CANCELLED),
        1499: stopped(items[1499], ConnectionLostError("")),
    }
    for item in items:
        batch.finish(ends.get(item.index) or completed(item))
    batch.end()
    spans = arrived(telemetry, otlp)

    (root,) = tree_of(spans)
    group = root.child("group smol")
    kept = {node.span.attributes["unisono.index"] for node in group.children if node.span.kind is Kind.CLIENT}
    assert kept == {*range(1000), 1200, 1499}
    assert group.span.attributes["unisono.items_left_out"] == 498
    # What has none is one span together, so that the time that it took is not blank.
    more = group.child("items left out").span
    assert dict(more.attributes) == {"unisono.items_left_out": 498}
    assert (more.start_ns, more.end_ns) == (released_ns, group.span.end_ns - MS)
    late = of_item(spans, 1499)
    assert START_NS < late.start_ns == released_ns < late.end_ns
    assert [event.name for event in late.events] == ["released", "first_token"]
    assert late.status_message == "CONNECTION_LOST"
    assert late.attributes["gen_ai.request.model"] == "smol"
    # What has no span of its own belongs to the group's, and asks not to be recorded.
    assert context_of(headers[1100]) == (late.trace_id, group.span.span_id, False)
    assert context_of(headers[0]) == (late.trace_id, of_item(spans, 0).span_id, True)


def test_items_that_never_ran_are_sampled_too(otlp: OtlpReceiver) -> None:
    """A large batch that is cancelled does not make a span for each item that was still waiting."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()], item_limit=10))
    batch.plan("smol", items=40)
    items = [chat_item(index) for index in range(40)]
    for index in range(20):
        batch.plan("smol", items=40 + index)
        batch.run(items[index], wave=index)
    for item in items[20:]:
        batch.finish(stopped(item, CancelledItemError(""), ItemState.CANCELLED, attempts=0))
    batch.end(BatchState.CANCELLED)
    (root,) = tree_of(arrived(telemetry, otlp))
    group = root.child("group smol")
    assert [node.span.name for node in group.children].count("chat smol") == 10
    assert [node.span.name for node in group.children].count("release") == 10
    # Ten items ran without a span, and for so long; the other twenty never ran.
    more = group.child("items left out").span
    assert more.attributes["unisono.items_left_out"] == 30
    assert more.end_ns < group.span.end_ns
    assert len(group.children) == 21
    assert group.span.attributes["unisono.items_left_out"] == 30
    assert group.span.attributes["unisono.waves_left_out"] == 10
    assert root.span.status_message == "CANCELLED"


def test_attempts_above_the_limit_are_events_only(otlp: OtlpReceiver) -> None:
    """A batch all of whose items are tried again does not make a span for each attempt."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()], item_limit=10))
    batch.plan("smol", items=8)
    items = [chat_item(index) for index in range(8)]
    batch.stage(*items)
    batch.release(*items)
    for item in items:
        batch.retry(item, ConnectionLostError(""))
    batch.stage(*items, attempt=2)
    batch.release(*items, wave=1)
    batch.finish(*(completed(item, attempts=2) for item in items))
    batch.end()
    spans = arrived(telemetry, otlp)
    assert sum(span.name.startswith("attempt ") for span in spans) == 10
    for index in range(8):
        assert [event.name for event in of_item(spans, index).events].count("released") == 2


def test_an_item_remembers_so_much_and_no_more(otlp: OtlpReceiver) -> None:
    """One that is broken off again and again: the first events and attempts, and its span is whole."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.plan("smol")
    item = chat_item(0)
    for attempt in range(1, 101):
        batch.stage(item, attempt=attempt)
        batch.release(item, wave=attempt, others=1)
        batch.retry(item, RunnerDiedError(""), attempt=attempt, is_free=True)
    batch.finish(stopped(item, ConnectionLostError("")))
    batch.end()
    spans = arrived(telemetry, otlp)
    assert len(of_item(spans, 0).events) == item_spans.MAX_REMEMBERED_EVENTS
    assert sum(span.name.startswith("attempt ") for span in spans) == item_spans.MAX_REMEMBERED_ATTEMPTS
    assert of_item(spans, 0).status_message == "CONNECTION_LOST"


def test_batches_at_the_same_time_stay_apart(otlp: OtlpReceiver) -> None:
    """Two batches with the same item numbers give two traces, each whole."""
    telemetry = tracing(otlp)
    listener = telemetry.listener([Place()])
    one, two = ScriptedBatch(listener, batch_id="one"), ScriptedBatch(listener, batch_id="two")
    for batch in (one, two):
        batch.plan("smol")
        batch.stage(chat_item(0))
        batch.release(chat_item(0))
    two.finish(completed(chat_item(0)))
    one.finish(completed(chat_item(0)))
    two.end()
    one.end()
    trees = tree_of(arrived(telemetry, otlp))
    assert {root.span.attributes["unisono.batch_id"] for root in trees} == {"one", "two"}
    for root in trees:
        assert root.lines() == [METHOD, "  plan", "  group smol", "    release", "    chat smol"]
        assert {node.span.trace_id for node in root.walk()} == {root.span.trace_id}


def test_nothing_is_kept_of_a_batch_that_ended() -> None:
    """Whoever keeps the watch keeps no span; what comes after the end is ignored."""

    def living_spans() -> set[int]:
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if isinstance(thing, Span)}

    before = living_spans()
    telemetry = configure("1", {})
    assert telemetry is not None
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.plan("smol")
    # One item whose end the application never tells.
    batch.stage(chat_item(0), chat_item(1))
    batch.finish(completed(chat_item(0)))
    assert living_spans() - before
    batch.end()
    batch.end()
    batch.plan("smol")
    assert batch.stage(chat_item(2)) == [{}]
    batch.load()
    batch.release(chat_item(2))
    batch.retry(chat_item(2), RunnerDiedError(""))
    batch.finish(completed(chat_item(2)))
    assert living_spans() - before == set()


def test_half_a_character_costs_no_span(otlp: OtlpReceiver) -> None:
    """A name that UTF-8 cannot hold (half a surrogate pair, from a JSON escape) loses neither its span nor others."""
    telemetry = tracing(otlp, **{CAPTURE: "true"})
    batch = ScriptedBatch(telemetry.listener())
    batch.plan("smol\ud800")
    batch.run(chat_item(0, model="smol\ud800"))
    batch.end()
    assert {span.name for span in arrived(telemetry, otlp)} == {
        METHOD,
        "plan",
        "group smol?",
        "chat smol?",
        "release",
    }


def test_tracing_an_item_costs_little() -> None:
    """Building the spans of 1,000 items, with three events each, costs some 40 µs an item: here, less than 1 ms."""
    telemetry = configure("1", {})
    assert telemetry is not None
    listener = telemetry.listener([Place()])
    items = [chat_item(index) for index in range(1000)]
    results = [completed(item) for item in items]

    def cost_s() -> float:
        batch = ScriptedBatch(listener)
        batch.plan("smol", items=1000)
        began = time.perf_counter()
        batch.stage(*items)
        batch.release(*items)
        batch.speak(*items)
        batch.finish(*results)
        batch.end()
        return time.perf_counter() - began

    # The best of three, with much room: the machine may have something else to do, and coverage is measured too.
    assert min(cost_s() for _ in range(3)) / 1000 < 1e-3
