"""Attempts and failures in a trace: what was tried again, what was broken off, and why something ended."""

from __future__ import annotations

from dataclasses import replace

from tests.fakes.otlp import Kind, OtlpReceiver, Status
from tests.fakes.scripted_batch import (
    METHOD,
    MS,
    SECRET,
    START_NS,
    Place,
    ScriptedBatch,
    arrived,
    chat_item,
    completed,
    context_of,
    named,
    of_item,
    play,
    stopped,
    tracing,
)
from unisono.adapters.telemetry.spans import SHORTEST_NS
from unisono.app.ports import LoadOutcome, ReleaseTimes
from unisono.core.commands import ReleaseReason
from unisono.core.errors import (
    BatchDeadlineError,
    CancelledItemError,
    ConnectionLostError,
    ItemTimeoutError,
    LoadFailedError,
    RunnerDiedError,
)
from unisono.core.events import BatchState
from unisono.core.model import ItemState


def test_each_attempt_of_a_retried_item_has_a_length(otlp: OtlpReceiver) -> None:
    """Below the item, one after the other, with the pause between them; why the first one failed stands on it."""
    telemetry = tracing(otlp)
    play(ScriptedBatch(telemetry.listener([Place()])))
    spans = arrived(telemetry, otlp)

    item = of_item(spans, 1)
    first, second = named(spans, "attempt 1"), named(spans, "attempt 2")
    assert first.parent_id == second.parent_id == item.span_id
    assert item.start_ns == first.start_ns < first.end_ns < second.start_ns < second.end_ns == item.end_ns
    assert (first.status, first.status_message) == (Status.ERROR, "RUNNER_DIED")
    assert dict(first.attributes) == {
        "unisono.attempt": 1,
        "unisono.again_in_s": 0.5,
        "error.type": "RUNNER_DIED",
    }
    assert second.status is Status.UNSET
    assert dict(second.attributes) == {"unisono.attempt": 2}


def test_an_item_that_ends_between_two_attempts_has_had_one(otlp: OtlpReceiver) -> None:
    """It was cancelled while it waited to be tried again."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.plan("smol")
    batch.stage(chat_item(0))
    batch.release(chat_item(0))
    batch.retry(chat_item(0), ConnectionLostError(""))
    batch.finish(stopped(chat_item(0), CancelledItemError(""), ItemState.CANCELLED))
    batch.end()
    spans = arrived(telemetry, otlp)
    assert [span.name for span in spans if span.name.startswith("attempt")] == ["attempt 1"]


def test_an_item_begins_when_it_goes(otlp: OtlpReceiver) -> None:
    """What is held is blank: bars side by side are items at the backend. How long it was held is told."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.plan("smol")
    items = [chat_item(0), chat_item(1)]
    headers = batch.stage(*items)
    batch.release(items[0])
    batch.tick(250)
    batch.finish(completed(items[0]))
    batch.release(items[1], wave=1)
    batch.finish(completed(items[1]))
    batch.end()
    spans = arrived(telemetry, otlp)
    first, second = of_item(spans, 0), of_item(spans, 1)
    assert second.start_ns > first.end_ns
    # From its own staging to its release.
    assert second.attributes["unisono.held_s"] == second.events[0].attributes["unisono.held_s"] == 0.254
    # Its request has named its span long before that began.
    assert [context_of(header)[1] for header in headers] == [first.span_id, second.span_id]


def test_what_never_went_made_no_call(otlp: OtlpReceiver) -> None:
    """Cancelled while it was held, refused while it was staged, never staged: `item`, with how long it waited."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.plan("smol")
    items = [chat_item(index) for index in range(4)]
    batch.stage(*items[:3])
    batch.retry(items[1], ConnectionLostError(""))
    batch.finish(replace(stopped(items[0], CancelledItemError(""), ItemState.CANCELLED), waited_s=1.5))
    batch.finish(*(replace(stopped(item, ConnectionLostError("")), waited_s=1.5) for item in items[1:]))
    batch.end()
    spans = arrived(telemetry, otlp)
    for index in range(4):
        span = of_item(spans, index)
        assert (span.name, span.kind, span.end_ns - span.start_ns) == ("item", Kind.INTERNAL, SHORTEST_NS)
        assert span.attributes["unisono.queued_s"] == 1.5
    assert not [span for span in spans if span.name.startswith("attempt")]


def test_no_span_ends_as_it_begins(otlp: OtlpReceiver) -> None:
    """Not even that of a release of one item: Jaeger takes that for a clock that went back, and warns."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.plan("smol")
    item = chat_item(0)
    batch.stage(item)
    now_ns = batch.tick()
    times = ReleaseTimes(first_ns=now_ns, last_ns=now_ns)
    batch.watch.wave_released(group=0, wave=0, wave_key=1, item_count=1, others=0, times=times)
    batch.watch.group_loaded(group=0, started_ns=now_ns, ended_ns=now_ns, outcome=None, error=LoadFailedError(""))
    batch.finish(stopped(item, ConnectionLostError("")))
    batch.end()
    spans = arrived(telemetry, otlp)
    assert {"release", "load", "item"} < {span.name for span in spans}
    assert all(span.end_ns - span.start_ns >= SHORTEST_NS for span in spans)


def test_what_is_broken_off_while_it_is_held_was_no_attempt(otlp: OtlpReceiver) -> None:
    """Nothing had been asked: no span, and no event before the item's span begins; it is counted all the same."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.plan("smol")
    item = chat_item(0)
    batch.stage(item)
    batch.retry(item, RunnerDiedError(""), is_free=True)
    batch.stage(item, attempt=2)
    batch.release(item)
    batch.finish(completed(item, disturbed=1))
    batch.end()
    spans = arrived(telemetry, otlp)
    span = of_item(spans, 0)
    assert [event.name for event in span.events] == ["released"]
    assert span.start_ns == span.events[0].at_ns
    assert span.attributes["unisono.disturbed"] == 1
    assert not [other for other in spans if other.name.startswith("attempt")]


def test_a_load_that_was_joined_begins_with_the_group(otlp: OtlpReceiver) -> None:
    """Whoever comes while a model is being loaded waits for the rest of it, and its trace holds no more."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.tick(20)
    batch.plan("smol")
    outcome = LoadOutcome(was_loaded=False, duration_s=0.03, slots=8)
    batch.watch.group_loaded(group=0, started_ns=START_NS - MS, ended_ns=batch.tick(10), outcome=outcome, error=None)
    batch.end()
    spans = arrived(telemetry, otlp)
    load, group = named(spans, "load"), named(spans, "group smol")
    assert load.start_ns == group.start_ns == named(spans, "plan").end_ns
    assert load.end_ns - load.start_ns == 10 * MS


def test_an_attempt_that_another_item_ended_is_no_error_of_this_one(otlp: OtlpReceiver) -> None:
    """It is broken off: the word error is nowhere on the item's span, which counts how often that happened."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.plan("smol")
    item = chat_item(0)
    batch.stage(item)
    batch.release(item, lane=2)
    batch.retry(item, RunnerDiedError(f"died at {SECRET}"), is_free=True)
    batch.stage(item, attempt=2)
    batch.release(item, wave=1, reason=ReleaseReason.SUSPECT, lane=None)
    batch.finish(completed(item, disturbed=1))
    batch.end()
    span = of_item(arrived(telemetry, otlp), 0)

    names = [event.name for event in span.events]
    assert names == ["released", "broken_off", "released"]
    assert dict(span.events[1].attributes) == {"unisono.broken_off_by": "RUNNER_DIED", "unisono.attempt": 1}
    assert span.status is Status.UNSET
    for attributes in (span.attributes, *(event.attributes for event in span.events)):
        assert "error.type" not in attributes
    assert (span.attributes["unisono.attempts"], span.attributes["unisono.disturbed"]) == (1, 1)
    # The lane of the first attempt is not that of the last, which had none.
    assert span.attributes["unisono.release_reason"] == "suspect"
    assert "unisono.lane" not in span.attributes
    assert "unisono.lane" not in span.events[2].attributes


def test_what_went_wrong_is_marked_with_its_reason(otlp: OtlpReceiver) -> None:
    """Failed, cancelled and expired items, a failed load and a stopped batch are errors, named by their reason."""
    telemetry = tracing(otlp)
    batch = ScriptedBatch(telemetry.listener([Place()]))
    batch.plan("smol")
    batch.load(0, error=LoadFailedError(f"cannot load, said {SECRET}"))
    items = [chat_item(index) for index in range(4)]
    batch.stage(*items[:3])
    batch.release(*items[1:3])
    batch.finish(
        stopped(items[0], ConnectionLostError(SECRET)),
        stopped(items[1], CancelledItemError(SECRET), ItemState.CANCELLED),
        stopped(items[2], ItemTimeoutError(SECRET), ItemState.EXPIRED),
        stopped(items[3], BatchDeadlineError(SECRET), ItemState.EXPIRED, group=None, attempts=0),
    )
    batch.end(BatchState.EXPIRED)
    spans = arrived(telemetry, otlp)

    reasons = {
        0: ("failed", "CONNECTION_LOST"),
        1: ("cancelled", "CANCELLED"),
        2: ("expired", "ITEM_TIMEOUT"),
        3: ("expired", "BATCH_DEADLINE"),
    }
    for index, (state, reason) in reasons.items():
        item = of_item(spans, index)
        assert (item.status, item.status_message) == (Status.ERROR, reason)
        assert item.attributes["error.type"] == reason
        assert item.attributes["unisono.state"] == state
    for name, reason in ((METHOD, "BATCH_DEADLINE"), ("load", "LOAD_FAILED")):
        span = named(spans, name)
        assert (span.status, span.status_message) == (Status.ERROR, reason)
        assert span.attributes["error.type"] == reason
