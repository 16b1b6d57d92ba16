"""What is wrong with the trace of a batch: spans in, findings out. Nothing is asked, nothing is printed.

A trace may hold several batches, of a caller that sent them in one trace of its own; each is checked by itself, and
what concerns all spans is checked of all. Times are compared with a tolerance: some stores cut beginnings and
lengths to whole microseconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import pairwise

from unisono.core.durations import format_duration
from unisono.edge.cli.trace_spans import Event, Span, whole

# Times of one process are off by so much at most; clocks of machines that keep time by more than this are skewed.
_TOLERANCE_NS = 5_000
_SKEW_NS = 1_000_000
# A text that stands for a setting or a reason is shorter; an item's id may be as long as its caller likes.
_LONG_TEXT = 512
_MAY_BE_LONG = ("unisono.item_id", "gen_ai.request.stop_sequences", "exception.stacktrace")
# Where Jaeger puts what it has to say of a span.
_WARNINGS = "@jaeger@warnings"
# Ids are their callers': what is in them was put there for all to see.
_IDS = frozenset({"unisono.item_id", "unisono.batch_id"})
_CONTENT = (
    "gen_ai.input.messages",
    "gen_ai.output.messages",
    "gen_ai.system_instructions",
    "gen_ai.prompt",
    "gen_ai.completion",
    "unisono.error_message",
)


class Kind(StrEnum):
    """What can be wrong."""

    NO_BATCH = "no_batch"
    ORPHAN = "orphan"
    PARENT_CYCLE = "parent_cycle"
    NO_BATCH_ID = "no_batch_id"
    NO_PLAN = "no_plan"
    NO_GROUP = "no_group"
    NO_RELEASE = "no_release"
    NO_OUTCOME = "no_outcome"
    ITEM_COUNT = "item_count"
    OUTSIDE_PARENT = "outside_parent"
    OVERLAPPING_ATTEMPTS = "overlapping_attempts"
    NO_WAVE_LINK = "no_wave_link"
    CONTENT = "content"
    CLOCK_SKEW = "clock_skew"
    NO_DESCRIPTION = "no_description"
    STORE_WARNING = "store_warning"


# What spans that are still on their way would mend.
_MAY_BE_LATE = frozenset({Kind.NO_BATCH, Kind.ORPHAN, Kind.NO_PLAN, Kind.NO_GROUP, Kind.NO_RELEASE, Kind.ITEM_COUNT})

_DROPPED = "The span was lost, or a sampler on the way drops spans one by one: let it keep or drop whole traces."
_REMEDIES = {
    Kind.NO_BATCH: "Is the batch still running? Its own span is sent at its end. Else the id is of another trace.",
    Kind.ORPHAN: "Spans were lost or are not there yet: look in the service's log for traces that cannot be "
    "delivered, and raise OTEL_BSP_MAX_QUEUE_SIZE where its queue was full.",
    Kind.PARENT_CYCLE: "The spans of a trace form a tree: a processor on the way may have changed ids or parents.",
    Kind.NO_BATCH_ID: "What made this span is not this service, or a processor on the way removes attributes.",
    Kind.NO_PLAN: _DROPPED,
    Kind.NO_GROUP: _DROPPED,
    Kind.NO_RELEASE: _DROPPED,
    Kind.NO_OUTCOME: "The service did not say how the item ended, which is a defect: please report it, with the log.",
    Kind.ITEM_COUNT: "Item spans were lost: raise OTEL_BSP_MAX_QUEUE_SIZE, or lower UNISONO_TRACE_ITEMS.",
    Kind.OUTSIDE_PARENT: "The service gave wrong times, which is a defect: please report it, with this trace.",
    Kind.OVERLAPPING_ATTEMPTS: "An item ran twice at one time, which is a defect: please report it, with this trace.",
    Kind.NO_WAVE_LINK: "The items cannot be followed to the wave that they went out with: was a processor on the "
    "way told to remove links?",
    Kind.CONTENT: "Unset OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT unless texts are meant to be stored.",
    Kind.CLOCK_SKEW: "The machines' clocks differ: let both keep time by NTP.",
    Kind.STORE_WARNING: "Jaeger changed what it was sent, or doubts it: its page shows this beside the span.",
    Kind.NO_DESCRIPTION: "A span that failed must say why: a processor on the way may remove it.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    kind: Kind
    # What, in a sentence.
    what: str
    # The spans that it is about, the first few where there are many.
    span_ids: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return _REMEDIES[self.kind]

    @property
    def may_be_late(self) -> bool:
        """Whether spans that have not arrived yet may be all that is missing."""
        return self.kind in _MAY_BE_LATE


def check(spans: Sequence[Span], *, texts: Collection[str] = ()) -> tuple[Finding, ...]:
    """What is wrong with these spans of one trace; nothing, where that is so.

    `texts` are words of prompts and answers that must not be in any attribute.
    """
    tree = Tree(spans)
    findings: list[Finding] = []
    if not tree.batches:
        what = "No span of a batch is in the trace." if spans else "The trace has no spans."
        findings.append(Finding(kind=Kind.NO_BATCH, what=what))
    findings += _orphans(tree)
    findings += _gather(Kind.PARENT_CYCLE, tree.cycles, lambda names: f"{names} stand below themselves")
    for batch in tree.batches:
        findings += _check_batch(batch, tree)
    findings += _times(tree)
    findings += _texts(spans, texts)
    findings += _warnings(spans)
    findings += _gather(
        Kind.NO_DESCRIPTION,
        [span for span in spans if span.is_error and not span.status_message],
        lambda names: f"{names} failed and say not why",
    )
    return tuple(findings)


class Tree:
    """Spans under their parents, whatever these are said to be: each is found below exactly one root."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self._by_id = {(span.trace_id, span.span_id): span for span in spans}
        self.batches = [span for span in spans if span.is_batch]
        # Of spans that are their own ancestors, the first of each cycle: it stands here without its parent.
        self.cycles = _first_of_cycles(self._by_id)
        self._cut = {(span.trace_id, span.span_id) for span in self.cycles}
        # Spans whose parent is not here.
        self.roots: list[Span] = []
        self._below: dict[tuple[str, str], list[Span]] = {}
        for span in spans:
            parent = self.parent(span)
            below = self.roots if parent is None else self._below.setdefault((parent.trace_id, parent.span_id), [])
            below.append(span)

    def parent(self, span: Span) -> Span | None:
        """The span that one is right under; None: it is not here."""
        if (span.trace_id, span.span_id) in self._cut:
            return None
        return _parent(span, self._by_id)

    def children(self, span: Span) -> Sequence[Span]:
        """The spans right under one, in the order of their beginning."""
        return self._below.get((span.trace_id, span.span_id), ())

    def walk(self, span: Span) -> Iterator[Span]:
        """All spans below one, but for those of other batches."""
        waiting = list(reversed(self.children(span)))
        while waiting:
            here = waiting.pop()
            if not here.is_batch:
                yield here
                waiting += reversed(self.children(here))


def _parent(span: Span, by_id: Mapping[tuple[str, str], Span]) -> Span | None:
    return by_id.get((span.trace_id, span.parent_id)) if span.parent_id is not None else None


def _first_of_cycles(by_id: Mapping[tuple[str, str], Span]) -> list[Span]:
    """Of spans that are their own ancestors, one of each cycle: the one that began first."""
    found: list[Span] = []
    done: set[tuple[str, str]] = set()
    for span in by_id.values():
        path: dict[tuple[str, str], Span] = {}
        here: Span | None = span
        while here is not None and (key := (here.trace_id, here.span_id)) not in done:
            if key in path:
                cycle = list(path.values())[list(path).index(key) :]
                found.append(min(cycle, key=lambda one: one.start_ns))
                break
            path[key] = here
            here = _parent(here, by_id)
        done |= path.keys()
    return found


def name_of(span: Span) -> str:
    """A span as a finding names it."""
    if span.is_item:
        return f"item {span.text('unisono.item_id') or span.count('unisono.index')}"
    return span.name


def _gather(kind: Kind, spans: Sequence[Span], what: Callable[[str], str]) -> list[Finding]:
    """One finding for all spans with which the same is wrong; `what` makes a sentence of their names."""
    if not spans:
        return []
    counted = Counter(name_of(span) for span in spans)
    names = ", ".join(name if count == 1 else f"{count} × {name}" for name, count in list(counted.items())[:3])
    more = f" and {len(counted) - 3:,} more" if len(counted) > 3 else ""
    text = f"{what(names + more)}."
    return [Finding(kind=kind, what=text, span_ids=tuple(span.span_id for span in spans[:20]))]


# -- Connected -------------------------------------------------------------------------------------------------


def _orphans(tree: Tree) -> list[Finding]:
    """A batch's own span may have a parent elsewhere: its caller sends traces to its own place, or to none."""
    cut = {span.span_id for span in tree.cycles}
    lost = [
        span for span in tree.roots if span.parent_id is not None and not span.is_batch and span.span_id not in cut
    ]
    parents = len({span.parent_id for span in lost})
    are_missing = f"{parents} parent{'s are' if parents > 1 else ' is'} missing"
    return _gather(Kind.ORPHAN, lost, lambda names: f"{are_missing}, of {names}")


def _check_batch(batch: Span, tree: Tree) -> Iterator[Finding]:
    name = batch.text("unisono.batch_id")
    if not name:
        yield Finding(
            kind=Kind.NO_BATCH_ID, what=f"The span {batch.name} has no batch id.", span_ids=(batch.span_id,)
        )
    below = list(tree.walk(batch))
    items = [span for span in below if span.is_item]
    groups = [span for span in below if _is_group(span)]
    # Items that nobody could be asked for have no group, and a batch of such alone no plan.
    has_run = batch.count("unisono.items_completed") > 0 or any(_has_run(item) for item in items)
    if has_run and not any(span.name == "plan" for span in tree.children(batch)):
        yield Finding(kind=Kind.NO_PLAN, what="The batch has no plan span.", span_ids=(batch.span_id,))
    strays = [item for item in items if _has_run(item) and not _is_group(tree.parent(item) or batch)]
    if strays:
        yield from _gather(Kind.NO_GROUP, strays, lambda names: f"{names} ran outside any group")
    elif has_run and not groups:
        yield from _gather(Kind.NO_GROUP, [batch], lambda name: f"{name} has no group span")
    for group in groups:
        yield from _check_waves(group, tree.children(group))
    without = [item for item in items if not item.text("unisono.state")]
    yield from _gather(Kind.NO_OUTCOME, without, lambda names: f"{names} have no outcome")
    yield from _count(batch, items, [batch, *groups])
    for item in items:
        yield from _check_attempts(item, [span for span in tree.children(item) if span.is_attempt])


def _is_group(span: Span) -> bool:
    return span.name.startswith("group ") and "unisono.group" in span.attributes


def _has_run(item: Span) -> bool:
    return any(event.name == "released" for event in item.events)


def _count(batch: Span, items: Sequence[Span], parents: Iterable[Span]) -> Iterator[Finding]:
    """Items above the limit have no span; how many these are stands on their groups, or on the batch."""
    expected = batch.attributes.get("unisono.items")
    if not isinstance(expected, int):
        return
    left_out = sum(parent.count("unisono.items_left_out") for parent in parents)
    if len(items) + left_out != expected:
        sampled = f", and {left_out:,} are said to be left out" if left_out else ""
        yield Finding(
            kind=Kind.ITEM_COUNT,
            what=f"The batch had {expected:,} items; {len(items):,} have a span{sampled}.",
            span_ids=(batch.span_id,),
        )


# -- Waves and attempts ----------------------------------------------------------------------------------------


def _check_waves(group: Span, children: Sequence[Span]) -> Iterator[Finding]:
    """Every wave that an item went out with has a span, but for refills of one item; and items link to the wave's.

    Where others shared the wave, one release span of all stands for it. The items of that batch are in its own trace;
    those of the others link there.
    """
    releases = {span.count("unisono.wave"): span for span in children if span.name == "release"}
    waves: dict[int, list[tuple[Span, Event]]] = {}
    for item in children:
        for event in item.events if item.is_item else ():
            if event.name == "released":
                waves.setdefault(event_wave(event), []).append((item, event))
    is_whole = not group.count("unisono.waves_left_out")
    missing = [wave for wave, went in waves.items() if wave not in releases and (wave == 0 or len(went) > 1)]
    if is_whole and missing:
        which = ", ".join(map(str, sorted(missing)[:5]))
        what = f"{group.name} has no release span for wave {which}" + (" and others." if len(missing) > 5 else ".")
        yield Finding(kind=Kind.NO_RELEASE, what=what, span_ids=(group.span_id,))
    for wave, release in releases.items():
        if not release.count("unisono.others"):
            continue
        unlinked = [item for item, event in waves.get(wave, ()) if not _is_linked(item, event)]
        stands = release.attributes.get("unisono.stands_for_wave")
        is_linked = stands is False or (stands is None and len(unlinked) < len(waves.get(wave, ())))
        if is_linked:
            yield from _gather(
                Kind.NO_WAVE_LINK,
                unlinked,
                lambda names: f"{names} went out with other callers' items and have no link to that wave",
            )


def event_wave(event: Event) -> int:
    """The number of the wave that an item was released with."""
    return whole(event.attributes.get("unisono.wave"), 0)


def _is_linked(item: Span, event: Event) -> bool:
    # Some stores keep a link without its attributes; then it may be of any attempt.
    return any(link.attributes.get("unisono.attempt", event.attempt) == event.attempt for link in item.links)


def _check_attempts(item: Span, attempts: Sequence[Span]) -> Iterator[Finding]:
    """Attempts follow one another: by their spans, and by the events of the item."""
    overlapping = [later for one, later in pairwise(attempts) if later.start_ns < one.end_ns - _TOLERANCE_NS]
    turns = [event for event in item.events if event.name in {"released", "retry", "broken_off"}]
    is_twice = any(
        one.name == later.name == "released" and one.at_ns <= later.at_ns for one, later in pairwise(turns)
    )
    if overlapping or is_twice:
        yield from _gather(Kind.OVERLAPPING_ATTEMPTS, [item], lambda name: f"Attempts of {name} overlap")


# -- Times and texts -------------------------------------------------------------------------------------------


def _times(tree: Tree) -> Iterator[Finding]:
    """A child lies within its parent. Between two processes, what does not is their clocks."""
    outside: list[Span] = []
    skewed: dict[tuple[str, str], int] = {}
    spans_of: dict[tuple[str, str], list[Span]] = {}
    for span in tree.spans:
        parent = tree.parent(span)
        if parent is None:
            continue
        off_ns = max(parent.start_ns - span.start_ns, span.end_ns - parent.end_ns)
        if (parent.service, parent.instance) == (span.service, span.instance):
            if off_ns > _TOLERANCE_NS:
                outside.append(span)
        # A caller that left before the end has an early end itself, so only beginnings tell of the clocks.
        elif (early_ns := parent.start_ns - span.start_ns) > _SKEW_NS:
            pair = (parent.service or "?", span.service or "?")
            skewed[pair] = max(skewed.get(pair, 0), early_ns)
            spans_of.setdefault(pair, []).append(span)
    yield from _gather(
        Kind.OUTSIDE_PARENT, outside, lambda names: f"{names} began before or ended after what they are part of"
    )
    for (one, other), off_ns in skewed.items():
        what = f"{other} is at least {format_duration(off_ns / 1e9)} behind {one}: what it was asked, it did before."
        ids = tuple(span.span_id for span in spans_of[one, other][:20])
        yield Finding(kind=Kind.CLOCK_SKEW, what=what, span_ids=ids)


def _warnings(spans: Sequence[Span]) -> Iterator[Finding]:
    """What Jaeger itself says of a span; one finding for all that begin alike, up to their first figure."""
    found: dict[str, list[Span]] = {}
    for span in spans:
        said = span.attributes.get(_WARNINGS)
        for warning in said if isinstance(said, tuple) else (said,):
            if isinstance(warning, str):
                found.setdefault(re.split(r"[:,.\d]", warning, maxsplit=1)[0].strip(), []).append(span)
    for warning, holders in found.items():
        yield from _gather(Kind.STORE_WARNING, holders, partial("Jaeger warns of {1}: {0}".format, warning))


def _texts(spans: Sequence[Span], texts: Collection[str]) -> Iterator[Finding]:
    """Texts of prompts and answers: by the attribute's name, by the words, or because nothing else is that long."""
    found: dict[str, list[Span]] = {}
    for span in spans:
        for attributes in (span.attributes, *(event.attributes for event in span.events)):
            for name, value in attributes.items():
                if _is_content(name, value, texts, is_ours=name.startswith(("unisono.", "gen_ai."))):
                    found.setdefault(name, []).append(span)
    for name, holders in found.items():
        where = f"{name} holds text of a prompt or an answer, in"
        yield from _gather(Kind.CONTENT, holders, partial("{} {}".format, where))


def _is_content(name: str, value: object, texts: Collection[str], *, is_ours: bool) -> bool:
    if name in _CONTENT:
        return True
    may_be_long = not is_ours or name in _MAY_BE_LONG
    strings = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, str)]
    return any(
        (name not in _IDS and any(text in one for text in texts))
        or (not may_be_long and (len(one) > _LONG_TEXT or "\n" in one))
        for one in strings
    )
