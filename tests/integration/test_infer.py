"""One conversation by itself: a batch of one item, with all that a batch has."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.fakes.otlp import OtlpReceiver, tree_of
from tests.integration.service import Seen, chat, embed, generate, house, reason_of, refused, span
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2, item_pb2


async def test_one_answer() -> None:
    """The events of a batch of one item: its acceptance first, the report last."""
    async with house(num_parallel=4) as h:
        seen = await h.infer(chat("mine", "[[say=hello there]]")).to_end()
        assert seen.results["mine"].completion.content == "hello there"
        assert seen.kinds[0] == "accepted"
        assert seen.of("accepted")[0].item_count == 1
        assert seen.sequences == list(range(1, len(seen.sequences) + 1))
        assert seen.report.counts.completed == 1


@pytest.mark.parametrize(
    "item",
    [chat("", "[[say=hello]]"), generate("", "[[say=hello]]"), embed("", "red")],
    ids=["chat", "prompt", "embed"],
)
async def test_an_item_needs_no_name(item: item_pb2.Item) -> None:
    """There is no other to tell it from: it is called 0."""
    async with house() as h:
        seen = await h.infer(item).to_end()
        assert seen.states() == {"0": "COMPLETED"}


async def test_text_comes_as_it_is_said_where_it_is_asked_for() -> None:
    """All of it before the result, and none where nobody asked."""
    async with house(pass_s=0.005) as h:
        deltas = pb.DeltaConfig(flush_interval=span(0.01))
        seen = await h.infer(chat("a", "[[say=one two three four]]"), deltas=deltas).to_end()
        said = [delta.content for event in seen.of("deltas") for delta in event.items]
        assert "".join(said) == "one two three four"
        assert len(said) > 1
        assert seen.kinds.index("result") > max(i for i, kind in enumerate(seen.kinds) if kind == "deltas")
        silent = await h.infer(chat("a", "[[say=one two]]")).to_end()
        assert not silent.of("deltas")


async def test_a_failure_is_a_result_here_too() -> None:
    """What only the backend can know does not end the call."""
    async with house() as h:
        seen = await h.infer(chat("a", model="nosuch")).to_end()
        assert reason_of(seen.results["a"]) == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(
    ("item", "fields"),
    [
        (item_pb2.Item(), ["item.request"]),
        (item_pb2.Item(chat=item_pb2.ChatRequest()), ["item.chat.messages"]),
        (
            item_pb2.Item(
                chat=item_pb2.ChatRequest(messages=[item_pb2.Message()]), options=item_pb2.Options(top_p=2.0)
            ),
            ["item.chat.messages[0].role"],
        ),
        (chat("x" * 300, temperature=-1.0), ["item.item_id", "item.options.temperature"]),
    ],
    ids=["nothing", "no message", "no role", "several"],
)
async def test_a_malformed_item_refuses_the_call(item: item_pb2.Item, fields: list[str]) -> None:
    """With the paths of its fields in the request, also where a batch would let it fail alone."""
    async with house() as h:
        for validation in (pb.VALIDATION_MODE_STRICT, pb.VALIDATION_MODE_PER_ITEM):
            refusal = await refused(h.infer(item, validation=validation))
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
            assert refusal.fields == fields
        assert h.batches.running == 0


async def test_one_item_cannot_be_required_to_run_together() -> None:
    """There is nobody beside it; and a stream is never whole."""
    async with house() as h:
        refusal = await refused(h.infer(chat("a"), co_scheduling=pb.CO_SCHEDULING_REQUIRED))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["config.co_scheduling"])
        stream = await h.stream().open(co_scheduling=pb.CO_SCHEDULING_REQUIRED)
        refusal = await refused(stream)
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["open.config.co_scheduling"])


async def test_the_same_request_joins_the_same_batch() -> None:
    """By its request_id; other content is refused."""
    async with house() as h:
        first = await h.infer(chat("a", "[[say=once]]"), request_id="r").to_end()
        again = await h.infer(chat("a", "[[say=once]]"), request_id="r").to_end()
        assert again.events == first.events
        assert len(h.work) == 1
        for changed in ({"priority": pb.PRIORITY_HIGH}, {"max_concurrency": 1}):
            refusal = await refused(h.infer(chat("a", "[[say=once]]"), request_id="r", **changed))
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
        # Another rpc's request is another one, though its items are the same.
        assert (
            await refused(h.run_batch([chat("a", "[[say=other]]")], request_id="r"))
        ).reason == "REQUEST_ID_REUSED"


async def test_a_caller_that_goes_away_takes_its_item_with_it() -> None:
    """Or leaves it behind, where it says so."""
    async with house(pass_s=0.005) as h:
        call = h.infer(chat("a", "[[tokens=2000]]"))
        _ = await call.until("released")
        await call.lose()
        await h.fake.wait_for(lambda fake: fake.busy_slots == 0)
        detached = h.infer(chat("b", "[[tokens=20]]"), on_disconnect=pb.ON_DISCONNECT_DETACH)
        _ = await detached.until("released")
        await detached.lose()
        seen = await h.attach(detached.seen.batch_id)
        assert seen.states() == {"b": "COMPLETED"}


async def test_the_call_s_deadline_is_met_a_little_early() -> None:
    """So that the caller hears how its item ended."""
    async with house(pass_s=0.01) as h:
        seen = await h.infer(chat("a", "[[tokens=5000]]"), timeout=0.6).to_end()
        assert reason_of(seen.results["a"]) == "BATCH_DEADLINE"
        assert seen.summary.state == event_pb2.BATCH_STATE_EXPIRED


async def test_many_at_one_time() -> None:
    """Each has its own batch and its own answer."""
    async with house(num_parallel=4, pass_s=0.001) as h:
        calls = [h.infer(chat("", f"[[say=number {n}]]")) for n in range(12)]
        seen: list[Seen] = await asyncio.gather(*(call.to_end() for call in calls))
        assert [one.results["0"].completion.content for one in seen] == [f"number {n}" for n in range(12)]
        assert len({one.batch_id for one in seen}) == 12


async def test_its_trace_is_named_for_it(otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root span is the rpc that was called."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    async with house() as h:
        _ = await h.infer(chat("a")).to_end()
    spans = await asyncio.to_thread(otlp.wait_for, lambda spans: len(spans) >= 4)
    (root,) = tree_of(spans)
    assert root.span.name == "unisono.v1.BatchInference/Infer"
