"""What a batch's trace is made of while it grows: spans that others hang under, and items on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from unisono.adapters.telemetry import conventions as names

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

    from unisono.adapters.telemetry.items import Attributes
    from unisono.core.model import Item

# What is remembered of an item that has no span, should it fail.
MAX_REMEMBERED_EVENTS = 32

# Not the process's propagator (OTEL_PROPAGATORS): what is in front of Ollama and behind this service's callers
# speaks W3C.
W3C = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])
W3C_HEADERS = ("traceparent", "tracestate", "baggage")


class Parent:
    """A span that items hang under: a group's, or the batch's own."""

    def __init__(self, span: Span, context: Context, at_ns: int) -> None:
        self.span = span
        # What children are started in; the caller's baggage is in it too.
        self.context = set_span_in_context(span, context)
        # When the last thing in it ended.
        self.last_ns = at_ns
        self.model = ""
        # What every item's span says of where it ran.
        self.item_attributes: Attributes = {}
        self.items_left_out = 0
        self.waves_left_out = 0
        self._unsampled_headers: dict[str, str] | None = None

    def reaches(self, at_ns: int) -> None:
        """Something in it ended at this time."""
        self.last_ns = max(self.last_ns, at_ns)

    def headers_for(self, span: Span) -> dict[str, str]:
        """Headers by which a request belongs to a span of this group."""
        headers: dict[str, str] = {}
        W3C.inject(headers, set_span_in_context(span, self.context))
        return headers

    @property
    def unsampled_headers(self) -> dict[str, str]:
        """Headers of a request that has no span: below this one, and not to be recorded.

        Where this one is not recorded itself they are its own: not sampled, or with tracing off the caller's word.
        """
        if self._unsampled_headers is None:
            here = self.span.get_span_context()
            flags = here.trace_flags
            if self.span.is_recording():
                flags = TraceFlags(flags & ~TraceFlags.SAMPLED)
            quiet = SpanContext(
                here.trace_id, here.span_id, is_remote=False, trace_flags=flags, trace_state=here.trace_state
            )
            self._unsampled_headers = self.headers_for(NonRecordingSpan(quiet))
        return self._unsampled_headers


class ItemTrace:
    """An item on its way: its span, or what would be needed to make one."""

    __slots__ = ("attempt", "events", "headers", "item", "parent", "span", "start_ns")

    def __init__(self, item: Item, parent: Parent, start_ns: int) -> None:
        self.item = item
        self.parent = parent
        self.start_ns = start_ns
        self.attempt = 1
        self.span: Span | None = None
        self.headers: dict[str, str] = {}
        self.events: list[tuple[str, Attributes, int]] = []

    def add_event(self, name: str, attributes: Attributes, at_ns: int) -> None:
        """Says that something happened to it in its present attempt."""
        attributes[names.ATTEMPT] = self.attempt
        if self.span is not None:
            self.span.add_event(name, attributes, at_ns)
        elif len(self.events) < MAX_REMEMBERED_EVENTS:
            self.events.append((name, attributes, at_ns))
