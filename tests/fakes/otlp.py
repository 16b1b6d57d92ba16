"""A real OTLP/gRPC receiver in the test's process: what a collector would get, as values.

    with OtlpReceiver() as otlp:
        telemetry = configure("1.0", {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint})
        …
        spans = otlp.wait_for(lambda spans: any(span.parent_id is None for span in spans))

The server runs in threads of its own, so it answers while an event loop is busy; in a test with such a loop call
`wait_for` through `asyncio.to_thread`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType, TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

SpanValue = str | bool | int | float | bytes | tuple[Any, ...] | None
Attributes = Mapping[str, SpanValue]


class Kind(Enum):
    """What side of a call a span is."""

    UNSPECIFIED = 0
    INTERNAL = 1
    SERVER = 2
    CLIENT = 3
    PRODUCER = 4
    CONSUMER = 5


class Status(Enum):
    """How a span ended."""

    UNSET = 0
    OK = 1
    ERROR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenEvent:
    """An event of a span."""

    name: str
    at_ns: int
    attributes: Attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenLink:
    """A link to another span, perhaps of another trace."""

    trace_id: str
    span_id: str
    attributes: Attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenSpan:
    """A span as it arrived."""

    name: str
    # Hexadecimal, as W3C writes them.
    trace_id: str
    span_id: str
    # None for the first of a trace.
    parent_id: str | None
    trace_state: str
    kind: Kind
    start_ns: int
    end_ns: int
    attributes: Attributes
    events: tuple[SeenEvent, ...]
    links: tuple[SeenLink, ...]
    status: Status
    status_message: str
    # Of the process that sent it.
    resource: Attributes
    # The instrumentation's name and version.
    scope: str
    scope_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A span with what hangs under it, in the order in which they began."""

    span: SeenSpan
    children: tuple[Node, ...] = field(default=())

    def lines(self, depth: int = 0) -> list[str]:
        """The names, indented by two blanks a level."""
        return ["  " * depth + self.span.name, *(line for child in self.children for line in child.lines(depth + 1))]

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()

    def child(self, name: str) -> Node:
        """The one child of that name."""
        found = [node for node in self.children if node.span.name == name]
        assert len(found) == 1, f"{len(found)} children called {name!r} in\n" + "\n".join(self.lines())
        return found[0]


class OtlpReceiver:
    """The receiver; it listens between `__enter__` and `__exit__`."""

    def __init__(self, port: int = 0) -> None:
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4, thread_name_prefix="otlp-receiver"))
        self._servicer = _Servicer()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(  # type: ignore[no-untyped-call]
            self._servicer, self._server
        )
        # 0: any free one.
        self._port = port

    def __enter__(self) -> Self:
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(grace=None).wait(timeout=5)

    @property
    def endpoint(self) -> str:
        """For OTEL_EXPORTER_OTLP_ENDPOINT."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def spans(self) -> tuple[SeenSpan, ...]:
        """All that have arrived, in the order of their arrival."""
        with self._servicer.changed:
            return tuple(self._servicer.spans)

    @property
    def bodies(self) -> tuple[bytes, ...]:
        """The messages as they came over the wire, serialized: to search them for what must not be there."""
        with self._servicer.changed:
            return tuple(self._servicer.bodies)

    @property
    def metadata(self) -> tuple[Mapping[str, str | bytes], ...]:
        """The headers of each message."""
        with self._servicer.changed:
            return tuple(self._servicer.metadata)

    def wait_for(
        self, predicate: Callable[[tuple[SeenSpan, ...]], bool], timeout_s: float = 10
    ) -> tuple[SeenSpan, ...]:
        """The spans, once they are as the predicate wants them. Raises TimeoutError, with what is there."""
        with self._servicer.changed:
            if not self._servicer.changed.wait_for(lambda: predicate(tuple(self._servicer.spans)), timeout_s):
                names = [span.name for span in self._servicer.spans]
                raise TimeoutError(
                    f"after {timeout_s} s there are {len(names)} spans, not those wanted: {names[:50]}"
                )
            return tuple(self._servicer.spans)

    def tree(self) -> tuple[Node, ...]:
        """The spans under their parents: one node for each span whose parent has not arrived here."""
        return tree_of(self.spans)


def tree_of(spans: Sequence[SeenSpan]) -> tuple[Node, ...]:
    """Spans under their parents; see `OtlpReceiver.tree`."""
    here = {span.span_id for span in spans}
    below: dict[str | None, list[SeenSpan]] = {}
    for span in sorted(spans, key=lambda span: (span.start_ns, span.end_ns)):
        below.setdefault(span.parent_id if span.parent_id in here else None, []).append(span)

    def node(span: SeenSpan) -> Node:
        return Node(span=span, children=tuple(node(child) for child in below.get(span.span_id, ())))

    return tuple(node(span) for span in below.get(None, ()))


class _Servicer(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes what comes."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.spans: list[SeenSpan] = []
        self.bodies: list[bytes] = []
        self.metadata: list[Mapping[str, str | bytes]] = []

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """The one method of the protocol."""
        spans = [
            _seen(span, _attributes(resource.resource.attributes), scope.scope.name, scope.scope.version)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self.changed:
            self.spans += spans
            self.bodies.append(request.SerializeToString())
            self.metadata.append(MappingProxyType(dict(context.invocation_metadata())))
            self.changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()


def _seen(span: trace_pb2.Span, resource: Attributes, scope: str, scope_version: str) -> SeenSpan:
    return SeenSpan(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        trace_state=span.trace_state,
        kind=Kind(span.kind),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=tuple(
            SeenEvent(name=event.name, at_ns=event.time_unix_nano, attributes=_attributes(event.attributes))
            for event in span.events
        ),
        links=tuple(
            SeenLink(
                trace_id=link.trace_id.hex(), span_id=link.span_id.hex(), attributes=_attributes(link.attributes)
            )
            for link in span.links
        ),
        status=Status(span.status.code),
        status_message=span.status.message,
        resource=resource,
        scope=scope,
        scope_version=scope_version,
    )


def _attributes(pairs: Sequence[KeyValue]) -> Attributes:
    return MappingProxyType({pair.key: _value(pair.value) for pair in pairs})


def _value(value: AnyValue) -> SpanValue:
    match value.WhichOneof("value"):
        case None:
            return None
        case "array_value":
            return tuple(_value(one) for one in value.array_value.values)
        case "kvlist_value":
            return tuple((pair.key, _value(pair.value)) for pair in value.kvlist_value.values)
        case which:
            plain: SpanValue = getattr(value, which)
            return plain
