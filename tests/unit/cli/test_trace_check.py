"""Each thing that can be wrong with a trace is found in a trace that has it, and in no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.unit.cli.traces import LINK, MS, Spans, event, item, shared_wave, whole_trace
from unisono.edge.cli.trace_check import Finding, Kind, check
from unisono.edge.cli.trace_spans import Link, Span


def kinds(spans: Spans, **settings: tuple[str, ...]) -> list[Kind]:
    """What is found wrong."""
    return [finding.kind for finding in check(list(spans.values()), **settings)]


def without(*names: str) -> Callable[[Spans], None]:
    """Loses spans."""

    def break_it(spans: Spans) -> None:
        for name in names:
            del spans[name]

    return break_it


def changed(name: str, **fields: object) -> Callable[[Spans], None]:
    """Changes a span; attributes are added, and None takes one away."""

    def break_it(spans: Spans) -> None:
        more = fields.get("attributes")
        if isinstance(more, dict):
            both = {**spans[name].attributes, **more}
            fields["attributes"] = {key: value for key, value in both.items() if value is not None}
        spans[name] = replace(spans[name], **fields)  # type: ignore[arg-type]

    return break_it


def test_nothing_is_wrong_with_a_whole_trace() -> None:
    """Caller, batch, plan, group, load, release, an item and one with two attempts; with and without the caller."""
    spans = whole_trace()
    assert kinds(spans) == []
    del spans["caller"]
    assert kinds(spans) == []


def test_nothing_is_wrong_with_a_shared_wave() -> None:
    """Neither in the trace whose release stands for the wave, nor in the one whose items link there."""
    assert kinds(shared_wave(stands=True, links=())) == []
    assert kinds(shared_wave(stands=False, links=(LINK,))) == []


@pytest.mark.parametrize(
    ("break_it", "found"),
    [
        (without("batch"), [Kind.NO_BATCH, Kind.ORPHAN]),
        (without("group"), [Kind.ORPHAN, Kind.NO_GROUP, Kind.ITEM_COUNT]),
        (without("b"), [Kind.ORPHAN, Kind.ITEM_COUNT]),
        (changed("batch", attributes={"unisono.batch_id": None}), [Kind.NO_BATCH_ID]),
        (without("plan"), [Kind.NO_PLAN]),
        (changed("a", parent_id="batch"), [Kind.NO_GROUP]),
        (without("release"), [Kind.NO_RELEASE]),
        (changed("a", attributes={"unisono.state": None}), [Kind.NO_OUTCOME]),
        (without("a"), [Kind.ITEM_COUNT]),
        (changed("batch", attributes={"unisono.items": 3}), [Kind.ITEM_COUNT]),
        (changed("group", attributes={"unisono.items_left_out": 1}), [Kind.ITEM_COUNT]),
        (changed("a", end_ns=5_000 * MS), [Kind.OUTSIDE_PARENT]),
        (changed("load", start_ns=0), [Kind.OUTSIDE_PARENT]),
        (changed("attempt 2", start_ns=40 * MS), [Kind.OVERLAPPING_ATTEMPTS]),
        (changed("a", events=(event("released", 30), event("released", 35))), [Kind.OVERLAPPING_ATTEMPTS]),
        (changed("a", attributes={"gen_ai.input.messages": "[]"}), [Kind.CONTENT]),
        (changed("a", attributes={"unisono.slots_reason": "word " * 200}), [Kind.CONTENT]),
        (changed("plan", attributes={"unisono.context_reason": "one\ntwo"}), [Kind.CONTENT]),
        (
            changed("plan", attributes={"@jaeger@warnings": ("Negative duration detected, 1", 2)}),
            [Kind.STORE_WARNING],
        ),
        (changed("plan", attributes={"@jaeger@warnings": "odd, one", "x": 1}), [Kind.STORE_WARNING]),
        (changed("plan", attributes={"gen_ai.response.finish_reasons": ("stop", "a\nb")}), [Kind.CONTENT]),
        (changed("caller", start_ns=20 * MS, end_ns=300 * MS), [Kind.CLOCK_SKEW]),
        (changed("a", is_error=True), [Kind.NO_DESCRIPTION]),
    ],
)
def test_a_broken_trace(break_it: Callable[[Spans], None], found: list[Kind]) -> None:
    """What is wrong is told, with a sentence and what to do; and nothing else."""
    spans = whole_trace()
    break_it(spans)
    assert kinds(spans) == found
    for finding in check(list(spans.values())):
        assert finding.what.endswith(".")
        assert finding.remedy


BATCH = "unisono.v1.BatchInference/RunBatch"


@pytest.mark.parametrize(
    ("parents", "named"),
    [
        ({"plan": "plan"}, "plan"),
        ({"batch": "batch"}, BATCH),
        ({"group": "a"}, "group smol"),
        ({"caller": "attempt 2"}, "ask"),
        ({"batch": "group", "caller": "caller"}, f"ask, {BATCH}"),
    ],
)
def test_spans_that_are_their_own_ancestors(parents: dict[str, str], named: str) -> None:
    """Each cycle is one finding's part, named by the span that began first."""
    spans = whole_trace()
    for name, parent in parents.items():
        spans[name] = replace(spans[name], parent_id=parent)
    found = [finding.what for finding in check(list(spans.values())) if finding.kind is Kind.PARENT_CYCLE]
    assert found == [f"{named} stand below themselves."]


def test_names_with_braces_are_only_names() -> None:
    """Whoever named an attribute, or a span, so."""
    spans = whole_trace()
    spans["plan"] = replace(spans["plan"], name="{plan}", attributes={"{0}": "the weather"})
    (finding,) = [one for one in check(list(spans.values()), texts=("weather",)) if one.kind is Kind.CONTENT]
    assert finding.what == "{0} holds text of a prompt or an answer, in {plan}."


def test_no_spans_at_all() -> None:
    """There is nothing to look at, and more may come."""
    (finding,) = check([])
    assert (finding.kind, finding.what, finding.may_be_late) == (Kind.NO_BATCH, "The trace has no spans.", True)


@pytest.mark.parametrize("stands", [False, None])
def test_an_item_of_a_shared_wave_without_its_link(stands: bool | None) -> None:  # noqa: FBT001 - a parameter
    """Where another batch's span stands for the wave, each item must lead there; where nobody says, all or none."""
    spans = shared_wave(stands=stands, links=(LINK,))
    spans["a"] = replace(spans["a"], links=())
    assert kinds(spans) == [Kind.NO_WAVE_LINK]
    # Of another attempt.
    spans["a"] = replace(spans["a"], links=(Link(trace_id="t", span_id="w", attributes={"unisono.attempt": 2}),))
    assert kinds(spans) == [Kind.NO_WAVE_LINK]
    # Of an attempt that the store has forgotten.
    spans["a"] = replace(spans["a"], links=(Link(trace_id="t", span_id="w", attributes={}),))
    assert kinds(spans) == []


def test_times_cut_to_microseconds_are_no_finding() -> None:
    """Some stores cut the beginning and the length, each by itself."""
    spans = {
        name: replace(
            span,
            start_ns=span.start_ns // 1000 * 1000,
            end_ns=span.start_ns // 1000 * 1000 + (span.end_ns - span.start_ns) // 1000 * 1000,
        )
        for name, span in whole_trace().items()
        for span in (replace(span, start_ns=span.start_ns + 999, end_ns=span.end_ns + 1998),)
    }
    assert kinds(spans) == []


def test_words_that_must_not_be_there() -> None:
    """Looked for in attributes of spans and events, also in lists; what stands for an item's name is no exception."""
    spans = whole_trace()
    assert kinds(spans, texts=("moonlight",)) == []
    spans["a"] = replace(spans["a"], events=(*spans["a"].events, event("note", 40, seen=("the moonlight",))))
    assert kinds(spans, texts=("moonlight",)) == [Kind.CONTENT]


def test_words_in_ids_are_no_content() -> None:
    """An id is what its caller calls it; the same word elsewhere is found."""
    spans = whole_trace()
    attributes = {**spans["a"].attributes, "unisono.item_id": "cup-of-tea"}
    spans["a"] = replace(spans["a"], attributes=attributes)
    assert kinds(spans, texts=("cup",)) == []
    spans["a"] = replace(spans["a"], attributes={**attributes, "other": "a cup of"})
    assert kinds(spans, texts=("cup",)) == [Kind.CONTENT]


def test_items_above_the_limit_are_no_loss() -> None:
    """Of a large batch the group says how many items and releases have no span."""
    spans = whole_trace()
    spans["batch"] = replace(spans["batch"], attributes={**spans["batch"].attributes, "unisono.items": 1500})
    left_out = {"unisono.items_left_out": 1498, "unisono.waves_left_out": 3}
    spans["group"] = replace(spans["group"], attributes={**spans["group"].attributes, **left_out})
    del spans["release"]
    assert kinds(spans) == []


def test_a_refill_of_one_needs_no_release_span() -> None:
    """It is told by the item's own event; two that went together have one."""
    spans = whole_trace()
    for name in ("c", "d"):
        spans[name] = item(name, 3, events=(event("released", 60, **{"unisono.wave": 7}),))
        expected = {"unisono.items": len([span for span in spans.values() if span.is_item])}
        spans["batch"] = replace(spans["batch"], attributes={**spans["batch"].attributes, **expected})
        assert kinds(spans) == ([] if name == "c" else [Kind.NO_RELEASE])


def test_batches_of_one_caller_are_checked_by_themselves() -> None:
    """A caller that sends two batches in one trace has two trees, each with its own plan and items."""
    spans = whole_trace()
    other = {
        f"{name}'": replace(span, span_id=f"{span.span_id}'", parent_id=f"{span.parent_id}'")
        for name, span in whole_trace().items()
        if name != "caller"
    }
    other["batch'"] = replace(other["batch'"], parent_id="caller")
    spans.update(other)
    assert kinds(spans) == []
    del spans["plan'"]
    assert kinds(spans) == [Kind.NO_PLAN]


def test_a_batch_below_another_service_s_span_is_found() -> None:
    """The same service's process under another name is another clock."""
    spans = whole_trace()
    backend = Span(
        trace_id="t", span_id="x", parent_id="a", name="POST /api/chat", start_ns=1, end_ns=99 * MS, service="ollama"
    )
    spans["backend"] = backend
    (finding,) = check(list(spans.values()))
    assert finding.kind is Kind.CLOCK_SKEW
    assert "ollama" in finding.what
    assert "unisono" in finding.what


def test_many_of_a_kind_are_one_finding() -> None:
    """The first few are named, and the rest counted."""
    spans = whole_trace()
    for number in range(50):
        spans[f"x{number}"] = replace(item(f"x{number}", number + 10), attributes={"unisono.index": number + 10})
    spans["batch"] = replace(spans["batch"], attributes={**spans["batch"].attributes, "unisono.items": 52})
    (finding,) = check(list(spans.values()))
    assert finding.what == "item 10, item 11, item 12 and 47 more have no outcome."
    assert len(finding.span_ids) == 20


def test_every_kind_says_what_to_do() -> None:
    """And no two kinds are one word."""
    assert all(Finding(kind=kind, what="").remedy for kind in Kind)
    assert all(one != other for one, other in pairwise(sorted(Kind)))
