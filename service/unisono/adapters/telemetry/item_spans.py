"""The items of a batch → their spans.

An item's span is made when it ends, of what was remembered on its way; its id is chosen when its request is staged,
whose headers name it. See the head of trace.py for what stands on it, and when it begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from opentelemetry.trace import Link, SpanKind, StatusCode

from unisono.adapters.telemetry import conventions as names
from unisono.adapters.telemetry.content import encodable
from unisono.adapters.telemetry.items import failure_of, operation, request_attributes, result_attributes, tidy
from unisono.adapters.telemetry.spans import SHORTEST_NS, Parent, fail, finish
from unisono.core.errors import UnisonoError
from unisono.core.model import ItemState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.trace import Span, SpanContext

    from unisono.adapters.telemetry.items import Attributes
    from unisono.adapters.telemetry.spans import SpanMaker
    from unisono.core.commands import ReleaseReason
    from unisono.core.events import Result
    from unisono.core.model import Item

# What is remembered of an item on its way: events, as many as the SDK keeps of a span; attempts; and links.
MAX_REMEMBERED_EVENTS = 128
MAX_REMEMBERED_ATTEMPTS = 32
_MAX_REMEMBERED_LINKS = 32


class Attempt(NamedTuple):
    """One of several attempts of an item."""

    number: int
    start_ns: int
    end_ns: int
    attributes: Attributes
    # The reason for which it failed; None: it did not, or was broken off.
    error: str | None


class ItemTrace:
    """An item on its way: what its span is made of when it ends."""

    __slots__ = (
        "attempt",
        "began_ns",
        "events",
        "has_gone",
        "headers",
        "is_kept",
        "item",
        "links",
        "over",
        "parent",
        "released",
        "released_ns",
        "span_id",
        "staged_ns",
    )

    def __init__(self, item: Item, parent: Parent) -> None:
        self.item = item
        self.parent = parent
        # Whether it has a span in any case; its id then, else 0.
        self.is_kept = False
        self.span_id = 0
        self.headers: dict[str, str] = {}
        # When its first attempt began: when it went, or was staged where that failed; None: there was none yet.
        self.began_ns: int | None = None
        # Whether any of its attempts went: else it has made no call.
        self.has_gone = False
        self.attempt = 1
        # When its present attempt was staged, and when that went; None: it has none, or it has not gone.
        self.staged_ns: int | None = None
        self.released_ns: int | None = None
        # Attempts that failed or were broken off.
        self.over: list[Attempt] = []
        self.events: list[tuple[str, Attributes, int]] = []
        self.links: list[Link] = []
        # Of its last release: why it was the next, for which lane, and how long it was held.
        self.released: Attributes = {}

    def begin_attempt(self, attempt: int, at_ns: int) -> None:
        """It is staged, for the first time or again."""
        self.attempt = attempt
        if self.staged_ns is None:
            self.staged_ns = at_ns

    def go(self, at_ns: int) -> float:
        """It is released; how long it was held, in seconds."""
        self.released_ns = at_ns
        self.has_gone = True
        if self.began_ns is None:
            self.began_ns = at_ns
        return (at_ns - (at_ns if self.staged_ns is None else self.staged_ns)) / 1e9

    def start_ns(self, at_ns: int) -> int:
        """When its span begins, where it ends now: when its first attempt did."""
        known = self.began_ns if self.began_ns is not None else self.staged_ns
        return at_ns if known is None else known

    def end_attempt(self, at_ns: int, attributes: Attributes, error: str | None) -> None:
        """Its present attempt is over, if there is one; of very many, only the first are remembered.

        What was broken off while it was held is no attempt: nothing was asked.
        """
        start_ns = self.staged_ns if self.released_ns is None and error is not None else self.released_ns
        self.staged_ns = self.released_ns = None
        if start_ns is None:
            return
        if self.began_ns is None:
            self.began_ns = start_ns
        if len(self.over) < MAX_REMEMBERED_ATTEMPTS:
            said = {names.ATTEMPT: self.attempt, **attributes}
            self.over.append(Attempt(self.attempt, start_ns, at_ns, said, error))

    def add_event(self, name: str, attributes: Attributes, at_ns: int) -> None:
        """Says that something happened to it in its present attempt."""
        attributes[names.ATTEMPT] = self.attempt
        if len(self.events) < MAX_REMEMBERED_EVENTS:
            self.events.append((name, attributes, at_ns))

    def add_link(self, context: SpanContext) -> None:
        """Says that its present attempt belongs to something in another batch's trace."""
        if len(self.links) < _MAX_REMEMBERED_LINKS:
            self.links.append(Link(context, {names.ATTEMPT: self.attempt}))


class ItemSpans:
    """The items of one batch whose trace is recorded."""

    def __init__(self, maker: SpanMaker, *, item_limit: int, capture_content: bool) -> None:
        self._maker = maker
        self._capture_content = capture_content
        # Those on their way only.
        self._items: dict[int, ItemTrace] = {}
        # Those that were released last, and by the name of which release.
        self._going: list[ItemTrace] = []
        self._going_with: int | None = None
        # How many more may have a span, and how many more attempts.
        self._left = item_limit
        self._attempts_left = item_limit

    def staging(self, item: Item, parent: Parent, attempt: int, at_ns: int) -> Mapping[str, str]:
        """An attempt begins; answers the headers that make the backend part of the item's span."""
        known = self._items.get(item.index)
        if known is None:
            known = self._items[item.index] = ItemTrace(item, parent)
            self._left -= 1
            known.is_kept = self._left >= 0
            if known.is_kept:
                known.span_id = self._maker.ids.choose()
                known.headers = parent.headers_for(known.span_id)
            else:
                known.headers = parent.unsampled_headers(is_recording=True)
        known.begin_attempt(attempt, at_ns)
        return known.headers

    def released(
        self, index: int, *, wave: int, wave_key: int, at_ns: int, reason: ReleaseReason, lane: int | None
    ) -> None:
        """Adds the event `released`, with why the item was the next, for which lane, and how long it was held."""
        known = self._items.get(index)
        if known is None:
            return
        known.released = {names.RELEASE_REASON: reason.value}
        if lane is not None:
            known.released[names.LANE] = lane
        known.released[names.HELD_S] = tidy(known.go(at_ns))
        known.add_event("released", {names.WAVE: wave, **known.released}, at_ns)
        if self._going_with != wave_key:
            self._going_with, self._going = wave_key, []
        self._going.append(known)

    def link(self, wave_key: int, shared: SpanContext | None) -> None:
        """Links the items of this release to the span that another batch has made for it, if one has."""
        # Not when the items are told of: a bundle of several batches' items tells all of them first.
        if shared is not None and self._going_with == wave_key:
            for known in self._going:
                known.add_link(shared)
        self._going_with, self._going = None, []

    def first_token(self, index: int, at_ns: int) -> None:
        """Adds the event `first_token`."""
        known = self._items.get(index)
        if known is not None:
            known.add_event("first_token", {}, at_ns)

    def retried(
        self, index: int, *, attempt: int, error: UnisonoError, again_in_s: float, is_free: bool, at_ns: int
    ) -> None:
        """Adds the event `retry`, with the reason for which the attempt failed; or `broken_off`."""
        known = self._items.get(index)
        if known is None:
            return
        known.attempt = attempt
        if is_free:
            known.end_attempt(at_ns, {names.BROKEN_OFF_BY: error.reason}, None)
            if known.began_ns is not None:
                known.add_event("broken_off", {names.BROKEN_OFF_BY: error.reason}, at_ns)
            return
        known.end_attempt(at_ns, {names.AGAIN_IN_S: tidy(again_in_s)}, error.reason)
        attributes: Attributes = {names.ERROR_TYPE: error.reason, names.AGAIN_IN_S: tidy(again_in_s)}
        if self._capture_content:
            attributes[names.ERROR_MESSAGE] = encodable(error.message)
        known.add_event("retry", attributes, at_ns)

    def ended(self, result: Result, parent: Parent, at_ns: int) -> None:
        """Makes the item's span, where it should have one; `parent` is for an item that never was on its way."""
        known = self._items.pop(result.index, None)
        if known is None:
            self._left -= 1
            is_kept = self._left >= 0
        else:
            parent, is_kept = known.parent, known.is_kept
        reason = failure_of(result)
        if known is not None and known.over:
            known.end_attempt(at_ns, {}, reason)
        if known is None or not known.has_gone:
            start_ns, began_ns = at_ns - SHORTEST_NS, None
        else:
            start_ns = began_ns = known.start_ns(at_ns)
        parent.covers(start_ns, at_ns)
        if not is_kept and not _is_always_kept(result):
            parent.leaves_out(began_ns, at_ns)
            return
        if known is None or began_ns is None:
            span = self._idle(parent, result, start_ns, 0 if known is None else known.span_id)
        else:
            span = self._make(known, start_ns)
        span.set_attributes(result_attributes(result, capture_content=self._capture_content))
        if reason is not None:
            span.set_status(StatusCode.ERROR, reason)
        if known is not None and began_ns is not None:
            self._tell_attempts(known, span, start_ns)
        finish(span, start_ns, at_ns)

    def close(self, at_ns: int) -> None:
        """The batch ends: nobody has told how these ended, which the application promises to do."""
        for known in self._items.values():
            if known.is_kept:
                start_ns = known.start_ns(at_ns)
                known.parent.covers(start_ns, at_ns)
                span = self._make(known, start_ns)
                fail(span, UnisonoError.reason)
                finish(span, start_ns, at_ns)
        self._items.clear()
        self._going = []

    def _make(self, known: ItemTrace, start_ns: int) -> Span:
        """The span of an item, all but how it ended."""
        doing = operation(known.item)
        model = encodable(known.item.model) or known.parent.model
        attributes = {
            names.OPERATION_NAME: doing,
            **known.parent.item_attributes,
            names.REQUEST_MODEL: model,
            **request_attributes(known.item, capture_content=self._capture_content),
            **known.released,
        }
        name = f"{doing} {model}".rstrip()
        span = self._maker.begin(
            known.parent,
            name,
            attributes,
            start_ns,
            kind=SpanKind.CLIENT,
            links=known.links,
            span_id=known.span_id,
        )
        for event, said, event_ns in known.events:
            span.add_event(event, said, event_ns)
        return span

    def _idle(self, parent: Parent, result: Result, start_ns: int, span_id: int) -> Span:
        attributes: Attributes = {names.ITEM_ID: encodable(result.item_id), names.INDEX: result.index}
        if parent.model:
            attributes[names.MODEL] = parent.model
        return self._maker.begin(parent, "item", attributes, start_ns, span_id=span_id)

    def _tell_attempts(self, known: ItemTrace, span: Span, start_ns: int) -> None:
        self._attempts_left -= len(known.over)
        if self._attempts_left < 0:
            # All are events of the item, here as everywhere.
            return
        parent = Parent(span, known.parent.context, start_ns)
        for over in known.over:
            child = self._maker.begin(parent, f"attempt {over.number}", over.attributes, over.start_ns)
            if over.error is not None:
                fail(child, over.error)
            finish(child, over.start_ns, over.end_ns)


def _is_always_kept(result: Result) -> bool:
    """Whether an item has a span though there are too many: it failed, or ran out of time while it ran.

    Items cancelled, or never begun when the time was over, are many and say nothing that the batch does not say.
    """
    return result.state is ItemState.FAILED or (result.state is ItemState.EXPIRED and result.attempts > 0)
