"""What traces are made of while they grow: parents of spans, items on their way, waves of several batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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

# What is remembered of an item that has no span, should it fail: events, and links.
MAX_REMEMBERED_EVENTS = 32
_MAX_REMEMBERED_LINKS = 8
# Releases of several batches whose span is remembered. All batches hear of a release in one go, so the last one would
# do; a watch that is told later must not make memory grow.
_MAX_SHARED_WAVES = 1000

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
        self.start_ns = at_ns
        # When the last thing in it ended.
        self.last_ns = at_ns
        self.model = ""
        # What every item's span says of where it ran.
        self.item_attributes: Attributes = {}
        # What was last said of it, which is written when it ends: an attribute of a span can be replaced, but not
        # taken back.
        self.latest: Attributes = {}
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


class Attempt(NamedTuple):
    """One of several attempts of an item."""

    number: int
    start_ns: int
    end_ns: int
    attributes: Attributes
    # The reason for which it failed; None: it did not, or was broken off.
    error: str | None


class ItemTrace:
    """An item on its way: its span, or what would be needed to make one."""

    __slots__ = (
        "attempt",
        "attempt_ns",
        "events",
        "headers",
        "item",
        "links",
        "over",
        "parent",
        "released",
        "span",
        "start_ns",
    )

    def __init__(self, item: Item, parent: Parent, start_ns: int) -> None:
        self.item = item
        self.parent = parent
        self.start_ns = start_ns
        self.attempt = 1
        # When the attempt began; None between two.
        self.attempt_ns: int | None = None
        # Attempts that failed or were broken off.
        self.over: list[Attempt] = []
        self.span: Span | None = None
        self.headers: dict[str, str] = {}
        self.events: list[tuple[str, Attributes, int]] = []
        self.links: list[tuple[SpanContext, Attributes]] = []
        # Of its last release: why it was the next, and for which lane.
        self.released: Attributes = {}

    def begin_attempt(self, attempt: int, at_ns: int) -> None:
        """It is staged, for the first time or again."""
        self.attempt = attempt
        if self.attempt_ns is None:
            self.attempt_ns = at_ns

    def end_attempt(self, at_ns: int, attributes: Attributes, error: str | None) -> None:
        """Its present attempt is over, if there is one; of very many, only the first are remembered."""
        if self.attempt_ns is not None and len(self.over) < MAX_REMEMBERED_EVENTS:
            over = Attempt(self.attempt, self.attempt_ns, at_ns, {names.ATTEMPT: self.attempt, **attributes}, error)
            self.over.append(over)
        self.attempt_ns = None

    def add_event(self, name: str, attributes: Attributes, at_ns: int) -> None:
        """Says that something happened to it in its present attempt."""
        attributes[names.ATTEMPT] = self.attempt
        if self.span is not None:
            self.span.add_event(name, attributes, at_ns)
        elif len(self.events) < MAX_REMEMBERED_EVENTS:
            self.events.append((name, attributes, at_ns))

    def add_link(self, context: SpanContext) -> None:
        """Says that its present attempt belongs to something in another batch's trace."""
        attributes: Attributes = {names.ATTEMPT: self.attempt}
        if self.span is not None:
            self.span.add_link(context, attributes)
        elif len(self.links) < _MAX_REMEMBERED_LINKS:
            self.links.append((context, attributes))

    def begin_late(self, span: Span) -> None:
        """It has a span after all: what is remembered goes into it."""
        self.span = span
        for name, attributes, event_ns in self.events:
            span.add_event(name, attributes, event_ns)
        for context, attributes in self.links:
            span.add_link(context, attributes)


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
