"""The tree of a trace, with a bar for each span on one axis of time: what ran side by side stands one below another.

    RunBatch  3 items, completed             0 s  126 ms  │████████████████████████████████
    ├─ plan                                  0 s  1.0 ms  │█
    └─ group smol                         1.0 ms  125 ms  │ ███████████████████████████████
       ├─ load                            1.1 ms   50 ms  │ ████████████
       ├─ release  3 requests              53 ms   80 µs  │             █
       ├─ q-1  chat, 21 passes             52 ms   70 ms  │             ░▒██████████████
       ├─ q-2  chat, 9 passes              52 ms   31 ms  │             ░▒█████
       └─ … and 1 more item

An item's bar is light until its request was released, and half light until its first token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from unisono.core.durations import format_duration
from unisono.edge.cli.terminal import printable
from unisono.edge.cli.trace_check import Tree
from unisono.edge.cli.trace_spans import BATCH_PREFIX, Span

DEFAULT_ITEMS = 40
# Of releases, loads and plans, so many under one parent.
_MAX_OTHERS = 8
_MAX_LABEL = 46
_MIN_BAR = 20
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


UNICODE = Marks(full="█", half="▒", light="░", rule="│", child="├─ ", last="└─ ", below="│  ", more="…", micro="µ")
ASCII = Marks(full="#", half="=", light=".", rule="|", child="|- ", last="`- ", below="|  ", more="...", micro="u")


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
    """The rows; at most so many items: before others those that are `wrong` (by span id), failed, or were retried."""
    if not spans:
        return []
    tree = Tree(spans)
    drawing = _Drawing(tree, marks=marks, shown=_choose(spans, items, wrong), wrong=wrong)
    lines = [line for root in tree.roots for line in drawing.lines(root, "", "", 0)]
    labels = [label for label, *_ in lines]
    times = [drawing.times(span) if span else ("", "") for _, span, _ in lines]
    columns = (
        min(_MAX_LABEL, max(map(len, labels))),
        max(len(start) for start, _ in times),
        max(len(length) for _, length in times),
    )
    room = max(_MIN_BAR, width - sum(columns) - 7)
    rows = []
    for (label, span, depth), (start, length) in zip(lines, times, strict=True):
        if span is None:
            rows.append(Row(label=label, depth=depth))
            continue
        cut = label if len(label) <= columns[0] else label[: columns[0] - len(marks.more)] + marks.more
        left = f"{cut:<{columns[0]}}  {start:>{columns[1]}}  {length:>{columns[2]}}  {marks.rule}"
        is_wrong = span.is_error or span.span_id in wrong
        bar = drawing.bar(span, room)
        rows.append(Row(label=left, bar=bar, is_wrong=is_wrong, span_id=span.span_id, depth=depth))
    return rows


def _choose(spans: Sequence[Span], limit: int, wrong: Collection[str]) -> set[str]:
    """The items that are shown."""
    found = [span for span in spans if span.is_item]
    # What is told of stands first, and for the rest the order of their beginning.
    found.sort(key=lambda span: (span.span_id not in wrong, not span.is_error, span.count("unisono.attempts") < 2))
    return {span.span_id for span in found[:limit]}


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

    def lines(self, span: Span, lead: str, below: str, depth: int) -> Iterator[tuple[str, Span | None, int]]:
        """A span and what is under it: the label, the span (None: others left out), how deep."""
        yield lead + self._label(span), span, depth
        children, left_out = self._children(span)
        count = len(children) + len(left_out)
        for place, entry in enumerate([*children, *left_out], start=1):
            is_last = place == count
            mark = self._marks.last if is_last else self._marks.child
            if isinstance(entry, str):
                yield f"{below}{mark}{self._marks.more} {entry}", None, depth + 1
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
        if left_out := span.count("unisono.items_left_out"):
            words.append(f"and {left_out:,} item{'s' if left_out > 1 else ''} without a span of their own")
        if left_out := span.count("unisono.waves_left_out"):
            words.append(f"and {left_out:,} release{'s' if left_out > 1 else ''} without a span of their own")
        return shown, words

    def _label(self, span: Span) -> str:
        facts = ", ".join(_facts(span))
        label = printable(f"{_name(span)}  {facts}".rstrip() if facts else _name(span), one_line=False)
        label = label.replace("\n", " ").replace("\t", " ")
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
            yield at_ns, event.at_ns, getattr(self._marks, before)
            at_ns, mark = event.at_ns, getattr(self._marks, after)
        yield at_ns, span.end_ns, mark


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
        yield f"{span.count('unisono.items'):,} items"
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
    elif span.name == "release":
        yield f"{span.count('unisono.items'):,} of wave {span.count('unisono.wave')}"
        if others := span.count("unisono.others"):
            yield f"{others:,} of other callers"
    elif broken_off_by := span.text("unisono.broken_off_by"):
        yield f"broken off: {broken_off_by}"
    if reason:
        yield reason
