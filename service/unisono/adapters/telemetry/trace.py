"""What happens to a batch → its span tree.

Theory of operation. One batch is one trace:

    unisono.v1.BatchInference/RunBatch   SERVER, child of the caller's span where it sent one
    ├── plan                             once for each time that items were assigned
    ├── group <model>                    one for each runner
    │   ├── load
    │   ├── release                      one for each wave
    │   ├── items left out               where there are too many: those without a span, together
    │   └── chat <model>                 CLIENT, one for each item with all its attempts
    │       └── attempt <number>         where there were several
    └── item                             an item that ended before it had a group

Every time is the one that the caller of the watch gives, so the tree is right however late a span object is made.
Nine decisions:

1. A group's span begins and ends with what is in it, so that its length is the group's own: a group that waits for
   another's runner has not begun. It is made only with the batch's end, since on a stream items may join a group
   that had fallen silent, and since its figures come with the summary.
2. Spans are bounded: the first `item_limit` items have one, and the first `item_limit` waves; of later items only
   those that failed. How many were left out stands on the group, and one span, `items left out`, lasts as long as
   they took. The backend is told that such an item is not sampled, with the group as its parent.
3. An item that never went made no call, also where its request could not be sent: its span is `item`, INTERNAL, and
   as short as a span can be (`SHORTEST_NS`), at its end.
4. Where the trace is not sampled (the caller's word, or OTEL_TRACES_SAMPLER), nothing is kept of any item; the
   context still goes on to the backend.
5. A wave that crosses batches has a `release` span in the trace of each. That of the batch which is told first stands
   for the wave, and the items of the others link to it, so that each leads to the wave that it went out with. The
   link stands on the item's side: its span is still open when the wave's has ended.
6. An attempt that another item's ended (its runner died), or the backend's going away, is an event `broken_off`,
   without an error type: it is not charged to the item, and whoever searches for errors should find what caused it.
7. Attempts are events of the item's span, and spans below it where there were several: an attempt has a length, and
   the pause after it is seen. They are made when the item ends, so an item of one attempt costs nothing; there are
   as many as waves at most.
8. An item's span begins when it goes, not when it is staged: viewers draw one bar for a span, and bars side by side
   are to mean items side by side at the backend, not items that wait. (So the path back from the end of a group,
   which viewers draw as the critical one, leads over those that freed the slots.) How long it was held stands on
   it. Its id is in the headers of its request, so it is chosen with these (`ChosenIds`); the span is made at the end.
9. The names `gen_ai.…` stand on calls only. What reads them takes each span that has one for a call, and adds up
   their tokens.

Nothing is referenced after `ended` but by the exporter's queue and, as names, in `SharedWaves`; both are bounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, SpanKind

from unisono.adapters.telemetry import conventions as names
from unisono.adapters.telemetry.content import encodable
from unisono.adapters.telemetry.groups import (
    batch_figures,
    changing_attributes,
    group_attributes,
    group_figures,
    place_of,
    plan_attributes,
    provider_of,
)
from unisono.adapters.telemetry.item_spans import ItemSpans
from unisono.adapters.telemetry.items import tidy
from unisono.adapters.telemetry.spans import (
    W3C,
    W3C_HEADERS,
    ChosenIds,
    Parent,
    SharedWaves,
    SpanMaker,
    fail,
    finish,
)
from unisono.core.errors import BatchDeadlineError, CancelledItemError
from unisono.core.events import BatchState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from opentelemetry.trace import TracerProvider

    from unisono.adapters.telemetry.groups import KnownBackend
    from unisono.adapters.telemetry.items import Attributes
    from unisono.app.ports import LoadOutcome, ReleaseTimes
    from unisono.core.commands import ReleaseReason
    from unisono.core.errors import UnisonoError
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
        """Raises ValueError where the provider records spans, and takes its ids from elsewhere than `ChosenIds`."""
        ids = getattr(provider, "id_generator", None)
        if not isinstance(ids, ChosenIds):
            if ids is not None:
                raise ValueError("the tracer provider must be made with id_generator=ChosenIds()")
            ids = ChosenIds()
        self._ids = ids
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
        verb, _, route = method.partition(" ")
        attributes: Attributes = {
            **(
                {names.HTTP_REQUEST_METHOD: verb, names.HTTP_ROUTE: route}
                if route
                else {names.RPC_SYSTEM_NAME: "grpc", names.RPC_METHOD: method}
            ),
            names.BATCH_ID: encodable(batch_id),
        }
        root = self._tracer.start_span(method, context, kind=SpanKind.SERVER, attributes=attributes, start_time=at_ns)
        return BatchTrace(
            SpanMaker(self._tracer, self._ids),
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
        maker: SpanMaker,
        root: Parent,
        *,
        backends: Mapping[str, KnownBackend],
        shared_waves: SharedWaves,
        item_limit: int,
        capture_content: bool,
    ) -> None:
        self._maker = maker
        self._root = root
        self._backends = backends
        # Of all batches.
        self._shared_waves = shared_waves
        self._capture_content = capture_content
        self._is_recording = root.span.is_recording()
        self._groups: dict[int, Parent] = {}
        self._items = ItemSpans(maker, item_limit=item_limit, capture_content=capture_content)
        # How many more may have a span.
        self._waves_left = item_limit
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
            span = self._maker.begin(self._root, "plan", plan_attributes(groups, families), started_ns)
            finish(span, started_ns, ended_ns)
        for planned in groups:
            parent = self._groups.get(planned.group)
            if parent is None:
                # After the plan, which is told first wherever children stand in the order of their beginning.
                parent = self._groups[planned.group] = self._know_group(planned, ended_ns)
            parent.latest = changing_attributes(planned)

    def _know_group(self, planned: GroupPlanned, at_ns: int) -> Parent:
        if not self._is_recording:
            # What goes on is the batch's own context, or with tracing off the caller's.
            return Parent(self._root.span, self._root.context, at_ns)
        backend = self._backends.get(planned.runner.backend)
        place = place_of(backend)
        parent = Parent.to_come(self._maker.ids.choose(), self._root, at_ns)
        parent.model = encodable(planned.runner.model)
        parent.attributes = {**place, **group_attributes(planned)}
        parent.item_attributes = {names.PROVIDER_NAME: provider_of(backend), **place}
        return parent

    def _tell_group(self, parent: Parent, figures: Attributes, at_ns: int) -> None:
        """Makes the span of a group."""
        if not self._is_recording:
            return
        self._say_left_out(parent, figures)
        start_ns = parent.planned_ns if parent.first_ns is None else parent.first_ns
        attributes = {**parent.attributes, **figures}
        span_id = parent.span.get_span_context().span_id
        span = self._maker.begin(self._root, f"group {parent.model}", attributes, start_ns, span_id=span_id)
        finish(span, start_ns, min(parent.last_ns, at_ns))

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
        began_ns = min(max(started_ns, parent.planned_ns), ended_ns)
        span = self._maker.begin(parent, "load", attributes, began_ns)
        if error is not None:
            fail(span, error.reason)
            if self._capture_content:
                span.set_attribute(names.ERROR_MESSAGE, encodable(error.message))
        finish(span, began_ns, ended_ns)
        parent.covers(began_ns, ended_ns)

    def wave_released(
        self, *, group: int, wave: int, wave_key: int, item_count: int, others: int, times: ReleaseTimes
    ) -> None:
        """Adds a `release` span, from the first final byte to the last."""
        if self._has_ended:
            return
        parent = self._groups.get(group, self._root)
        if others:
            self._items.link(wave_key, self._shared_waves.get(wave_key))
        self._waves_left -= 1
        if self._waves_left < 0:
            parent.waves_left_out += 1
            return
        attributes: Attributes = {
            names.WAVE: wave,
            names.ITEMS: item_count,
            names.OTHERS: others,
            names.SPREAD_S: tidy(times.spread_s),
        }
        span = self._maker.begin(parent, "release", attributes, times.first_ns)
        if others:
            span.set_attribute(names.STANDS_FOR_WAVE, self._shared_waves.begin(wave_key, span))
        finish(span, times.first_ns, times.last_ns)
        parent.covers(times.first_ns, times.last_ns)

    def ended(self, *, summary: Summary, at_ns: int) -> None:
        """Closes every span, the batch's own last, and forgets everything."""
        if self._has_ended:
            return
        self._has_ended = True
        self._items.close(at_ns)
        reports = {report.group.group: report for report in summary.report.groups}
        for number, parent in self._groups.items():
            report = reports.get(number)
            self._tell_group(parent, parent.latest if report is None else group_figures(report), at_ns)
        self._groups.clear()
        self._end_root(summary, at_ns)

    def _end_root(self, summary: Summary, at_ns: int) -> None:
        span = self._root.span
        figures = batch_figures(summary)
        self._say_left_out(self._root, figures)
        if self._plans_left < 0:
            figures[names.PLANS_LEFT_OUT] = -self._plans_left
        span.set_attributes(figures)
        # A batch whose items failed has still done its work; a batch that was stopped has not.
        if summary.error is not None:
            fail(span, summary.error.reason)
        elif summary.state in _REASONS:
            fail(span, _REASONS[summary.state])
        span.end(at_ns)
        # Whoever keeps the watch keeps no span.
        self._root = Parent(INVALID_SPAN, Context(), at_ns)

    # -- Its items -----------------------------------------------------------------------------------------------

    def item_staging(self, *, item: Item, group: int, attempt: int, at_ns: int) -> Mapping[str, str]:
        """An attempt begins; answers the headers that make the backend part of the item's span."""
        parent = self._groups.get(group, self._root)
        if self._has_ended or not self._is_recording:
            return parent.unsampled_headers(is_recording=self._is_recording)
        return self._items.staging(item, parent, attempt, at_ns)

    def item_staged(self, *, index: int, at_ns: int) -> None:
        """Nothing: its span begins when it goes."""

    def item_released(
        self, *, index: int, wave: int, wave_key: int, at_ns: int, reason: ReleaseReason, lane: int | None
    ) -> None:
        """Adds the event `released`."""
        self._items.released(index, wave=wave, wave_key=wave_key, at_ns=at_ns, reason=reason, lane=lane)

    def item_first_token(self, *, index: int, at_ns: int) -> None:
        """Adds the event `first_token`."""
        self._items.first_token(index, at_ns)

    def item_retried(
        self, *, index: int, attempt: int, error: UnisonoError, again_in_s: float, is_free: bool, at_ns: int
    ) -> None:
        """Adds the event `retry`, with the reason for which the attempt failed; or `broken_off` (see decision 6)."""
        self._items.retried(index, attempt=attempt, error=error, again_in_s=again_in_s, is_free=is_free, at_ns=at_ns)

    def item_ended(self, *, result: Result, at_ns: int) -> None:
        """Makes the item's span, where it should have one."""
        if self._has_ended or not self._is_recording:
            return
        # Its group is told where it had one.
        parent = self._root if result.group is None else self._groups.get(result.group, self._root)
        self._items.ended(result, parent, at_ns)

    # -- What is left out ----------------------------------------------------------------------------------------

    def _say_left_out(self, parent: Parent, figures: Attributes) -> None:
        """What has no span: how much, in the figures; and how long it took, as one span."""
        if parent.items_left_out:
            figures[names.ITEMS_LEFT_OUT] = parent.items_left_out
        if parent.waves_left_out:
            figures[names.WAVES_LEFT_OUT] = parent.waves_left_out
        if parent.left_out_ns is not None:
            start_ns, end_ns = parent.left_out_ns
            said: Attributes = {names.ITEMS_LEFT_OUT: parent.items_left_out}
            finish(self._maker.begin(parent, "items left out", said, start_ns), start_ns, end_ns)


# How a batch that was stopped is marked where nothing else is said.
_REASONS = {BatchState.CANCELLED: CancelledItemError.reason, BatchState.EXPIRED: BatchDeadlineError.reason}
