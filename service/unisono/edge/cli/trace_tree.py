"""The tree of a trace, with a bar for each span on one axis of time: what ran side by side stands one below another.

    RunBatch  3 items, completed             0 s  126 ms  │████████████████████████████████
    ├─ plan                                  0 s  1.0 ms  │█
    └─ group smol                         1.0 ms  125 ms  │ ███████████████████████████████
       ├─ load                            1.1 ms   50 ms  │ ████████████
       ├─ release  wave 0: 3               53 ms   80 µs  │             █
       ├─ q-1  chat, 21 passes             53 ms   70 ms  │            ░▒██████████████
       ├─ q-2  chat, 9 passes              53 ms   31 ms  │            ░▒█████
       └─ … and 1 more item

An item's bar is light while its request was held, which is before its span began, and half light until its first
token. Where not all items are
drawn, a row of the group tells how many of those with a span were at the backend at one time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import NamedTuple

from unisono.core.durations import format_duration
from unisono.edge.cli.terminal import printable
from unisono.edge.cli.trace_check import Tree
from unisono.edge.cli.trace_spans import BATCH_PREFIX, Span

DEFAULT_ITEMS = 40
# Of releases, loads and plans, so many under one parent.
_MAX_OTHERS = 8
# Spans below one another.
_MAX_DEPTH = 64
_MIN_LABEL = 32
_MIN_BAR = 20
# The span that lasts as long as items took that have none of their own.
LEFT_OUT = "items left out"
_RANKS = {"plan": 0, "load": 1, "release": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The characters of a drawing."""

    full: str
    half: str
    light: str
    rule: str
    # Before a child, the last child, and below each of these.
    child: str
    last: str
    below: str
    more: str
    micro: str
    # How much of the most: nothing, little … all.
    levels: str


UNICODE = Marks(
    full="█",
    half="▒",
    light="░",
    rule="│",
    child="├─ ",
    last="└─ ",
    below="│  ",
    more="…",
    micro="µ",
    levels=" ▁▂▃▄▅▆▇█",
)
ASCII = Marks(
    full="#",
    half="=",
    light=".",
    rule="|",
    child="|- ",
    last="`- ",
    below="|  ",
    more="...",
    micro="u",
    levels=" 123456789",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the drawing; one that stands for what is left out has no bar."""

    label: str
    bar: str = ""
    # Whether something is wrong with the span, or it failed.
    is_wrong: bool = False
    span_id: str = ""
    depth: int = 0


def draw_tree(
    spans: Sequence[Span],
    width: int,
    *,
    marks: Marks = UNICODE,
    items: int = DEFAULT_ITEMS,
    wrong: Collection[str] = (),
) -> list[Row]:
    """The rows; at most so many items: first of all those that are `wrong` (by span id), failed, or were retried."""
    if not spans:
        return []
    tree = Tree(spans)
    drawing = _Drawing(tree, marks=marks, shown=_choose(spans, items, wrong), wrong=wrong)
    lines = [line for root in tree.roots for line in drawing.lines(root, "", "", 0)]
    times = [drawing.times(line.span) if line.span else ("", "") for line in lines]
    columns = (
        min(max(_MIN_LABEL, width * 45 // 100), max(len(line.label) for line in lines if line.span or line.crowd)),
        max(len(start) for start, _ in times),
        max(len(length) for _, length in times),
    )
    room = max(_MIN_BAR, width - sum(columns) - 7)
    rows = []
    for line, (start, length) in zip(lines, times, strict=True):
        span = line.span
        if span is None and not line.crowd:
            rows.append(Row(label=line.label, depth=line.depth))
            continue
        cut = line.label
        if len(cut) > columns[0]:
            cut = cut[: columns[0] - len(marks.more)] + marks.more
        left = f"{cut:<{columns[0]}}  {start:>{columns[1]}}  {length:>{columns[2]}}  {marks.rule}"
        if span is None:
            rows.append(Row(label=left, bar=drawing.crowd(line.crowd, room), depth=line.depth))
            continue
        is_wrong = span.is_error or span.span_id in wrong
        bar = drawing.bar(span, room)
        rows.append(Row(label=left, bar=bar, is_wrong=is_wrong, span_id=span.span_id, depth=line.depth))
    return rows


def _choose(spans: Sequence[Span], limit: int, wrong: Collection[str]) -> set[str]:
    """The items that are shown."""
    items = [span for span in spans if span.is_item]
    # What is told of stands first, then what went wrong, of both at most half where there is something else to show.
    striking = [span for span in items if _strikes(span) or span.span_id in wrong]
    striking.sort(key=lambda span: span.span_id not in wrong)
    usual = [span for span in items if not _strikes(span) and span.span_id not in wrong]
    first = striking[: max(limit - len(usual), (limit + 1) // 2)]
    room = limit - len(first)
    # Of the rest, all along the batch: the first few would stand on one another at the left end of the axis.
    step = max(1.0, len(usual) / room) if room else 1.0
    rest = [usual[int(place * step)] for place in range(min(room, len(usual)))]
    return {span.span_id for span in (*first, *rest)}


def _strikes(item: Span) -> bool:
    return item.is_error or item.count("unisono.attempts") + item.count("unisono.disturbed") > 1


class _Line(NamedTuple):
    """A line before its columns are known: of a span, of how many items were where, or of words alone."""

    label: str
    depth: int
    span: Span | None = None
    # The items that are counted.
    crowd: Sequence[Span] = ()


class _Drawing:
    """What all lines share."""

    def __init__(self, tree: Tree, *, marks: Marks, shown: set[str], wrong: Collection[str]) -> None:
        self._tree = tree
        self._marks = marks
        self._shown = shown
        self._wrong = wrong
        # The axis is that of the batches: a caller may have begun long before, and end long after.
        framed = tree.batches or tree.spans
        self._start_ns = min(span.start_ns for span in framed)
        self._length_ns = max(1, max(span.end_ns for span in framed) - self._start_ns)

    def lines(self, span: Span, lead: str, below: str, depth: int) -> Iterator[_Line]:
        """A span and what is under it."""
        yield _Line(lead + self._label(span), depth, span)
        if depth >= _MAX_DEPTH and self._tree.children(span):
            yield _Line(f"{below}{self._marks.last}{self._marks.more} and what is below", depth + 1)
            return
        children, left_out = self._children(span)
        items = [child for child in self._tree.children(span) if child.is_item]
        # What stands for items comes after them.
        last = [child for child in children if child.name == LEFT_OUT]
        entries: list[Span | str | None] = [child for child in children if not child.is_item and child not in last]
        if any(item.span_id not in self._shown for item in items):
            entries.append(None)
        entries += [child for child in children if child.is_item]
        entries += [*last, *left_out]
        for place, entry in enumerate(entries, start=1):
            is_last = place == len(entries)
            mark = self._marks.last if is_last else self._marks.child
            if entry is None:
                yield _Line(f"{below}{mark}at the backend: up to {self._most(items):,}", depth + 1, crowd=items)
            elif isinstance(entry, str):
                yield _Line(f"{below}{mark}{self._marks.more} {entry}", depth + 1)
            else:
                deeper = below + (" " * len(self._marks.below) if is_last else self._marks.below)
                yield from self.lines(entry, below + mark, deeper, depth + 1)

    def _children(self, span: Span) -> tuple[list[Span], list[str]]:
        """What is shown under a span, in order; and, in words, what is not."""
        children = sorted(self._tree.children(span), key=lambda child: (_rank(child), child.start_ns))
        shown: list[Span] = []
        hidden: dict[str, int] = {}
        seen: dict[str, int] = {}
        for child in children:
            if child.is_item:
                is_shown = child.span_id in self._shown
            else:
                seen[child.name] = seen.get(child.name, 0) + 1
                is_shown = seen[child.name] <= _MAX_OTHERS or child.span_id in self._wrong or child.is_error
            if is_shown:
                shown.append(child)
            else:
                name = "item" if child.is_item else child.name
                hidden[name] = hidden.get(name, 0) + 1
        words = [f"and {count:,} more {name}{'s' if count > 1 else ''}" for name, count in hidden.items()]
        is_told = any(child.name == LEFT_OUT for child in children)
        if (left_out := span.count("unisono.items_left_out")) and not is_told and span.name != LEFT_OUT:
            words.append(f"and {left_out:,} item{'s' if left_out > 1 else ''} without a span of their own")
        if left_out := span.count("unisono.waves_left_out"):
            words.append(f"and {left_out:,} release{'s' if left_out > 1 else ''} without a span of their own")
        return shown, words

    def _label(self, span: Span) -> str:
        facts = ", ".join(filter(None, _facts(span)))
        label = "  ".join(printable(part, one_line=True) for part in (_name(span), facts) if part)
        return label if self._marks is UNICODE else label.encode("ascii", "replace").decode()

    def times(self, span: Span) -> tuple[str, str]:
        """When a span began, and how long it took."""
        return self._time(span.start_ns - self._start_ns), self._time(span.end_ns - span.start_ns)

    def _time(self, span_ns: int) -> str:
        text = format_duration(span_ns / 1e9).replace("µ", self._marks.micro)
        return text if self._marks is UNICODE else text.replace("−", "-")

    def bar(self, span: Span, room: int) -> str:
        """A span's bar on the axis; at least one character, and cut where it leaves the axis."""
        cells = [" "] * room
        for start_ns, end_ns, mark in self._phases(span):
            first = self._cell(start_ns, room)
            # A phase ends where the next begins, and the last one has at least a cell.
            for cell in range(first, max(first + 1, self._cell(end_ns, room, is_end=True))):
                cells[cell] = mark
        return "".join(cells).rstrip()

    def crowd(self, items: Sequence[Span], room: int) -> str:
        """How many of these items were at the backend, cell by cell: each cell's mean, as a part of the most."""
        stayed_ns = [0.0] * room
        cell_ns = self._length_ns / room
        for start_ns, end_ns in self._stays(items):
            first, last = (start_ns - self._start_ns) / cell_ns, (end_ns - self._start_ns) / cell_ns
            for cell in range(max(0, int(first)), min(room, int(last) + 1)):
                stayed_ns[cell] += max(0.0, min(last, cell + 1) - max(first, cell))
        most, levels = max(1, self._most(items)), self._marks.levels
        return "".join(levels[min(len(levels) - 1, ceil(share / most * (len(levels) - 1)))] for share in stayed_ns)

    def _most(self, items: Sequence[Span]) -> int:
        """The most that were there at one time; who comes as another goes is after it."""
        steps = sorted(step for start, end in self._stays(items) for step in ((start, 1), (end, -1)))
        return max(accumulate(change for _, change in steps), default=0)

    def _stays(self, items: Sequence[Span]) -> list[tuple[int, int]]:
        light = self._marks.light
        return [(start, end) for item in items for start, end, mark in self._phases(item) if mark != light]

    def _cell(self, at_ns: int, room: int, *, is_end: bool = False) -> int:
        cell = (at_ns - self._start_ns) * room / self._length_ns
        return min(max(round(cell), 0), room if is_end else room - 1)

    def _phases(self, span: Span) -> Iterator[tuple[int, int, str]]:
        """An item waits, is released, and speaks; so does each of its attempts. All else is of one piece."""
        at_ns, mark = span.start_ns, self._marks.full
        for event in span.events if span.is_item else ():
            if event.at_ns < at_ns or event.name not in _PHASES:
                continue
            before, after = _PHASES[event.name]
            held_ns = event.held_ns if event.name == "released" and mark == self._marks.full else 0
            yield min(at_ns, event.at_ns - held_ns), event.at_ns, getattr(self._marks, before)
            at_ns, mark = event.at_ns, getattr(self._marks, after)
        # A request that was staged and never went has waited all the time.
        never_went = span.is_item and span.kind == "CLIENT" and at_ns == span.start_ns and mark == self._marks.full
        yield at_ns, span.end_ns, self._marks.light if never_went else mark


# What an item's bar is drawn with before an event, and after it.
_PHASES = {
    "released": ("light", "half"),
    "first_token": ("half", "full"),
    "retry": ("full", "light"),
    "broken_off": ("full", "light"),
}


def _rank(span: Span) -> int:
    """The order in which things are told where several are under one: items last."""
    return 9 if span.is_item else _RANKS.get(span.name, 3)


def _name(span: Span) -> str:
    if span.is_item:
        return span.text("unisono.item_id") or f"item {span.count('unisono.index')}"
    if span.is_batch:
        return span.name.removeprefix(BATCH_PREFIX)
    return span.name


def _facts(span: Span) -> Iterator[str]:
    """What is worth a word beside the name."""
    reason = span.status_message or span.text("error.type")
    if span.is_batch:
        items = span.count("unisono.items")
        yield f"{items:,} item{'' if items == 1 else 's'}"
        yield span.text("unisono.state") or "not ended"
    elif span.is_item:
        if operation := span.text("gen_ai.operation.name"):
            yield operation
        if attempts := span.count("unisono.attempts") + span.count("unisono.disturbed"):
            if attempts > 1:
                yield f"{attempts} attempts"
            if passes := span.count("unisono.passes"):
                yield f"{passes:,} pass{'es' if passes > 1 else ''}"
        yield span.text("unisono.state") if span.text("unisono.state") != "completed" else ""
    elif span.name == LEFT_OUT:
        yield f"{span.count('unisono.items_left_out'):,} without a span"
    elif span.name == "release":
        yield f"wave {span.count('unisono.wave')}: {span.count('unisono.items'):,}"
        if others := span.count("unisono.others"):
            yield f"{others:,} of others"
    elif broken_off_by := span.text("unisono.broken_off_by"):
        yield f"broken off: {broken_off_by}"
    if reason:
        yield reason
