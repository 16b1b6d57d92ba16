"""Waves that several callers share: their traces stay apart, and are linked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.fakes.otlp import OtlpReceiver, SeenSpan
from tests.fakes.scripted_batch import (
    Place,
    ScriptedBatch,
    arrived,
    chat_item,
    completed,
    of_item,
    stopped,
    tracing,
)
from tests.integration.service import chat, chats, house
from unisono.adapters.telemetry import spans as parts
from unisono.adapters.telemetry.setup import configure
from unisono.adapters.telemetry.trace import TraceListener
from unisono.app.ports import Listener
from unisono.core.errors import ConnectionLostError

RPC = ("unisono.v1.BatchInference/RunBatch", "unisono.v1.BatchInference/Infer")
UNSAMPLED = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}


def three(listener: Listener, *, carriers: tuple[dict[str, str], ...] = ({}, {}, {})) -> list[ScriptedBatch]:
    """Three batches of two items each that wait for their release."""
    batches = [ScriptedBatch(listener, batch_id=str(n), carrier=carrier) for n, carrier in enumerate(carriers)]
    for batch in batches:
        batch.plan("smol", items=2)
        batch.stage(chat_item(0), chat_item(1))
    return batches


def end(batch: ScriptedBatch) -> None:
    """Both its items are answered."""
    batch.finish(completed(chat_item(0)), completed(chat_item(1)))
    batch.end()


def by_batch(spans: tuple[SeenSpan, ...]) -> dict[str, tuple[SeenSpan, ...]]:
    """The spans of each batch, by its id."""
    name_of = {
        span.trace_id: str(span.attributes["unisono.batch_id"])
        for span in spans
        if "unisono.batch_id" in span.attributes
    }
    return {name: tuple(span for span in spans if span.trace_id == trace) for trace, name in name_of.items()}


def releases(spans: tuple[SeenSpan, ...]) -> list[SeenSpan]:
    """The spans of releases."""
    return [span for span in spans if span.name == "release"]


def linked(span: SeenSpan) -> list[str]:
    """The spans that it links to."""
    return [link.span_id for link in span.links]


# -- As the application tells it ---------------------------------------------------------------------------------


def test_items_of_a_common_wave_link_to_the_span_of_its_first_batch(otlp: OtlpReceiver) -> None:
    """From the side of the items, and only of the other batches: the first one's are in the wave's own trace."""
    telemetry = tracing(otlp)
    batches = three(telemetry.listener([Place()]))
    for batch in batches:
        batch.release(chat_item(0), chat_item(1), others=4, wave_key=7)
    for batch in batches:
        end(batch)
    first, *others = by_batch(arrived(telemetry, otlp)).values()

    (wave,) = releases(first)
    assert all(span.links == () for span in first)
    for spans in others:
        for index in (0, 1):
            (link,) = of_item(spans, index).links
            assert (link.trace_id, link.span_id) == (wave.trace_id, wave.span_id)
            assert dict(link.attributes) == {"unisono.attempt": 1}
        assert [span.links for span in spans if "unisono.index" not in span.attributes] == [()] * 4


def test_a_wave_of_one_batch_links_to_nothing(otlp: OtlpReceiver) -> None:
    """Two batches that go one after the other have nothing in common."""
    telemetry = tracing(otlp)
    one, two, _ = batches = three(telemetry.listener([Place()]))
    one.release(chat_item(0), chat_item(1), wave_key=1)
    two.release(chat_item(0), chat_item(1), wave_key=2)
    for batch in batches:
        end(batch)
    assert all(span.links == () for span in arrived(telemetry, otlp))


def test_each_attempt_links_to_its_own_wave(otlp: OtlpReceiver) -> None:
    """An item that went twice with others belongs to two waves."""
    telemetry = tracing(otlp)
    one, two, _ = batches = three(telemetry.listener([Place()]))
    for batch in (one, two):
        batch.release(chat_item(0), others=1, wave_key=3)
    for batch in (one, two):
        batch.retry(chat_item(0), ConnectionLostError(""))
        batch.stage(chat_item(0), attempt=2)
    for batch in (one, two):
        batch.release(chat_item(0), others=1, wave=1, wave_key=4)
    for batch in batches:
        end(batch)
    spans = by_batch(arrived(telemetry, otlp))
    item = of_item(spans["1"], 0)
    assert linked(item) == [span.span_id for span in releases(spans["0"])]
    assert [link.attributes["unisono.attempt"] for link in item.links] == [1, 2]


def test_a_trace_that_is_not_sampled_is_linked_to_by_nobody(otlp: OtlpReceiver) -> None:
    """Its span would not be found: the next batch's stands for the wave."""
    telemetry = tracing(otlp)
    batches = three(telemetry.listener([Place()]), carriers=(UNSAMPLED, {}, {}))
    for batch in batches:
        batch.release(chat_item(0), chat_item(1), others=4, wave_key=7)
    for batch in batches:
        end(batch)
    spans = by_batch(arrived(telemetry, otlp))
    assert set(spans) == {"1", "2"}
    (wave,) = releases(spans["1"])
    assert [linked(of_item(spans["1"], index)) for index in (0, 1)] == [[], []]
    assert [linked(of_item(spans["2"], index)) for index in (0, 1)] == [[wave.span_id]] * 2


def test_an_item_whose_span_is_made_afterwards_has_its_links(otlp: OtlpReceiver) -> None:
    """It was one too many for a span of its own, and then it failed."""
    telemetry = tracing(otlp)
    one, two, _ = batches = three(telemetry.listener([Place()], item_limit=1))
    for batch in (one, two):
        batch.release(chat_item(0), chat_item(1), others=2, wave_key=7)
    two.finish(stopped(chat_item(1), ConnectionLostError("")))
    for batch in batches:
        end(batch)
    spans = by_batch(arrived(telemetry, otlp))
    assert linked(of_item(spans["1"], 1)) == [releases(spans["0"])[0].span_id]
    assert of_item(spans["1"], 1).attributes["unisono.lane"] == 1


def test_common_waves_are_forgotten() -> None:
    """Only the last thousand are remembered, and by name alone: no span outlives its batch for their sake."""
    telemetry = configure("1", {})
    assert telemetry is not None
    listener = telemetry.listener([Place()], item_limit=5000)
    assert isinstance(listener, TraceListener)
    batch = ScriptedBatch(listener)
    batch.plan("smol")
    for key in range(3 * parts._MAX_SHARED_WAVES):
        batch.release(others=1, wave_key=key)
    waves = listener._shared_waves
    assert len(waves) == parts._MAX_SHARED_WAVES
    assert waves.get(2 * parts._MAX_SHARED_WAVES - 1) is None
    assert waves.get(2 * parts._MAX_SHARED_WAVES) is not None


# -- Through the service -----------------------------------------------------------------------------------------


@pytest.fixture
def collector(otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> OtlpReceiver:
    """A collector that the standard variables name, as an operator would set them."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    return otlp


def is_whole(batches: int) -> Callable[[tuple[SeenSpan, ...]], bool]:
    """Whether the spans of the rpcs have arrived, which end last."""
    return lambda spans: sum(span.name in RPC for span in spans) == batches


def crossing(spans: tuple[SeenSpan, ...]) -> dict[str, list[SeenSpan]]:
    """The items that link to a wave of another batch, by the wave's span; every link leads to such a span."""
    waves = {span.span_id: span for span in spans if span.name == "release"}
    found: dict[str, list[SeenSpan]] = {}
    for span in spans:
        for link in span.links:
            wave = waves[link.span_id]
            assert (link.trace_id, link.trace_id != span.trace_id) == (wave.trace_id, True)
            assert wave.attributes["unisono.others"] > 0  # type: ignore[operator]
            found.setdefault(wave.span_id, []).append(span)
    return found


async def test_lone_requests_of_one_wave_are_linked(collector: OtlpReceiver) -> None:
    """Single calls that went together: one has the wave's span, the others link to it."""
    async with house(num_parallel=4, settings={"slots": 4}) as h:
        h.fake.hold_loads()
        calls = [h.infer(chat(f"lone{n}", "[[tokens=3]]")) for n in range(3)]
        for call in calls:
            _ = await call.until("group_planned")
        h.fake.release_loads()
        _ = await asyncio.gather(*(call.to_end() for call in calls))
    spans = await asyncio.to_thread(collector.wait_for, is_whole(3))

    ((wave, items),) = crossing(spans).items()
    (first,) = [span for span in spans if span.span_id == wave]
    # Each in a trace of its own, and all of these lead to the first.
    assert first.attributes["unisono.items"] == 1
    assert first.attributes["unisono.others"] == len(items) >= 1
    assert len({first.trace_id, *(span.trace_id for span in items)}) == 1 + len(items)


async def test_batches_of_one_wave_are_linked(collector: OtlpReceiver) -> None:
    """Two callers' batches that wait for one load go out together; and the spans tell why and whereto."""
    async with house(num_parallel=4, settings={"slots": 4}) as h:
        h.fake.hold_loads()
        calls = [h.run_batch(chats(2, "[[tokens=4]] {}")) for _ in range(2)]
        for call in calls:
            _ = await call.until("group_planned")
        h.fake.release_loads()
        _ = await asyncio.gather(*(call.to_end() for call in calls))
        assert [event.others for call in calls for event in call.seen.of("released")] == [2, 2]
    spans = await asyncio.to_thread(collector.wait_for, is_whole(2))

    ((wave, items),) = crossing(spans).items()
    assert len(items) == 2
    (first,) = [span for span in spans if span.span_id == wave]
    answered = [span for span in spans if span.name == "chat fake"]
    assert {span.attributes["unisono.lane"] for span in answered} == set(range(4))
    for item in answered:
        assert item.attributes["unisono.release_reason"] == "longest"
        (released,) = [event for event in item.events if event.name == "released"]
        assert released.attributes["unisono.wave"] == first.attributes["unisono.wave"] == 0
    groups = [span for span in spans if span.name.startswith("group")]
    assert len(groups) == 2
    for group in groups:
        assert group.attributes["unisono.slots_limit"] == 4
        assert group.attributes["unisono.context_reason"]
        assert group.attributes["unisono.runner_deaths"] == 0


async def test_a_wave_has_its_group_s_number(collector: OtlpReceiver) -> None:
    """On a runner that has made many releases, an item's wave is still the one of its batch's release span."""
    async with house(num_parallel=2, settings={"slots": 2}) as h:
        _ = await h.run(chats(5, "[[tokens=2]] {}"))
        _ = await h.run(chats(2, "[[tokens=2]] {}"))
    spans = await asyncio.to_thread(collector.wait_for, is_whole(2))
    last = max((span for span in spans if span.name == "release"), key=lambda span: span.start_ns)
    events = [event for span in spans if span.trace_id == last.trace_id for event in span.events]
    assert [event.attributes["unisono.wave"] for event in events if event.name == "released"] == [0, 0]
    assert last.attributes["unisono.wave"] == 0
