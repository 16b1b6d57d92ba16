"""StreamBatch through the real port: items come in while results go out."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from itertools import pairwise
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.fakes.ollama import Answer
from tests.integration.service import (
    LIMIT_S,
    House,
    Stream,
    chat,
    chats,
    config,
    house,
    reason_of,
    refusal_of,
    refused,
    span,
)
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.grpc import stream as stream_module
from unisono.edge.grpc.stream import BatchStream

# Items go by an explicit release, or at the half-close, and not by themselves.
BY_HAND = pb.ReleasePolicy(size=1_000_000, interval=span(0))
DETACH = pb.ON_DISCONNECT_DETACH


# -- The first message -----------------------------------------------------------------------------------------


async def test_the_first_message_must_open_the_stream() -> None:
    """INVALID_ARGUMENT where the first message is another, says nothing, or is missing."""
    async with house() as h:
        for message in (
            {"add_items": pb.AddItems(items=chats(1))},
            {"release": pb.Release()},
            {},
            {"open": pb.StreamBatchOpen()},
        ):
            stream = h.stream()
            _ = await stream.send(**message)
            no = await refused(stream)
            assert (no.code, no.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
            assert no.fields[0].startswith("open")
        stream = h.stream()
        _ = await stream.half_close()
        assert (await refused(stream)).fields == ["open"]
        assert not h.work


async def test_no_later_message_may_open_the_stream() -> None:
    """A second `open`, or an empty message, ends the stream with INVALID_ARGUMENT and cancels the batch (CANCEL)."""
    async with house() as h:
        for message in ({"open": pb.StreamBatchOpen(config=config())}, {}):
            h.fake.hold_passes()
            stream = await h.stream().open()
            _ = await stream.add(*chats(2))
            _ = await stream.until_acked(2)
            _ = await stream.send(**message)
            no = await refused(stream)
            assert (no.code, no.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
            seen = await h.attach(stream.seen.batch_id)
            assert seen.summary.state == event_pb2.BATCH_STATE_CANCELLED


# -- Acknowledgements and credit -------------------------------------------------------------------------------


async def test_items_are_acknowledged_in_order_and_before_their_results() -> None:
    """Each item has one acknowledgement with its index, in the order in which they came, before its result."""
    async with house(settings={"slots": 4}) as h:
        stream = await h.stream().open(release=pb.ReleasePolicy(size=1))
        for n in range(0, 30, 3):
            _ = await stream.add(*[chat(f"i{k}", num_predict=1) for k in range(n, n + 3)])
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert stream.log[:2] == ["accepted", "credit"]
        assert seen.of("accepted")[0].item_count == 0
        assert [ack.item_id for ack in stream.acks] == [f"i{n}" for n in range(30)]
        assert [ack.index for ack in stream.acks] == list(range(30))
        assert not [ack for ack in stream.acks if ack.HasField("refusal")]
        for n in range(30):
            assert stream.log.index(f"ack i{n}") < stream.log.index(f"result i{n}")
        assert {name: result.index for name, result in seen.results.items()} == {f"i{n}": n for n in range(30)}
        assert seen.sequences == list(range(1, len(seen.sequences) + 1))


async def test_items_beyond_the_credit_are_refused_and_the_stream_goes_on() -> None:
    """The credit is told at first and as items end; what is sent beyond it is refused, and may be sent again."""
    async with house(settings={"max_open_items": 4}) as h:
        h.fake.hold_passes()
        stream = await h.stream().open()
        _ = await stream.until(lambda s: s.credits)
        assert stream.credits == [4]
        _ = await stream.add(*chats(6, num_predict=1))
        _ = await stream.until_acked(6)
        refusals = [refusal_of(ack.refusal) for ack in stream.acks if ack.HasField("refusal")]
        assert [ack.item_id for ack in stream.acks if ack.HasField("refusal")] == ["i4", "i5"]
        assert {(no.code, no.reason) for no in refusals} == {(grpc.StatusCode.RESOURCE_EXHAUSTED, "CREDIT_EXCEEDED")}
        assert all(no.retry_after_s for no in refusals)
        assert not any(ack.HasField("index") for ack in stream.acks[4:])
        h.fake.release_passes()
        _ = await stream.until(lambda s: s.credits[-1] >= 6)
        _ = await stream.add(*chats(6)[4:])
        _ = await stream.half_close()
        seen = await stream.to_end()
        # Refused items were no part of the batch; the indexes go on without them.
        assert {name: result.index for name, result in seen.results.items()} == {f"i{n}": n for n in range(6)}
        assert all(before <= after for before, after in pairwise(stream.credits))


async def test_credit_never_stops_a_caller_that_keeps_to_it() -> None:
    """A caller that sends only what it has credit for gets rid of all its items."""
    async with house(settings={"max_open_items": 8, "slots": 4}) as h:
        stream = await h.stream().open()
        sent = 0
        while sent < 60:
            _ = await stream.until(lambda s: s.credits and s.credits[-1] > sent)  # noqa: B023  # awaited at once
            more = min(stream.credits[-1], 60) - sent
            _ = await stream.add(*[chat(f"i{n}", num_predict=1) for n in range(sent, sent + more)])
            sent += more
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert len(seen.results) == 60
        assert not [ack for ack in stream.acks if ack.HasField("refusal")]


async def test_the_last_credit_is_told_however_little_it_is() -> None:
    """A caller that keeps to its credit gets rid of as many items as a batch may have, also of the last few."""
    async with house(settings={"max_items": 9, "max_open_items": 8}) as h:
        stream = await h.stream().open()
        _ = await stream.add(*chats(8, num_predict=1))
        _ = await stream.until(lambda s: s.credits and s.credits[-1] == 9)
        _ = await stream.add(chat("last", num_predict=1))
        _ = await stream.half_close()
        assert set((await stream.to_end()).states().values()) == {"COMPLETED"}
        assert len(stream.seen.results) == 9


async def test_a_batch_takes_no_more_than_its_limit() -> None:
    """All items of a stream together are at most as many as a batch may have; the credit says so."""
    async with house(settings={"max_items": 5}) as h:
        stream = await h.stream().open()
        _ = await stream.add(*chats(7, num_predict=1))
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert len(seen.results) == 5
        assert max(stream.credits) == 5
        assert {refusal_of(ack.refusal).reason for ack in stream.acks[5:]} == {"BATCH_FULL"}


async def test_a_caller_that_writes_everything_before_it_reads_does_not_deadlock() -> None:
    """3,000 items, each in a message of its own, are taken while nothing is read."""
    async with house(settings={"slots": 4}, pass_s=0.01) as h:
        stream = await h.stream().open()
        for n in range(3000):
            _ = await stream.add(chat(f"i{n}", "x" * 200, num_predict=1))
        _ = await stream.half_close()
        await h.fake.wait_for(lambda fake: fake.completed > 10)
        _ = await stream.until_acked(3000)
        _ = await h.cancel(stream.seen.batch_id)
        seen = await stream.to_end()
        assert len(seen.results) == len(stream.acks) == 3000


async def test_what_waits_for_a_caller_that_does_not_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far beyond what any batch takes, a caller that reads nothing is not read either; when it reads, all goes on."""
    served: list[BatchStream] = []
    serve = BatchStream.serve

    async def watched(one: BatchStream, messages: Any) -> None:
        served.append(one)
        await serve(one, messages)

    monkeypatch.setattr(BatchStream, "serve", watched)
    messages, most = 150, 0
    async with house(settings={"max_items": 200, "max_open_items": 100}) as h:
        stream = await h.stream().open()

        async def write() -> None:
            nonlocal most
            for n in range(messages):
                _ = await stream.add(*[chat(f"{'x' * 200}{n}-{k}") for k in range(100)])
                most = max([most, *[one._ack_count for one in served]])
            _ = await stream.half_close()

        writer = asyncio.get_running_loop().create_task(write())
        await h.fake.wait_for(lambda fake: fake.completed > 50)
        _ = await stream.to_end()
        await writer
        assert len(stream.acks) == messages * 100
        assert most <= 400


# -- Release ---------------------------------------------------------------------------------------------------


async def test_items_go_when_they_are_released() -> None:
    """Without size and time, nothing goes before `release`; then all that was added goes together."""
    async with house(settings={"slots": 8}, num_parallel=8) as h:
        stream = await h.stream().open(release=BY_HAND)
        _ = await stream.add(*chats(5, num_predict=2))
        _ = await stream.until_acked(5)
        # Another batch comes and goes meanwhile.
        _ = await h.run([chat("x", "other", num_predict=1)])
        assert len(h.work) == 1
        _ = await stream.release()
        _ = await stream.until(lambda s: len(s.seen.results) == 5)
        assert stream.seen.of("released")[0].item_count == 5
        # The batch is still open, and takes more.
        _ = await stream.add(chat("late", num_predict=1))
        _ = await stream.release()
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert len(seen.results) == 6
        assert [planned.item_count for planned in seen.of("group_planned")] == [5, 6]


async def test_items_go_when_there_are_enough() -> None:
    """ReleasePolicy.size: so many go together, the rest waits."""
    async with house(settings={"slots": 8}, num_parallel=8) as h:
        stream = await h.stream().open(release=pb.ReleasePolicy(size=3, interval=span(0)))
        _ = await stream.add(*chats(5, num_predict=2))
        _ = await stream.until(lambda s: len(s.seen.results) == 3)
        _ = await h.run([chat("x", num_predict=1)])
        assert len(stream.acks) == 5
        assert sorted(stream.seen.results) == ["i0", "i1", "i2"]
        _ = await stream.half_close()
        assert len((await stream.to_end()).results) == 5


async def test_items_go_when_the_oldest_has_waited_long_enough() -> None:
    """ReleasePolicy.interval: what was added goes after so long, without another word."""
    async with house() as h:
        stream = await h.stream().open(release=pb.ReleasePolicy(size=100, interval=span(0.05)))
        _ = await stream.add(*chats(2, num_predict=1))
        _ = await stream.until(lambda s: len(s.seen.results) == 2)
        _ = await stream.add(chat("more", num_predict=1))
        _ = await stream.until(lambda s: len(s.seen.results) == 3)
        _ = await stream.half_close()
        assert (await stream.to_end()).summary.state == event_pb2.BATCH_STATE_COMPLETED


async def test_the_half_close_releases_and_ends() -> None:
    """Half-closing means "no more items": what was added goes, and the stream ends after the summary."""
    async with house() as h:
        stream = await h.stream().open(release=BY_HAND)
        _ = await stream.add(*chats(3))
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert set(seen.states().values()) == {"COMPLETED"}
        assert seen.summary.state == event_pb2.BATCH_STATE_COMPLETED
        assert await stream.call.code() is grpc.StatusCode.OK
        # A batch without any item ends, too.
        empty = await h.stream().open()
        _ = await empty.half_close()
        assert (await empty.to_end()).kinds == ["accepted", "summary"]


async def test_items_are_added_while_results_flow() -> None:
    """A caller adds the next item when it has the result of the one before, as often as it likes."""
    async with house() as h:
        stream = await h.stream().open(release=pb.ReleasePolicy(size=1))
        for n in range(10):
            _ = await stream.add(chat(f"i{n}", num_predict=2))
            _ = await stream.until(lambda s: f"result i{n}" in s.log)  # noqa: B023  # awaited at once
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert list(seen.results) == [f"i{n}" for n in range(10)]
        assert h.fake.loads == 1


# -- Cancelling ------------------------------------------------------------------------------------------------


async def test_items_are_cancelled_on_the_stream() -> None:
    """`cancel_items` ends some items, also such as were not released; without ids all, and the stream ends."""
    async with house() as h:
        h.fake.hold_passes()
        stream = await h.stream().open(release=BY_HAND)
        _ = await stream.add(*chats(4))
        _ = await stream.release()
        _ = await stream.add(chat("waiting"), chat("other"))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        _ = await stream.cancel_items("i1", "waiting")
        _ = await stream.until(lambda s: len(s.seen.results) == 2)
        assert stream.seen.states() == {"i1": "CANCELLED", "waiting": "CANCELLED"}
        await h.fake.wait_for(lambda fake: fake.busy_slots == 3)
        _ = await stream.cancel_items()
        seen = await stream.to_end()
        assert set(seen.states().values()) == {"CANCELLED"}
        assert len(seen.results) == 6
        assert seen.summary.state == event_pb2.BATCH_STATE_CANCELLED
        await h.fake.wait_for(lambda fake: fake.open_connections == 0)


async def test_an_unknown_item_to_cancel_is_passed_over() -> None:
    """A cancel of an item that was refused, or never sent, costs nothing: it may overtake the acknowledgement."""
    async with house() as h:
        stream = await h.stream().open()
        _ = await stream.add(*chats(2, num_predict=1))
        _ = await stream.cancel_items("nobody")
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert set(seen.states().values()) == {"COMPLETED"}


# -- Malformed items -------------------------------------------------------------------------------------------


async def test_strict_a_malformed_item_refuses_its_message() -> None:
    """STRICT: all items of the message are refused, with the path in it of what is wrong; the stream goes on."""
    async with house() as h:
        stream = await h.stream().open()
        bad = chat("bad")
        bad.chat.messages[0].role = 0  # type: ignore[assignment]
        _ = await stream.add(chat("a"), bad, chat("b"))
        _ = await stream.add(chat("a"))
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert [(ack.item_id, ack.HasField("refusal")) for ack in stream.acks] == [
            ("a", True),
            ("bad", True),
            ("b", True),
            ("a", False),
        ]
        no = refusal_of(stream.acks[1].refusal)
        assert (no.code, no.fields) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            ["add_items.items[1].chat.messages[0].role"],
        )
        assert refusal_of(stream.acks[0].refusal).reason == "INVALID_REQUEST"
        assert list(seen.results) == ["a"]


async def test_per_item_a_malformed_item_becomes_a_failed_result() -> None:
    """PER_ITEM: it is accepted, fails at once, and the others run."""
    async with house() as h:
        stream = await h.stream().open(validation=pb.VALIDATION_MODE_PER_ITEM)
        _ = await stream.add(chat("a"), chat("bad", top_p=3.0), chat("b"))
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert not [ack for ack in stream.acks if ack.HasField("refusal")]
        assert seen.states() == {"a": "COMPLETED", "bad": "FAILED", "b": "COMPLETED"}
        assert reason_of(seen.results["bad"]) == "INVALID_REQUEST"
        assert stream.log.index("ack bad") < stream.log.index("result bad")


async def test_an_id_that_the_batch_has_is_refused() -> None:
    """A twice used item_id is refused with DUPLICATE_ITEM, and the first one runs."""
    async with house() as h:
        for mode in (pb.VALIDATION_MODE_STRICT, pb.VALIDATION_MODE_PER_ITEM):
            stream = await h.stream().open(validation=mode)
            _ = await stream.add(chat("a", "[[say=one]]"), chat("a", "[[say=two]]"))
            _ = await stream.add(chat("a", "[[say=one]]"))
            _ = await stream.half_close()
            seen = await stream.to_end()
            assert [ack.HasField("refusal") for ack in stream.acks] == [False, True, True]
            assert {refusal_of(ack.refusal).reason for ack in stream.acks[1:]} == {"DUPLICATE_ITEM"}
            assert seen.results["a"].completion.content == "one"


# -- Lost connections ------------------------------------------------------------------------------------------


async def test_a_cut_stream_is_reopened_and_nothing_is_lost_or_doubled() -> None:
    """Reopened after event N, a stream goes on with N+1; the same items are acknowledged again, others refused."""
    async with house(settings={"slots": 4}) as h:
        h.fake.hold_passes()
        stream = await h.stream().open(on_disconnect=DETACH, release=pb.ReleasePolicy(size=1))
        _ = await stream.add(*chats(6, num_predict=2))
        _ = await stream.until_acked(6)
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        before = stream.seen
        _ = stream.call.cancel()
        h.fake.release_passes()
        again = await h.stream().reopen(before.batch_id, before.sequences[-1])
        changed = chat("i5", "something else")
        _ = await again.add(*chats(5, num_predict=2), changed, chat("new", num_predict=1))
        _ = await again.half_close()
        after = await again.to_end()
        assert before.sequences + after.sequences == list(range(1, len(before.sequences + after.sequences) + 1))
        assert [(ack.item_id, ack.HasField("refusal")) for ack in again.acks] == [
            *[(f"i{n}", False) for n in range(5)],
            ("i5", True),
            ("new", False),
        ]
        assert [ack.index for ack in again.acks[:5]] == list(range(5))
        assert refusal_of(again.acks[5].refusal).reason == "DUPLICATE_ITEM"
        assert len(after.results) == 7
        assert set(after.states().values()) == {"COMPLETED"}
        assert len([request for request in h.work if request.outcome == "completed"]) == 7


async def test_a_reopened_stream_is_told_its_credit_at_once() -> None:
    """A caller that reopens a quiet batch learns how much it may send, though nothing happens."""
    async with house() as h:
        stream = await h.stream().open(on_disconnect=DETACH)
        _ = await stream.until(lambda s: s.credits)
        _ = stream.call.cancel()
        again = await h.stream().reopen(stream.seen.batch_id, stream.seen.sequences[-1])
        _ = await again.until(lambda s: s.credits)
        assert again.credits == stream.credits
        _ = await again.half_close()
        assert (await again.to_end()).kinds == ["summary"]


async def test_the_stream_that_was_replaced_ends_with_aborted() -> None:
    """When a batch is reopened while its former stream still stands, that one ends with STREAM_REPLACED."""
    async with house() as h:
        former = await h.stream().open(release=BY_HAND)
        _ = await former.add(chat("a"))
        _ = await former.until_acked(1)
        later = await h.stream().reopen(former.seen.batch_id)
        _ = await later.until(lambda s: s.seen.events)
        no = await refused(former)
        assert (no.code, no.reason) == (grpc.StatusCode.ABORTED, "STREAM_REPLACED")
        _ = await later.add(chat("b"))
        _ = await later.half_close()
        seen = await later.to_end()
        assert set(seen.states().values()) == {"COMPLETED"}
        assert len(seen.results) == 2


async def test_the_same_open_under_a_request_id_joins_the_same_batch() -> None:
    """request_id on a stream: the same config joins from the first event, and its items are sent again."""
    async with house() as h:
        first = await h.stream().open(request_id="r", on_disconnect=DETACH)
        _ = await first.add(*chats(3))
        _ = await first.until_acked(3)
        _ = first.call.cancel()
        again = await h.stream().open(request_id="r", on_disconnect=DETACH)
        _ = await again.add(*chats(3))
        _ = await again.half_close()
        seen = await again.to_end()
        assert seen.batch_id == first.seen.batch_id
        assert seen.sequences == list(range(1, len(seen.sequences) + 1))
        assert not [ack for ack in again.acks if ack.HasField("refusal")]
        assert len(seen.results) == 3
        other = await h.stream().open(request_id="r", on_disconnect=DETACH, model="fake-tools")
        assert (await refused(other)).reason == "REQUEST_ID_REUSED"


async def test_a_batch_that_took_its_last_item_takes_no_more() -> None:
    """After the half-close, a reopened stream follows the batch, and more items are refused with INPUT_CLOSED."""
    async with house() as h:
        h.fake.hold_passes()
        stream = await h.stream().open(on_disconnect=DETACH)
        _ = await stream.add(chat("a"))
        _ = await stream.half_close()
        _ = await stream.until(lambda s: s.seen.of("released"))
        again = await h.stream().reopen(stream.seen.batch_id)
        _ = await again.add(chat("b"))
        _ = await again.until_acked(1)
        assert refusal_of(again.acks[0].refusal).reason == "INPUT_CLOSED"
        h.fake.release_passes()
        assert list((await again.to_end()).results) == ["a"]


async def _is_still_open(h: House, lost: Stream) -> None:
    """The batch of a stream whose connection was cut still takes items: nobody has half-closed it."""
    batch_id = lost.seen.batch_id
    batch = h.batches.get(batch_id)
    async with asyncio.timeout(LIMIT_S):
        while batch.journal.has_readers:
            # The service has noticed the loss when nobody follows any more.
            _ = await h.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert not batch.is_over
    again = await h.stream().reopen(batch_id)
    _ = await again.add(chat("more", num_predict=1))
    _ = await again.until_acked(1)
    assert not again.acks[0].HasField("refusal")
    _ = await again.half_close()
    assert (await again.to_end()).summary.state == event_pb2.BATCH_STATE_COMPLETED


async def test_a_cancelled_call_is_no_half_close() -> None:
    """The caller cancels its call, many times over: the batch's input stays open each time."""
    async with house() as h:
        streams = []
        for _ in range(20):
            stream = await h.stream().open(on_disconnect=DETACH, release=BY_HAND)
            _ = await stream.add(chat("a", num_predict=1))
            streams.append(await stream.until_acked(1))
        for stream in streams:
            _ = stream.call.cancel()
        for stream in streams:
            await _is_still_open(h, stream)


async def test_a_closed_connection_is_no_half_close() -> None:
    """The caller's channel is closed with all its calls: the batches' input stays open."""
    async with house() as h:
        channel = h.dial()
        streams = []
        for _ in range(20):
            stream = Stream(type(h.stub)(channel).StreamBatch())
            _ = await stream.open(on_disconnect=DETACH, release=BY_HAND)
            _ = await stream.add(chat("a", num_predict=1))
            streams.append(await stream.until_acked(1))
        await channel.close()
        for stream in streams:
            await _is_still_open(h, stream)


async def test_a_killed_caller_is_no_half_close() -> None:
    """The caller's process is killed in the middle of its stream: the batch's input stays open."""
    program = textwrap.dedent(
        """
        import sys, time, grpc
        from unisono._generated.unisono.v1 import batch_inference_pb2 as pb, batch_inference_pb2_grpc as pb_grpc
        from unisono._generated.unisono.v1 import item_pb2

        def messages():
            config = pb.BatchConfig(model="fake", on_disconnect=pb.ON_DISCONNECT_DETACH)
            config.release.size = 1000
            config.release.interval.seconds = 0
            yield pb.StreamBatchRequest(open=pb.StreamBatchOpen(config=config))
            message = item_pb2.Message(role=item_pb2.ROLE_USER, content="x")
            item = item_pb2.Item(item_id="a", chat=item_pb2.ChatRequest(messages=[message]))
            yield pb.StreamBatchRequest(add_items=pb.AddItems(items=[item]))
            time.sleep(60)

        stub = pb_grpc.BatchInferenceStub(grpc.insecure_channel(sys.argv[1]))
        for answer in stub.StreamBatch(messages()):
            if answer.WhichOneof("message") == "event":
                print(answer.event.accepted.batch_id, flush=True)
            elif answer.WhichOneof("message") == "items_acknowledged":
                print("acknowledged", flush=True)
        """
    )
    async with house() as h:
        caller = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, h.target, stdout=asyncio.subprocess.PIPE
        )
        assert caller.stdout is not None
        lost = h.stream()
        async with asyncio.timeout(LIMIT_S):
            lost.seen.add(
                event_pb2.BatchEvent(
                    accepted=event_pb2.Accepted(batch_id=(await caller.stdout.readline()).decode().strip())
                )
            )
            assert await caller.stdout.readline() == b"acknowledged\n"
            caller.kill()
            _ = await caller.wait()
        await _is_still_open(h, lost)
        _ = lost.call.cancel()


async def test_a_cut_stream_cancels_its_batch() -> None:
    """CANCEL: a stream that is cut, and not half-closed, cancels its batch and closes the backend's connections."""
    async with house() as h:
        h.fake.hold_passes()
        stream = await h.stream().open()
        _ = await stream.add(*chats(4))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        _ = await stream.until_acked(4)
        _ = stream.call.cancel()
        await h.fake.wait_for(lambda fake: fake.open_connections == 0)
        seen = await h.attach(stream.seen.batch_id)
        assert seen.summary.state == event_pb2.BATCH_STATE_CANCELLED
        assert set(seen.states().values()) == {"CANCELLED"}


async def test_a_refusal_arrives_though_a_message_is_being_written() -> None:
    """A stream that must end while events are on their way to its caller ends with its status, each time."""
    async with house() as h:
        for _ in range(40):
            stream = await h.stream().open()
            _ = await stream.add(*chats(3, num_predict=1))
            _ = await stream.open()
            assert (await refused(stream)).reason == "INVALID_REQUEST"


async def test_a_replaced_stream_that_is_not_read_lets_its_batch_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A former stream whose caller reads nothing does not hold up the batch once another has taken its place."""
    monkeypatch.setattr(stream_module, "_LAST_WRITE_S", 0.1)
    async with house(settings={"slots": 4, "max_journal_bytes": "1MB"}) as h:
        h.fake.answer("big", Answer(content=("y" * 50_000,)))
        former = await h.stream().open(on_disconnect=DETACH)
        _ = await former.add(*chats(200, "big {}"))
        _ = await former.until_acked(200)
        batch = h.batches.get(former.seen.batch_id)
        async with asyncio.timeout(LIMIT_S):
            while not batch.journal.is_full:
                _ = await h.run([chat("x", num_predict=1)])
        later = await h.stream().reopen(batch.batch_id, batch.journal.last_sequence)
        _ = await later.half_close()
        seen = await later.to_end()
        assert seen.summary.report.counts.completed == 200
        with pytest.raises(grpc.aio.AioRpcError):
            _ = await former.to_end()


async def test_content_that_differs_in_a_sign_is_other_content() -> None:
    """On a reopened stream, an item with seed -2 is not the one with seed -1, though Python hashes both alike."""
    async with house() as h:
        h.fake.hold_passes()
        first = await h.stream().open(on_disconnect=pb.ON_DISCONNECT_DETACH)
        _ = await first.add(chat("m", seed=-1))
        _ = await first.until_acked(1)
        again = await h.stream().reopen(first.seen.batch_id)
        _ = await again.add(chat("m", seed=-2), chat("m", seed=-1))
        _ = await again.until_acked(2)
        other, same = again.acks
        assert refusal_of(other.refusal).reason == "DUPLICATE_ITEM"
        assert not same.HasField("refusal")
        h.fake.release_passes()
        _ = await again.half_close()
        _ = await again.to_end()
        _ = await refused(first)
