"""The tree as it is drawn: what ran side by side stands one below another, and a large one stays readable."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.cli.traces import MS, event, item, span, whole_trace
from unisono.edge.cli.trace_spans import Span
from unisono.edge.cli.trace_tree import ASCII, UNICODE, Marks, draw_tree


def lines(spans: list[Span], width: int = 90, *, marks: Marks = UNICODE, items: int = 40) -> list[str]:
    """The drawing."""
    return [(row.label + row.bar).rstrip() for row in draw_tree(spans, width, marks=marks, items=items)]


def large(count: int) -> list[Span]:
    """A batch of so many items, four at a time, of 10 ms each."""
    spans = whole_trace()
    for name in ("a", "b", "attempt 1", "attempt 2", "caller"):
        del spans[name]
    end = 40 + 10 * count // 4
    for name in ("batch", "group"):
        spans[name] = replace(spans[name], end_ns=end * MS)
    spans["batch"] = replace(spans["batch"], parent_id=None)
    for index in range(count):
        at = 30 + 10 * (index // 4)
        made = item(f"q{index}", index, events=(event("released", at),))
        spans[made.span_id] = replace(made, start_ns=at * MS, end_ns=(at + 10) * MS)
    return list(spans.values())


def test_a_small_trace() -> None:
    """Everything in it, with offsets and lengths, on one axis: that of the batch."""
    assert lines(list(whole_trace().values())) == [
        "ask                                      −1.0 ms  110 ms  │███████████████████████████████",
        "└─ RunBatch  2 items, completed              0 s   99 ms  │███████████████████████████████",
        "   ├─ plan                                   0 s  1.0 ms  │█",
        "   └─ group smol                          1.0 ms   88 ms  │████████████████████████████",
        "      ├─ load                             2.0 ms   17 ms  │ █████",
        "      ├─ release  wave 0: 2                29 ms  200 µs  │         █",
        "      ├─ a  chat, 13 passes                29 ms   60 ms  │        ░▒▒█████████████████",
        "      └─ b  chat, 2 attempts, 13 passes    29 ms   60 ms  │        ░▒▒███░░░░▒▒▒▒██████",
        "         ├─ attempt 1  CONNECTION_LOST     29 ms   15 ms  │         █████",
        "         └─ attempt 2                      59 ms   30 ms  │                  ██████████",
    ]


def test_a_terminal_without_unicode() -> None:
    """Not a character in it that ASCII lacks, also where an item's name has one."""
    spans = whole_trace()
    spans["a"] = replace(spans["a"], attributes={**spans["a"].attributes, "unisono.item_id": "größe\n\x1b[31m"})
    drawn = "\n".join(lines(list(spans.values()), marks=ASCII))
    assert drawn.isascii()
    assert "\x1b" not in drawn
    assert "gr??e" in drawn
    assert "`- attempt 2" in drawn


def test_a_large_trace_stays_readable() -> None:
    """As many items as were asked for, all along the batch; how many were at the backend, and how many not shown."""
    drawn = lines(large(1000), items=40)
    assert sum("chat" in line for line in drawn) == 40
    assert drawn[-1].endswith("└─ … and 960 more items")
    (crowd,) = [line for line in drawn if "at the backend: up to 4" in line]
    assert "█" * 30 in crowd
    bars = [line.partition("│")[2] for line in drawn if "chat" in line]
    starts = [len(bar) - len(bar.lstrip()) for bar in bars]
    assert starts == sorted(starts)
    assert starts[-1] > 30


def test_what_is_left_out_of_the_trace_is_said() -> None:
    """Items and releases above the limit have no span; the items' time is told where the service tells it."""
    spans = whole_trace()
    attributes = {**spans["group"].attributes, "unisono.items_left_out": 500, "unisono.waves_left_out": 1}
    spans["group"] = replace(spans["group"], attributes=attributes)
    drawn = lines(list(spans.values()))
    assert drawn[-2].endswith("├─ … and 500 items without a span of their own")
    assert drawn[-1].endswith("└─ … and 1 release without a span of their own")
    more = {"unisono.items_left_out": 500}
    spans["more"] = span("more", "group", 60, 90, name="items left out", attributes=more)
    drawn = lines(list(spans.values()), 130)
    assert "├─ items left out  500 without a span " in drawn[-2]
    assert drawn[-1].endswith("└─ … and 1 release without a span of their own")


def test_what_went_wrong_is_shown_before_the_rest() -> None:
    """A failed item far at the end, one that was retried, and one that a finding is about, are not left out."""
    spans = large(400)
    by_name = {each.span_id: place for place, each in enumerate(spans)}
    failed = spans[by_name["q390"]]
    spans[by_name["q390"]] = replace(failed, is_error=True, status_message="RUNNER_DIED")
    retried = spans[by_name["q391"]]
    spans[by_name["q391"]] = replace(retried, attributes={**retried.attributes, "unisono.attempts": 3})
    rows = draw_tree(spans, 100, items=8, wrong={"q377"})
    shown = {row.span_id for row in rows}
    assert {"q377", "q390", "q391"} <= shown
    assert {row.span_id for row in rows if row.is_wrong} == {"q377", "q390"}
    assert len(shown & set(by_name) - {"batch", "plan", "group", "load", "release"}) == 8


def test_only_failures() -> None:
    """Where all items failed, as many are shown as were asked for."""
    spans = [replace(each, is_error=each.is_item) for each in large(100)]
    assert sum("chat" in line for line in lines(spans, items=10)) == 10


def test_many_releases_are_counted() -> None:
    """The first few are shown."""
    spans = whole_trace()
    for wave in range(1, 30):
        attributes = {"unisono.wave": wave, "unisono.items": 2, "unisono.others": 1}
        made = replace(spans["release"], span_id=f"release {wave}", start_ns=(30 + wave) * MS, attributes=attributes)
        spans[made.span_id] = made
    drawn = lines(list(spans.values()), 120)
    assert sum("─ release" in line for line in drawn) == 8
    assert any("wave 1: 2, 1 of others" in line for line in drawn)
    assert drawn[-1].endswith("… and 22 more releases")


def test_an_item_that_never_went() -> None:
    """It waited all the time, and its bar says so; one that was never staged is a point."""
    spans = whole_trace()
    attributes = {"unisono.index": 5, "unisono.state": "cancelled", "unisono.item_id": "c"}
    spans["a"] = replace(spans["a"], events=())
    spans["c"] = span("c", "group", 80, 80, name="item", attributes=attributes)
    drawn = lines(list(spans.values()))
    (waited,) = [line for line in drawn if "─ a  chat" in line]
    assert set(waited.partition("│")[2].strip()) == {"░"}
    (never,) = [line for line in drawn if "─ c  cancelled" in line]
    assert never.partition("│")[2].strip() == "█"


def test_nothing_to_draw() -> None:
    """No spans, no rows; and a trace whose spans take no time has bars all the same."""
    assert lines([]) == []
    (only,) = lines([span("x", None, 5, 5)])
    assert only.endswith("│█")


@pytest.mark.parametrize("parents", [{"batch": "batch"}, {"caller": "group"}, {"group": "a", "plan": "plan"}])
def test_spans_that_are_their_own_ancestors_are_all_drawn(parents: dict[str, str]) -> None:
    """Each once, wherever the cycle begins."""
    spans = whole_trace()
    for name, parent in parents.items():
        spans[name] = replace(spans[name], parent_id=parent)
    drawn = [row.span_id for row in draw_tree(list(spans.values()), 90)]
    assert sorted(drawn) == sorted(spans)


def test_a_trace_as_deep_as_nobody_reads() -> None:
    """Ten thousand spans, each below the one before."""
    deep = [span(f"s{depth}", f"s{depth - 1}" if depth else None, 0, 1) for depth in range(10_000)]
    drawn = lines(deep)
    assert len(drawn) == 66
    assert drawn[-1].endswith("… and what is below")
