"""`unisono trace-check` finds nothing wrong with the traces of real batches, and shows what happened in them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tests.fakes.jaeger import FakeJaeger, answer_of
from tests.fakes.ollama import Fault, FaultKind
from tests.fakes.otlp import OtlpReceiver
from tests.fakes.scripted_batch import SECRET, Place, ScriptedBatch, arrived, play, tracing
from tests.integration.service import House, Seen, chat, chats, config, embed, house
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono.edge.cli.errors import ExitCode
from unisono.edge.cli.terminal import Terminal
from unisono.edge.cli.trace_check import Kind, check
from unisono.edge.cli.trace_command import TraceOptions, check_trace
from unisono.edge.cli.trace_spans import Span, read_spans
from unisono.edge.cli.trace_tree import draw_tree

FOUR: dict[str, Any] = {"num_parallel": 4, "settings": {"slots": 4}}
ASKED = "moonlight"


@pytest.fixture
def collector(otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> OtlpReceiver:
    """A collector that the standard variables name, as an operator would set them."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    return otlp


@pytest.fixture
def jaeger(otlp: OtlpReceiver) -> Iterator[FakeJaeger]:
    """A Jaeger that stores what the receiver gets."""
    with FakeJaeger(lambda: otlp.bodies) as fake:
        yield fake


def traces(otlp: OtlpReceiver, *, base64_ids: bool = False) -> list[tuple[Span, ...]]:
    """The traces that have arrived, as Jaeger gives them; the service has been stopped, which flushes."""
    by_trace: dict[str, list[Span]] = {}
    for span in read_spans(answer_of(otlp.bodies, base64_ids=base64_ids)):
        by_trace.setdefault(span.trace_id, []).append(span)
    return [tuple(spans) for spans in by_trace.values()]


def drawn(spans: Iterable[Span], items: int = 40) -> list[str]:
    """The tree, without colour."""
    return [row.label + row.bar for row in draw_tree(tuple(spans), 110, items=items)]


def labels(spans: Iterable[Span], items: int = 40) -> list[str]:
    """The first words of each row: name, and what is said of it."""
    return [line.lstrip("│├└─ ").split("  ")[0] for line in drawn(spans, items)]


# -- Batches over the stand-in -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base64_ids", [False, True])
async def test_an_ordinary_batch(collector: OtlpReceiver, *, base64_ids: bool) -> None:
    """Service, plan, group, load, release, and each item by its own name; none of its words."""
    async with house(**FOUR) as h:
        _ = await h.run(chats(6, ASKED + " {} [[tokens=5]]"))
    (spans,) = traces(collector, base64_ids=base64_ids)
    assert check(spans, texts=(ASKED,)) == ()
    group = ["group fake:latest", "load", "release"]
    assert labels(spans) == ["RunBatch", "plan", *group, *(f"i{n}" for n in range(6))]


async def test_the_caller_s_own_span_is_the_root(collector: OtlpReceiver) -> None:
    """Caller → service: another service, which sends its span to the same place."""
    caller = tracing(collector, OTEL_SERVICE_NAME="shop")
    async with house(**FOUR) as h:
        with caller.provider.get_tracer("shop").start_as_current_span("ask"):
            carrier: dict[str, str] = {}
            TraceContextTextMapPropagator().inject(carrier)
            _ = await of_a_batch(h, carrier)
    _ = await asyncio.to_thread(arrived, caller, collector)
    (spans,) = traces(collector)
    assert check(spans) == ()
    assert labels(spans)[:4] == ["ask", "RunBatch", "plan", "group fake:latest"]
    assert {span.service for span in spans} == {"shop", "unisono"}


async def test_a_retried_item_shows_each_attempt(collector: OtlpReceiver) -> None:
    """One below the other, the first with why it failed."""
    async with house(**FOUR) as h:
        h.fake.faults.add(
            Fault(FaultKind.RESET, path="/api/chat", when=lambda body: "again" in str(body), after_lines=1)
        )
        _ = await h.run([chat("again", "again [[tokens=5]]"), *chats(2, "[[tokens=5]] {}")])
    (spans,) = traces(collector)
    assert check(spans) == ()
    lines = drawn(spans)
    (at,) = [number for number, line in enumerate(lines) if "again  chat, 2 attempts" in line]
    assert "attempt 1  CONNECTION_LOST" in lines[at + 1]
    assert "attempt 2" in lines[at + 2]


async def test_a_runner_that_dies_and_is_loaded_again(collector: OtlpReceiver) -> None:
    """Several loads, attempts that were broken off by another item's, and the culprit's own, in their order."""
    async with house(**FOUR) as h:
        _ = await h.run([chat("culprit", "[[crash=2]]"), *chats(3, "[[tokens=9]] {}")])
    (spans,) = traces(collector)
    assert check(spans) == ()
    assert labels(spans).count("load") > 1
    assert any("broken off: RUNNER_DIED" in line for line in drawn(spans))


async def test_a_wave_of_several_callers(collector: OtlpReceiver) -> None:
    """One trace stands for the wave, and the items of the other link to it; without these links that is found."""
    async with house(**FOUR) as h:
        h.fake.hold_loads()
        calls = [h.run_batch(chats(2, "[[tokens=4]] {}")) for _ in range(2)]
        for call in calls:
            _ = await call.until("group_planned")
        h.fake.release_loads()
        _ = await asyncio.gather(*(call.to_end() for call in calls))
    both = traces(collector)
    assert [check(spans) for spans in both] == [(), ()]
    for spans in both:
        assert any("2 of others" in line for line in drawn(spans))
    (linked,) = [spans for spans in both if any(span.links for span in spans)]
    (finding,) = check([replace(span, links=()) for span in linked])
    assert finding.kind is Kind.NO_WAVE_LINK


async def test_texts_of_several_callers_in_one_request(collector: OtlpReceiver) -> None:
    """Embeddings that were bundled belong to one wave as well, and lead to it."""
    # A window in which all are caught who come while the first one's text is computed.
    async with house(settings={"batch_timeout": 0.3}) as h:
        _ = await h.run([embed("warm", "x")])
        h.fake.hold_passes()
        calls = [h.infer(embed("", "first"))]
        await h.fake.wait_for(lambda fake: fake.busy_slots == 1)
        calls += [h.infer(embed("", f"text {n}")) for n in range(4)]
        for call in calls[1:]:
            _ = await call.until("group_planned")
        h.fake.release_passes()
        _ = await asyncio.gather(*(call.to_end() for call in calls))
        joined = sum(len(request.body["input"]) - 1 for request in h.work)
    found = traces(collector)
    assert [check(spans) for spans in found] == [()] * 6
    assert sum(bool(span.links) for spans in found for span in spans) == joined > 0


async def test_a_large_batch_is_sampled_and_readable(collector: OtlpReceiver) -> None:
    """1,500 items: 1,000 spans, which is what the group says; and a drawing that fits on a screen."""
    async with house(**FOUR) as h:
        _ = await h.run(chats(1500, "[[tokens=1]] {}"))
    (spans,) = traces(collector)
    assert check(spans) == ()
    assert sum(span.is_item for span in spans) == 1000
    lines = drawn(spans)
    assert len(lines) < 60
    assert "items left out  500 without a span  " in lines[-2]
    assert lines[-1].endswith("… and 960 more items")


async def test_a_cancelled_batch(collector: OtlpReceiver) -> None:
    """Some items were at the backend, others had not begun: nothing is wrong with the trace."""
    async with house(**FOUR, pass_s=0.01) as h:
        call = h.run_batch(chats(40, "[[tokens=400]] {}"))
        _ = await call.until("released")
        _ = await h.cancel(call.seen.batch_id)
        _ = await call.to_end()
    (spans,) = traces(collector)
    assert check(spans) == ()
    assert "RunBatch  40 items, cancelled" in drawn(spans)[0]


def test_text_is_found_where_its_capture_is_on(otlp: OtlpReceiver) -> None:
    """And only there."""
    telemetry = tracing(otlp, OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT="true")
    play(ScriptedBatch(telemetry.listener([Place()])))
    _ = arrived(telemetry, otlp)
    (spans,) = traces(otlp)
    found = [finding for finding in check(spans, texts=(SECRET,)) if finding.kind is Kind.CONTENT]
    assert {finding.what.split()[0] for finding in found} >= {"gen_ai.input.messages", "gen_ai.output.messages"}


# -- The command, over a Jaeger ----------------------------------------------------------------------------------


async def ask(jaeger: FakeJaeger, wanted: str, **options: object) -> int:
    """Runs the command."""
    made = TraceOptions(**{"wanted": wanted, "jaeger": jaeger.url, "wait_s": 0.0, **options})  # type: ignore[arg-type]
    return await check_trace(made, Terminal.standard())


async def of_a_batch(h: House, carrier: dict[str, str] | None = None) -> str:
    """Runs one; its id."""
    seen = Seen()
    request = pb.RunBatchRequest(config=config(), items=chats(3, "[[tokens=3]] {}"))
    async for response in h.stub.RunBatch(request, metadata=tuple((carrier or {}).items())):
        seen.add(response.event)
    return seen.batch_id


@pytest.mark.parametrize("searches_attributes", [True, False])
async def test_a_batch_is_found_by_its_id(
    collector: OtlpReceiver, jaeger: FakeJaeger, capsys: pytest.CaptureFixture[str], *, searches_attributes: bool
) -> None:
    """Of several that are stored, also in a Jaeger that cannot search by attribute."""
    jaeger.searches_attributes = searches_attributes
    async with house(**FOUR) as h:
        ids = [await of_a_batch(h) for _ in range(3)]
    assert await ask(jaeger, ids[1]) == ExitCode.DONE
    out, err = capsys.readouterr()
    assert out.startswith("Trace ")
    assert out.endswith("Nothing is wrong with it.\n")
    assert out.count("RunBatch") == 1
    assert err == ""
    assert "raw_traces=true" in jaeger.asked[0]


async def test_a_trace_is_found_by_its_id(
    collector: OtlpReceiver, jaeger: FakeJaeger, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a caller knows it that began it."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with house(**FOUR) as h:
        _ = await of_a_batch(h, {"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
    assert await ask(jaeger, trace.upper()) == ExitCode.DONE
    assert f"Trace {trace}" in capsys.readouterr().out
    assert jaeger.asked == [f"/api/v3/traces/{trace}?raw_traces=true"]


# -- A real Jaeger -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    "UNISONO_LIVE_JAEGER" not in os.environ, reason="needs a Jaeger, whose query API is in UNISONO_LIVE_JAEGER"
)
async def test_a_real_jaeger(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Takes the trace (UNISONO_LIVE_JAEGER_OTLP, by default 127.0.0.1:4317), and gives it back by the batch's id."""
    endpoint = os.environ.get("UNISONO_LIVE_JAEGER_OTLP", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    async with house(**FOUR) as h:
        batch_id = await of_a_batch(h)
    options = TraceOptions(wanted=batch_id, jaeger=os.environ["UNISONO_LIVE_JAEGER"], wait_s=15)
    assert await check_trace(options, Terminal.standard()) == ExitCode.DONE, capsys.readouterr().out
