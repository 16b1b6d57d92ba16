"""What happens to a batch → its span tree.

Theory of operation. One batch is one trace:

    unisono.v1.BatchInference/RunBatch   SERVER, child of the caller's span where it sent one
    ├── plan                             once for each time that items were assigned
    ├── group <model>                    one for each runner
    │   ├── load
    │   ├── release                      one for each wave
    │   └── chat <model>                 CLIENT, one for each item with all its attempts
    │       └── attempt <number>         where there were several
    └── item                             an item that ended before it had a group

Every time is the one that the caller of the watch gives, so the tree is right however late a span object is made.
Seven decisions:

1. A group's span ends when the last thing in it ended, so that its length is the group's own. It is closed only
   with the batch, since on a stream items may join a group that had fallen silent, and since its figures come with
   the summary.
2. Spans are bounded: the first `item_limit` items have one, and the first `item_limit` waves; of later items only
   those that failed, whose span is then made afterwards. How many were left out stands on the group. The backend is
   told that such an item is not sampled, with the group as its parent.
3. An item that never ran made no call: its span is `item`, INTERNAL and without length.
4. Where the trace is not sampled (the caller's word, or OTEL_TRACES_SAMPLER), nothing is kept of any item; the
   context still goes on to the backend.
5. A wave that crosses batches has a `release` span in the trace of each. That of the batch which is told first stands
   for the wave, and the items of the others link to it, so that each leads to the wave that it went out with. The
   link stands on the item's side: its span is still open when the wave's has ended.
6. An attempt that another item's ended (its runner died) is an event `broken_off`, without an error type: it is not
   charged to the item, and whoever searches for errors should find the one that caused it.
7. Attempts are events of the item's span, and spans below it where there were several: an attempt has a length, and
   the pause after it is seen. They are made when the item ends, so an item of one attempt costs nothing; there are
   as many as waves at most.

Nothing is referenced after `ended` but by the exporter's queue and, as names, in `SharedWaves`; both are bounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, SpanKind, StatusCode

from unisono.adapters.telemetry import conventions as names
from unisono.adapters.telemetry.content import encodable
from unisono.adapters.telemetry.groups import (
    batch_figures,
    changing_attributes,
    group_attributes,
    group_figures,
    place_of,
    plan_attributes,
)
from unisono.adapters.telemetry.items import failure_of, operation, request_attributes, result_attributes
from unisono.adapters.telemetry.spans import W3C, W3C_HEADERS, ItemTrace, Parent, SharedWaves
from unisono.core.errors import BatchDeadlineError, CancelledItemError, UnisonoError
from unisono.core.events import BatchState
from unisono.core.model import ItemState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from opentelemetry.trace import Span, Tracer, TracerProvider

    from unisono.adapters.telemetry.groups import KnownBackend
    from unisono.adapters.telemetry.items import Attributes
    from unisono.app.ports import LoadOutcome, ReleaseTimes
    from unisono.core.commands import ReleaseReason
    from unisono.core.events import Result, Summary
    from unisono.core.model import Item
    from unisono.core.report import GroupPlanned

# Items of a batch that have a span, and waves.
DEFAULT_ITEM_LIMIT = 1000
# Plans and loads of a batch that have a span; a stream plans anew with every item that it adds.
_MAX_PLANS = 100
_MAX_LOADS = 100


class TraceListener:
    """A Listener that makes a trace of every batch."""

    def __init__(
        self,
        provider: TracerProvider,
        *,
        service_version: str = "",
        backends: Iterable[KnownBackend] = (),
        item_limit: int = DEFAULT_ITEM_LIMIT,
        capture_content: bool = False,
    ) -> None:
        self._tracer = provider.get_tracer("unisono", service_version)
        self._backends = {backend.name: backend for backend in backends}
        self._item_limit = item_limit
        self._capture_content = capture_content
        self._shared_waves = SharedWaves()

    def batch_accepted(self, *, batch_id: str, method: str, carrier: Mapping[str, str], at_ns: int) -> BatchTrace:
        """Begins the batch's trace, within the caller's own where `carrier` names one."""
        sent = {name: carrier[name] for name in W3C_HEADERS if name in carrier}
        # An empty context to start from: what the current task is part of is none of this trace's business.
        context = W3C.extract(sent, context=Context())
        attributes: Attributes = {
            names.RPC_SYSTEM_NAME: "grpc",
            names.RPC_METHOD: method,
            names.BATCH_ID: encodable(batch_id),
        }
        root = self._tracer.start_span(method, context, kind=SpanKind.SERVER, attributes=attributes, start_time=at_ns)
        return BatchTrace(
            self._tracer,
            Parent(root, context, at_ns),
            backends=self._backends,
            shared_waves=self._shared_waves,
            item_limit=self._item_limit,
            capture_content=self._capture_content,
        )


class BatchTrace:
    """A BatchWatch that makes the trace of one batch; see the head of this file."""

    def __init__(
        self,
        tracer: Tracer,
        root: Parent,
        *,
        backends: Mapping[str, KnownBackend],
        shared_waves: SharedWaves,
        item_limit: int,
        capture_content: bool,
    ) -> None:
        self._tracer = tracer
        self._root = root
        self._backends = backends
        # Of all batches.
        self._shared_waves = shared_waves
        self._capture_content = capture_content
        self._is_recording = root.span.is_recording()
        self._groups: dict[int, Parent] = {}
        # Those on their way only.
        self._items: dict[int, ItemTrace] = {}
        # Those that were released last, and by the name of which release.
        self._going: list[ItemTrace] = []
        self._going_with: int | None = None
        # How many more may have a span.
        self._items_left = item_limit
        self._waves_left = item_limit
        self._attempts_left = item_limit
        self._plans_left = _MAX_PLANS
        self._loads_left = _MAX_LOADS
        self._has_ended = False

    # -- The batch and its groups --------------------------------------------------------------------------------

    def planned(self, *, started_ns: int, ended_ns: int, groups: Sequence[GroupPlanned], families: int) -> None:
        """Adds a `plan` span, and a `group` span for each group that is new."""
        if self._has_ended:
            return
        self._plans_left -= 1
        if self._plans_left >= 0:
            self._child(self._root, "plan", plan_attributes(groups, families), started_ns).end(ended_ns)
        for planned in groups:
            parent = self._groups.get(planned.group)
            if parent is None:
                # After the plan, which is told first wherever children stand in the order of their beginning.
                parent = self._groups[planned.group] = self._begin_group(planned, ended_ns)
            parent.latest = changing_attributes(planned)
            parent.reaches(ended_ns)

    def _begin_group(self, planned: GroupPlanned, at_ns: int) -> Parent:
        place = place_of(self._backends.get(planned.runner.backend))
        model = encodable(planned.runner.model)
        attributes = {**place, **group_attributes(planned)}
        span = self._child(self._root, f"group {model}", attributes, at_ns)
        parent = Parent(span, self._root.context, at_ns)
        parent.model = model
        parent.item_attributes = place
        return parent

    def group_loaded(
        self,
        *,
        group: int,
        started_ns: int,
        ended_ns: int,
        outcome: LoadOutcome | None,
        error: UnisonoError | None,
    ) -> None:
        """Adds a `load` span."""
        self._loads_left -= 1
        if self._has_ended or self._loads_left < 0:
            return
        parent = self._groups.get(group, self._root)
        attributes: Attributes = {}
        if outcome is not None:
            attributes[names.WAS_LOADED] = outcome.was_loaded
            if outcome.slots is not None:
                attributes[names.SLOTS] = outcome.slots
        # Whoever comes while a model is being loaded waits for the rest of it.
        began_ns = min(max(started_ns, parent.start_ns), ended_ns)
        span = self._child(parent, "load", attributes, began_ns)
        if error is not None:
            self._fail(span, error.reason)
            if self._capture_content:
                span.set_attribute(names.ERROR_MESSAGE, encodable(error.message))
        span.end(ended_ns)
        parent.reaches(ended_ns)

    def wave_released(
        self, *, group: int, wave: int, wave_key: int, item_count: int, others: int, times: ReleaseTimes
    ) -> None:
        """Adds a `release` span, from the first final byte to the last."""
        if self._has_ended:
            return
        parent = self._groups.get(group, self._root)
        if others:
            self._link_to_wave(wave_key)
        self._waves_left -= 1
        if self._waves_left < 0:
            parent.waves_left_out += 1
            return
        attributes: Attributes = {
            names.WAVE: wave,
            names.ITEMS: item_count,
            names.OTHERS: others,
            names.SPREAD_S: times.spread_s,
        }
        span = self._child(parent, "release", attributes, times.first_ns)
        if others:
            span.set_attribute(names.STANDS_FOR_WAVE, self._shared_waves.begin(wave_key, span))
        span.end(times.last_ns)
        parent.reaches(times.last_ns)

    def _link_to_wave(self, wave_key: int) -> None:
        """Links the items of this release to the span that another batch has made for it, if one has."""
        shared = self._shared_waves.get(wave_key)
        # Not when the items are told of: a bundle of several batches' items tells all of them first.
        if shared is not None and self._going_with == wave_key:
            for known in self._going:
                known.add_link(shared)
        self._going_with, self._going = None, []

    def ended(self, *, summary: Summary, at_ns: int) -> None:
        """Closes every span, the batch's own last, and forgets everything."""
        if self._has_ended:
            return
        self._has_ended = True
        for known in self._items.values():
            if known.span is not None:
                # Nobody has told how it ended, which the application promises to do.
                known.span.set_attributes(known.released)
                self._fail(known.span, UnisonoError.reason)
                known.span.end(at_ns)
        self._items.clear()
        self._going = []
        reports = {report.group.group: report for report in summary.report.groups}
        for number, parent in self._groups.items():
            report = reports.get(number)
            parent.span.set_attributes(parent.latest if report is None else group_figures(report))
            _say_left_out(parent)
            parent.span.end(min(parent.last_ns, at_ns))
        self._groups.clear()
        self._end_root(summary, at_ns)

    def _end_root(self, summary: Summary, at_ns: int) -> None:
        span = self._root.span
        span.set_attributes(batch_figures(summary))
        _say_left_out(self._root)
        if self._plans_left < 0:
            span.set_attribute(names.PLANS_LEFT_OUT, -self._plans_left)
        # A batch whose items failed has still done its work; a batch that was stopped has not.
        if summary.error is not None:
            self._fail(span, summary.error.reason)
        elif summary.state in _REASONS:
            self._fail(span, _REASONS[summary.state])
        span.end(at_ns)
        # Whoever keeps the watch keeps no span.
        self._root = Parent(INVALID_SPAN, Context(), at_ns)

    # -- Its items -----------------------------------------------------------------------------------------------

    def item_staging(self, *, item: Item, group: int, attempt: int, at_ns: int) -> Mapping[str, str]:
        """Begins the item's span with its first attempt; answers the headers that make the backend part of it."""
        parent = self._groups.get(group, self._root)
        if self._has_ended or not self._is_recording:
            return parent.unsampled_headers
        known = self._items.get(item.index)
        if known is None:
            known = self._items[item.index] = ItemTrace(item, parent, at_ns)
            self._items_left -= 1
            if self._items_left >= 0:
                known.span = self._begin_item(known)
                known.headers = parent.headers_for(known.span)
            else:
                known.headers = parent.unsampled_headers
        known.begin_attempt(attempt, at_ns)
        return known.headers

    def _begin_item(self, known: ItemTrace) -> Span:
        doing = operation(known.item)
        model = encodable(known.item.model) or known.parent.model
        attributes = {
            names.OPERATION_NAME: doing,
            **known.parent.item_attributes,
            names.REQUEST_MODEL: model,
            **request_attributes(known.item, capture_content=self._capture_content),
        }
        return self._child(
            known.parent, f"{doing} {model}".rstrip(), attributes, known.start_ns, kind=SpanKind.CLIENT
        )

    def item_staged(self, *, index: int, at_ns: int) -> None:
        """Adds the event `staged`."""
        known = self._items.get(index)
        if known is not None:
            known.add_event("staged", {}, at_ns)

    def item_released(
        self, *, index: int, wave: int, wave_key: int, at_ns: int, reason: ReleaseReason, lane: int | None
    ) -> None:
        """Adds the event `released`, with why the item was the next and for which lane."""
        known = self._items.get(index)
        if known is None:
            return
        known.released = {names.RELEASE_REASON: reason.value}
        if lane is not None:
            known.released[names.LANE] = lane
        known.add_event("released", {names.WAVE: wave, **known.released}, at_ns)
        if self._going_with != wave_key:
            self._going_with, self._going = wave_key, []
        self._going.append(known)

    def item_first_token(self, *, index: int, at_ns: int) -> None:
        """Adds the event `first_token`."""
        known = self._items.get(index)
        if known is not None:
            known.add_event("first_token", {}, at_ns)

    def item_retried(
        self, *, index: int, attempt: int, error: UnisonoError, again_in_s: float, is_free: bool, at_ns: int
    ) -> None:
        """Adds the event `retry`, with the reason for which the attempt failed; or `broken_off` (see decision 6)."""
        known = self._items.get(index)
        if known is None:
            return
        known.attempt = attempt
        if is_free:
            known.end_attempt(at_ns, {names.BROKEN_OFF_BY: error.reason}, None)
            known.add_event("broken_off", {names.BROKEN_OFF_BY: error.reason}, at_ns)
            return
        known.end_attempt(at_ns, {names.AGAIN_IN_S: again_in_s}, error.reason)
        attributes: Attributes = {names.ERROR_TYPE: error.reason, names.AGAIN_IN_S: again_in_s}
        if self._capture_content:
            attributes[names.ERROR_MESSAGE] = encodable(error.message)
        known.add_event("retry", attributes, at_ns)

    def item_ended(self, *, result: Result, at_ns: int) -> None:
        """Ends the item's span, or makes it now where it has none and should have one."""
        if self._has_ended or not self._is_recording:
            return
        known = self._items.pop(result.index, None)
        span: Span | None
        if known is not None:
            parent = known.parent
            span = known.span
            if span is None and _is_always_kept(result):
                span = self._begin_item(known)
                known.begin_late(span)
        else:
            # It never ran. Its group is told where it had one.
            parent = self._root if result.group is None else self._groups.get(result.group, self._root)
            self._items_left -= 1
            span = self._idle_item(parent, result, at_ns) if self._is_idle_item_kept(result) else None
        parent.reaches(at_ns)
        if span is None:
            parent.items_left_out += 1
            return
        if known is not None:
            span.set_attributes(known.released)
        span.set_attributes(result_attributes(result, capture_content=self._capture_content))
        reason = failure_of(result)
        if reason is not None:
            span.set_status(StatusCode.ERROR, reason)
        if known is not None and known.over:
            known.end_attempt(at_ns, {}, reason)
            self._tell_attempts(known, span)
        span.end(at_ns)

    def _tell_attempts(self, known: ItemTrace, span: Span) -> None:
        self._attempts_left -= len(known.over)
        if self._attempts_left < 0:
            # All are events of the item, here as everywhere.
            return
        parent = Parent(span, known.parent.context, known.start_ns)
        for over in known.over:
            child = self._child(parent, f"attempt {over.number}", over.attributes, over.start_ns)
            if over.error is not None:
                self._fail(child, over.error)
            child.end(over.end_ns)

    def _is_idle_item_kept(self, result: Result) -> bool:
        return self._items_left >= 0 or _is_always_kept(result)

    def _idle_item(self, parent: Parent, result: Result, at_ns: int) -> Span:
        attributes: Attributes = {names.ITEM_ID: encodable(result.item_id), names.INDEX: result.index}
        if parent.model:
            attributes[names.REQUEST_MODEL] = parent.model
        return self._child(parent, "item", attributes, at_ns)

    # -- Spans ---------------------------------------------------------------------------------------------------

    def _child(
        self,
        parent: Parent,
        name: str,
        attributes: Attributes,
        start_ns: int,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Span:
        return self._tracer.start_span(name, parent.context, kind=kind, attributes=attributes, start_time=start_ns)

    @staticmethod
    def _fail(span: Span, reason: str) -> None:
        span.set_attribute(names.ERROR_TYPE, reason)
        span.set_status(StatusCode.ERROR, reason)


# How a batch that was stopped is marked where nothing else is said.
_REASONS = {BatchState.CANCELLED: CancelledItemError.reason, BatchState.EXPIRED: BatchDeadlineError.reason}


def _is_always_kept(result: Result) -> bool:
    """Whether an item has a span though there are too many: it failed, or ran out of time while it ran.

    Items cancelled, or never begun when the time was over, are many and say nothing that the batch does not say.
    """
    return result.state is ItemState.FAILED or (result.state is ItemState.EXPIRED and result.attempts > 0)


def _say_left_out(parent: Parent) -> None:
    if parent.items_left_out:
        parent.span.set_attribute(names.ITEMS_LEFT_OUT, parent.items_left_out)
    if parent.waves_left_out:
        parent.span.set_attribute(names.WAVES_LEFT_OUT, parent.waves_left_out)
