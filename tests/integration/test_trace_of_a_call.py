"""The trace of a batch that came through the gRPC port and went to a backend: connected on both sides."""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes.ollama import Fault, FaultKind
from tests.fakes.otlp import Kind, Node, OtlpReceiver, Status, tree_of
from tests.integration.service import Seen, chat, config, house
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
# Words that must never leave in a trace: of a prompt, and of an answer.
ASKED, SAID = "moonlight", "halcyon"


@pytest.fixture
def collector(otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> OtlpReceiver:
    """A collector that the standard variables name, as an operator would set them."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    return otlp


async def test_caller_service_and_backend_are_one_trace(collector: OtlpReceiver) -> None:
    """One batch is one trace: under the caller's span, over each item's span, on to the backend's request."""
    async with house(num_parallel=4) as h:
        h.fake.faults.add(
            Fault(FaultKind.RESET, path="/api/chat", when=lambda body: "again" in str(body), after_lines=1)
        )
        items = [
            chat("one", f"{ASKED} [[say={SAID} indeed]]"),
            chat("two", f"{ASKED} [[tokens=7]]"),
            chat("again", f"{ASKED} again [[tokens=3]]"),
            chat("unknown", ASKED, model="nosuch"),
        ]
        seen = Seen()
        call = h.stub.RunBatch(
            pb.RunBatchRequest(config=config(), items=items), metadata=(("traceparent", f"00-{TRACE}-{CALLER}-01"),)
        )
        async for response in call:
            seen.add(response.event)
        sent = {
            record.headers["traceparent"] for record in h.fake.requests_to("/api/chat") if record.body["messages"]
        }
    # The service has stopped, which flushes.
    spans = await asyncio.to_thread(collector.wait_for, lambda spans: len(spans) >= 8)

    assert seen.states() == {"one": "COMPLETED", "two": "COMPLETED", "again": "COMPLETED", "unknown": "FAILED"}
    assert {span.trace_id for span in spans} == {TRACE}
    (root,) = tree_of(spans)
    assert (root.span.name, root.span.kind, root.span.parent_id) == (
        "unisono.v1.BatchInference/RunBatch",
        Kind.SERVER,
        CALLER,
    )
    assert [child.span.name for child in root.children] == ["plan", "group fake:latest", "item"]
    group = root.child("group fake:latest")
    names = [child.span.name for child in group.children]
    assert names.count("load") == 1
    assert names.count("release") >= 1
    answered = [child for child in group.children if child.span.name == "chat fake"]
    assert len(answered) == 3
    for item in answered:
        assert item.span.kind is Kind.CLIENT
        assert events(item)[:3] == ["staged", "released", "first_token"]
    retried = next(item for item in answered if "retry" in events(item))
    assert events(retried).count("released") == 2
    # W3C context goes on: each request names the span of its own item.
    assert {header.split("-")[2] for header in sent} == {item.span.span_id for item in answered}
    assert root.child("item").span.status is Status.ERROR
    exported = b"".join(collector.bodies)
    assert ASKED.encode() not in exported
    assert SAID.encode() not in exported


def events(node: Node) -> list[str]:
    """The names of a span's events, in order."""
    return [event.name for event in node.span.events]
