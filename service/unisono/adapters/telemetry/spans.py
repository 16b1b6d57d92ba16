"""What traces are made with: parents of spans, ids that are chosen before, waves of several batches."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from unisono.adapters.telemetry import conventions as names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span, Tracer

    from unisono.adapters.telemetry.items import Attributes

# Releases of several batches whose span is remembered. All batches hear of a release in one go, so the last one would
# do; a watch that is told later must not make memory grow.
_MAX_SHARED_WAVES = 1000

# Not the process's propagator (OTEL_PROPAGATORS): what is in front of Ollama and behind this service's callers
# speaks W3C.
W3C = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])
W3C_HEADERS = ("traceparent", "tracestate", "baggage")


# No span is shorter: stores that keep whole microseconds would show none, and Jaeger takes a span that ends as it
# begins for a clock that went back.
SHORTEST_NS = 1_000


class Parent:
    """A span that items hang under: the batch's own, or a group's, which is made only when the batch ends."""

    def __init__(self, span: Span, context: Context, at_ns: int) -> None:
        self.span = span
        # What children are started in; the caller's baggage is in it too.
        self.context = set_span_in_context(span, context)
        self.planned_ns = at_ns
        # When the first thing in it began, and the last one ended; None: nothing has.
        self.first_ns: int | None = None
        self.last_ns = at_ns
        self.model = ""
        # What its own span says, and what every item's says of where it ran.
        self.attributes: Attributes = {}
        self.item_attributes: Attributes = {}
        # What was last said of it, which is written when it ends: an attribute of a span can be replaced, but not
        # taken back.
        self.latest: Attributes = {}
        self.waves_left_out = 0
        self.items_left_out = 0
        # From the first release of these to the last end; None: none of them went.
        self.left_out_ns: tuple[int, int] | None = None
        self._unsampled_headers: dict[str, str] | None = None

    @classmethod
    def to_come(cls, span_id: int, root: Parent, at_ns: int) -> Parent:
        """A span below `root` that will be made later."""
        here = root.span.get_span_context()
        named = SpanContext(
            here.trace_id, span_id, is_remote=False, trace_flags=here.trace_flags, trace_state=here.trace_state
        )
        return cls(NonRecordingSpan(named), root.context, at_ns)

    def covers(self, start_ns: int, end_ns: int) -> None:
        """Something in it began and ended at these times."""
        self.first_ns = start_ns if self.first_ns is None else min(self.first_ns, start_ns)
        self.last_ns = max(self.last_ns, end_ns)

    def leaves_out(self, start_ns: int | None, end_ns: int) -> None:
        """An item that ended has no span; `start_ns`: when it went, if it did."""
        self.items_left_out += 1
        if start_ns is not None:
            first_ns, last_ns = self.left_out_ns or (start_ns, end_ns)
            self.left_out_ns = (min(first_ns, start_ns), max(last_ns, end_ns))

    def headers_for(self, span_id: int) -> dict[str, str]:
        """Headers by which a request belongs to a span of this group, which may be still to come."""
        return self._headers(span_id, self.span.get_span_context().trace_flags)

    def _headers(self, span_id: int, flags: TraceFlags) -> dict[str, str]:
        here = self.span.get_span_context()
        named = SpanContext(here.trace_id, span_id, is_remote=False, trace_flags=flags, trace_state=here.trace_state)
        headers: dict[str, str] = {}
        W3C.inject(headers, set_span_in_context(NonRecordingSpan(named), self.context))
        return headers

    def unsampled_headers(self, *, is_recording: bool) -> dict[str, str]:
        """Headers of a request that has no span: below this one, and not to be recorded.

        Where the trace is not recorded itself they are its own: not sampled, or with tracing off the caller's word.
        """
        if self._unsampled_headers is None:
            here = self.span.get_span_context()
            flags = TraceFlags(here.trace_flags & ~TraceFlags.SAMPLED) if is_recording else here.trace_flags
            self._unsampled_headers = self._headers(here.span_id, flags)
        return self._unsampled_headers


class ChosenIds(RandomIdGenerator):
    """Ids at random; but a span can be given one that was chosen before.

    A request says whose part it is long before it goes, and only when it goes does its span begin.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def choose(self) -> int:
        """An id for a span to come."""
        return super().generate_span_id()

    @contextlib.contextmanager
    def giving(self, span_id: int) -> Iterator[None]:
        """The next span that this thread begins here gets this id; 0: any."""
        self._of_thread.chosen = span_id
        try:
            yield
        finally:
            self._of_thread.chosen = 0

    def generate_span_id(self) -> int:
        """Called by the SDK for each span."""
        chosen: int = getattr(self._of_thread, "chosen", 0)
        self._of_thread.chosen = 0
        return chosen or super().generate_span_id()


class SpanMaker:
    """Makes spans at times, and with ids, that are told."""

    def __init__(self, tracer: Tracer, ids: ChosenIds) -> None:
        self._tracer = tracer
        self.ids = ids

    def begin(
        self,
        parent: Parent,
        name: str,
        attributes: Attributes,
        start_ns: int,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        links: Sequence[Link] = (),
        span_id: int = 0,
    ) -> Span:
        """A span below another; `span_id` was chosen before, or 0 is any."""
        with self.ids.giving(span_id):
            return self._tracer.start_span(
                name, parent.context, kind=kind, attributes=attributes, links=links, start_time=start_ns
            )


def finish(span: Span, start_ns: int, end_ns: int) -> None:
    """Ends a span that began then."""
    span.end(max(end_ns, start_ns + SHORTEST_NS))


def fail(span: Span, reason: str) -> None:
    """Marks a span as failed, for a reason of core/errors.py."""
    span.set_attribute(names.ERROR_TYPE, reason)
    span.set_status(StatusCode.ERROR, reason)


class SharedWaves:
    """The spans of releases that held items of several batches: one a release, that of the first batch that has one.

    Only where it will be exported: a link to a span that nobody can find says nothing.
    """

    def __init__(self) -> None:
        self._contexts: dict[int, SpanContext] = {}

    def __len__(self) -> int:
        return len(self._contexts)

    def begin(self, wave_key: int, span: Span) -> bool:
        """A batch has made a span for this release; whether that is the one."""
        context = span.get_span_context()
        if wave_key in self._contexts or not context.trace_flags.sampled:
            return False
        self._contexts[wave_key] = context
        if len(self._contexts) > _MAX_SHARED_WAVES:
            # Of a dict, the first is the oldest.
            del self._contexts[next(iter(self._contexts))]
        return True

    def get(self, wave_key: int) -> SpanContext | None:
        """The span of this release; None: no batch has made one so far, or it is too long ago."""
        return self._contexts.get(wave_key)
