"""A caller's own span is the parent of its batch's trace: over the embedded engine, and without any such API."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanContext

import unisono
from tests.engine import LIMIT_S, MODEL, skip_without_engine
from tests.fakes.otlp import Kind, OtlpReceiver, tree_of
from tests.integration.service import house
from unisono.bootstrap import running
from unisono.config import Settings
from unisono.edge.cli.lines_in import GoodLine, LineReader
from unisono.edge.cli.source import Line
from unisono_client import Client
from unisono_client._generated.unisono.v1 import item_pb2
from unisono_client.transport import trace_context

EXAMPLE = Path(unisono.__file__).parent / "examples" / "batch.jsonl"


def example() -> list[item_pb2.Item]:
    """The items of the example batch."""
    lines = EXAMPLE.read_bytes().splitlines()
    read = LineReader().read(Line(number=number, text=text) for number, text in enumerate(lines, 1))
    items = [line.item for line in read if isinstance(line, GoodLine)]
    return [item_pb2.Item.FromString(item.SerializeToString()) for item in items]


@pytest.fixture
def collector(otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> OtlpReceiver:
    """A collector that the standard variables name."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    return otlp


@pytest.mark.embedded
async def test_the_example_batch_on_the_embedded_engine(collector: OtlpReceiver) -> None:
    """The 24 conversations of the example, answered by a real model; their trace hangs under the caller's span."""
    skip_without_engine()
    items = example()
    assert len(items) == 24
    settings = Settings(listen="127.0.0.1:0", embedded=True, drain=0.0, state_dir="none")
    tracer = TracerProvider().get_tracer("caller")
    async with asyncio.timeout(LIMIT_S), running(settings) as service, Client(service.target) as client:
        with tracer.start_as_current_span("caller") as span:
            run = client.run(items, model=MODEL, in_order=True)
        results = [result async for result in run]
    assert [result.item_id for result in results] == [item.item_id for item in items]
    assert all(result.content for result in results)
    assert run.report is not None
    assert run.report.completed == 24
    spans = await asyncio.to_thread(collector.wait_for, lambda spans: any(span.kind is Kind.SERVER for span in spans))
    context = span.get_span_context()
    (root,) = tree_of(spans)
    assert root.span.name == "unisono.v1.BatchInference/StreamBatch"
    assert (root.span.trace_id, root.span.parent_id) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
    answered = {node.span.attributes["unisono.item_id"] for node in root.walk() if node.span.kind is Kind.CLIENT}
    assert answered == {item.item_id for item in items}


async def test_every_call_carries_the_span_in_which_it_was_made(collector: OtlpReceiver) -> None:
    """run, session and infer, each in a span of its own."""
    tracer = TracerProvider().get_tracer("caller")
    made: list[SpanContext] = []
    async with house() as h, Client(h.target) as client:
        with tracer.start_as_current_span("run") as span:
            made.append(span.get_span_context())
            run = client.run(["x"], model="fake")
        _ = [result async for result in run]
        with tracer.start_as_current_span("session") as span:
            made.append(span.get_span_context())
            session = client.session(model="fake")
        async with session:
            await session.add("x")
            await session.close_input()
            _ = [result async for result in session]
        with tracer.start_as_current_span("infer") as span:
            made.append(span.get_span_context())
            _ = await client.infer("x", model="fake")
    spans = await asyncio.to_thread(
        collector.wait_for, lambda spans: sum(span.kind is Kind.SERVER for span in spans) == 3
    )
    parents = {span.parent_id for span in spans if span.kind is Kind.SERVER}
    assert parents == {f"{context.span_id:016x}" for context in made}


def test_without_the_api_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where opentelemetry-api is not installed, calls carry nothing; nor where no span is current."""
    assert trace_context() == ()
    monkeypatch.setitem(sys.modules, "opentelemetry.trace.propagation.tracecontext", None)
    assert trace_context() == ()
