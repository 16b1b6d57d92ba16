"""The trace of a batch that came through the gRPC port and went to a backend: connected on both sides."""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes.ollama import Fault, FaultKind
from tests.fakes.otlp import Kind, Node, OtlpReceiver, SeenSpan, Status, tree_of
from tests.integration.service import Seen, chat, chats, config, house
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


@pytest.mark.parametrize("disabled", ["", "true"])
async def test_a_callers_context_goes_on_without_a_collector(disabled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No span is made that nobody is told of; the backend's own belong under the caller's."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", disabled)
    async with house() as h:
        call = h.stub.RunBatch(
            pb.RunBatchRequest(config=config(), items=chats(2)),
            metadata=(("traceparent", f"00-{TRACE}-{CALLER}-01"),),
        )
        assert sum([response.event.HasField("result") async for response in call]) == 2
        asked = [record.headers for record in h.fake.requests_to("/api/chat") if record.body["messages"]]
    assert {headers["traceparent"] for headers in asked} == {f"00-{TRACE}-{CALLER}-01"}


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
    assert [child.span.name for child in root.children] == ["plan", "item", "group fake:latest"]
    group = root.child("group fake:latest")
    names = [child.span.name for child in group.children]
    assert names.count("load") == 1
    assert names.count("release") >= 1
    answered = [child for child in group.children if child.span.name == "chat fake"]
    assert len(answered) == 3
    for item in answered:
        assert item.span.kind is Kind.CLIENT
        assert events(item)[:2] == ["released", "first_token"]
    retried = next(item for item in answered if "retry" in events(item))
    assert events(retried).count("released") == 2
    # W3C context goes on: each request names the span of its own item.
    assert {header.split("-")[2] for header in sent} == {item.span.span_id for item in answered}
    assert root.child("item").span.status is Status.ERROR
    exported = b"".join(collector.bodies)
    assert ASKED.encode() not in exported
    assert SAID.encode() not in exported


async def test_who_fell_with_the_runner_made_no_error(collector: OtlpReceiver) -> None:
    """Of a runner that an item ends, the neighbours' attempts are broken off; the culprit alone has failed."""
    async with house(num_parallel=4, settings={"slots": 4}) as h:
        seen = await h.run([chat("culprit", "[[crash=2]]"), *chats(3, "[[tokens=9]] {}")])
    spans = await asyncio.to_thread(collector.wait_for, has_ended)

    assert seen.states() == {"culprit": "FAILED", "i0": "COMPLETED", "i1": "COMPLETED", "i2": "COMPLETED"}
    (root,) = tree_of(spans)
    group = root.child("group fake:latest")
    items = {
        str(node.span.attributes["unisono.item_id"]): node for node in group.children if node.span.name == "chat fake"
    }
    culprit = items.pop("culprit")
    assert (culprit.span.status, culprit.span.status_message) == (Status.ERROR, "RUNNER_DIED")
    for item in items.values():
        assert item.span.status is Status.UNSET
        assert item.span.attributes["unisono.attempts"] == 1
        assert item.span.attributes["unisono.disturbed"] == events(item).count("broken_off") >= 1
        assert events(item).count("released") == 1 + events(item).count("broken_off")
        for attributes in (item.span.attributes, *(event.attributes for event in item.span.events)):
            assert "error.type" not in attributes
    deaths = group.span.attributes["unisono.runner_deaths"]
    assert isinstance(deaths, int)
    assert deaths >= 3


async def test_a_group_tells_its_figures(collector: OtlpReceiver) -> None:
    """What the report says of families, slots, costs and idle slots is on the group's span, to be searched for."""
    async with house(num_parallel=2, pass_s=0.002, settings={"slots": 2}) as h:
        alike = "You are one of many. " * 40
        seen = await h.run([*chats(8, alike + "[[tokens=12]] {}"), chat("apart", "[[tokens=30]]")])
        (report,) = seen.report.groups
    spans = await asyncio.to_thread(collector.wait_for, has_ended)

    (root,) = tree_of(spans)
    assert root.child("plan").span.attributes["unisono.families"] == 1
    figures = root.child("group fake:latest").span.attributes
    assert figures["unisono.families"] == 1
    assert figures["unisono.largest_family"] == 8
    assert (figures["unisono.slots"], figures["unisono.slot_source"]) == (2, "configured")
    assert figures["unisono.duration_s"] == pytest.approx(report.duration.ToNanoseconds() / 1e9, rel=1e-5)
    assert figures["unisono.runner_deaths"] == 0
    assert figures["unisono.passes"] == report.passes.count
    # The last item alone has one slot, and nobody has the other.
    assert any(name.startswith("unisono.idle_") and name.endswith("_s") for name in figures)
    # What a pass costs is told where passes of several sizes were seen, here as in the report.
    assert ("unisono.pass_cost_s" in figures) == report.HasField("costs")


def has_ended(spans: tuple[SeenSpan, ...]) -> bool:
    """Whether a batch's own span has arrived, which ends last."""
    return any(span.kind is Kind.SERVER for span in spans)


def events(node: Node) -> list[str]:
    """The names of a span's events, in order."""
    return [event.name for event in node.span.events]
