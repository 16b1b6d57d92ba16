"""A Jaeger's query API over what an OTLP receiver got: `/api/v3/traces/{id}`, and the search for a batch's trace.

Shaped like Jaeger 2's answers: OTLP JSON in `result`, ids in hexadecimal, enums as numbers, what is zero left out;
and for what is not there a 404 whose body says so. `base64_ids` gives ids as protobuf's own JSON does.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

ROUTE = "/api/v3/traces"
_IDS = ("traceId", "spanId", "parentSpanId")


def answer_of(
    bodies: Iterable[bytes], keep: Callable[[str], bool] = lambda _: True, *, base64_ids: bool = False
) -> str:
    """The answer for the traces of these OTLP messages whose id (hexadecimal) is kept; empty where there are none."""
    resources: list[dict[str, Any]] = []
    for body in bodies:
        message = MessageToDict(
            trace_service_pb2.ExportTraceServiceRequest.FromString(body), use_integers_for_enums=True
        )
        for resource in message["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                scope["spans"] = [span for span in scope["spans"] if keep(_hex(span["traceId"]))]
                for holder in _holders(scope["spans"]) if not base64_ids else ():
                    holder.update({name: _hex(holder[name]) for name in _IDS if name in holder})
            resource["scopeSpans"] = [scope for scope in resource["scopeSpans"] if scope["spans"]]
            if resource["scopeSpans"]:
                resources.append(resource)
    return json.dumps({"result": {"resourceSpans": resources}}) if resources else ""


def _holders(spans: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for span in spans:
        yield span
        yield from span.get("links", ())


def _hex(text: str) -> str:
    return base64.b64decode(text).hex()


class FakeJaeger:
    """The API on loopback, while the context lasts; `bodies` gives the OTLP messages that have come so far."""

    def __init__(self, bodies: Callable[[], Iterable[bytes]], *, base64_ids: bool = False) -> None:
        self.base64_ids = base64_ids
        self.bodies = bodies
        # What was asked, path and query.
        self.asked: list[str] = []
        # Answers in place of the usual ones, one after the other: status and body.
        self.scripted: list[tuple[int, str]] = []
        # Whether a search goes by attributes; older versions give all traces.
        self.searches_attributes = True
        handler = type("Handler", (_Handler,), {"jaeger": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="fake-jaeger", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    @property
    def url(self) -> str:
        """For --jaeger."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, path: str) -> tuple[int, str]:
        """Status and body."""
        self.asked.append(path)
        if self.scripted:
            return self.scripted.pop(0)
        url = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path == ROUTE:
            return self._found(self._search(query))
        if url.path.startswith(f"{ROUTE}/"):
            wanted = url.path.removeprefix(f"{ROUTE}/")
            return self._found({wanted.lower()})
        return 404, "404 page not found"

    def _found(self, traces: set[str]) -> tuple[int, str]:
        body = answer_of(self.bodies(), traces.__contains__, base64_ids=self.base64_ids)
        if body:
            return 200, body
        return 404, json.dumps({"error": {"httpCode": 404, "message": "No traces found"}})

    def _search(self, query: dict[str, str]) -> set[str]:
        assert query["query.start_time_min"] < query["query.start_time_max"]
        wanted = json.loads(query.get("query.attributes", "{}")) if self.searches_attributes else {}
        found = set()
        for body in self.bodies():
            for resource in trace_service_pb2.ExportTraceServiceRequest.FromString(body).resource_spans:
                names = [
                    pair.value.string_value for pair in resource.resource.attributes if pair.key == "service.name"
                ]
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    has = {pair.key: pair.value.string_value for pair in span.attributes}
                    if names == [query["query.service_name"]] and wanted.items() <= has.items():
                        found.add(span.trace_id.hex())
        return found


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    jaeger: FakeJaeger

    def do_GET(self) -> None:
        """The only method of the API."""
        status, body = self.jaeger.answer(self.path)
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Nothing on the test's standard error."""
