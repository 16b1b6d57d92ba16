"""Time limits and lost callers through the real port: what expires, what is cancelled, what the backend sees."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.fakes.ollama import Fault, FaultKind
from tests.integration.service import LIMIT_S, House, chat, chats, house, reason_of, refusal_of, refused, span
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2

# Within this a cancelled request's connection must be closed: far more than the 50 ms of the bench.
SOON_S = 2.0


def a_message(body: Any) -> bool:
    """A request for an answer, not for a load."""
    return bool(body.get("messages"))


async def closed(h: House) -> None:
    """The backend's connections are closed, and no slot is held."""
    await h.fake.wait_for(lambda fake: fake.open_connections == 0 and fake.busy_slots == 0, SOON_S)


# -- Limits ----------------------------------------------------------------------------------------------------


async def test_an_item_that_has_not_spoken_in_time_expires() -> None:
    """queue_timeout counts from the acceptance to the first token; items that spoke before run on."""
    async with house(num_parallel=2, settings={"slots": 2}) as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(4, num_predict=5), queue_timeout=span(0.4), item_timeout=span(0))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 2)
        await h.fake.step(1)
        for _ in range(2):
            result = await call.until("result")
            assert result.state == event_pb2.ITEM_STATE_EXPIRED
            assert (refusal_of(result.error).code, reason_of(result)) == (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "QUEUE_TIMEOUT",
            )
        h.fake.release_passes()
        seen = await call.to_end()
        assert sorted(seen.states().values()) == ["COMPLETED", "COMPLETED", "EXPIRED", "EXPIRED"]
        assert seen.summary.state == event_pb2.BATCH_STATE_COMPLETED
        assert seen.report.counts.expired == 2
        await closed(h)


async def test_an_item_that_falls_silent_expires() -> None:
    """item_timeout counts silence after the first token, not the time in a queue; its connection is closed."""
    async with house(num_parallel=1) as h:
        h.fake.faults.add(Fault(FaultKind.STALL, path="/api/chat", when=a_message, after_lines=3))
        seen = await h.run([chat("a", num_predict=9), chat("b", num_predict=3)], item_timeout=span(0.3))
        states = sorted(seen.states().items(), key=lambda item: item[1])
        assert [state for _, state in states] == ["COMPLETED", "EXPIRED"]
        assert reason_of(seen.results[states[1][0]]) == "ITEM_TIMEOUT"
        # The other waited for the slot all the while, which is no silence.
        assert seen.results[states[0][0]].timings.first_token.ToNanoseconds() > 0.2e9
        await closed(h)


async def test_no_item_timeout_means_none() -> None:
    """item_timeout 0 is no limit, also where the service has one of its own."""
    async with house(settings={"item_timeout": 0.1}) as h:
        fault = h.fake.faults.add(Fault(FaultKind.STALL, path="/api/chat", when=a_message, after_lines=1, times=None))
        seen = await h.run([chat("a", num_predict=3)])
        assert reason_of(seen.results["a"]) == "ITEM_TIMEOUT"
        call = h.run_batch([chat("b", num_predict=3)], item_timeout=span(0), queue_timeout=span(0.2))
        await h.fake.wait_for(lambda fake: fault.hits == 2 and fake.requests[-1].lines == 1)
        # A batch that expires meanwhile shows that more than the service's own limit has passed.
        other = await h.run([chat("c", num_predict=3)], item_timeout=span(0.3))
        assert reason_of(other.results["c"]) == "ITEM_TIMEOUT"
        fault.release()
        assert (await call.to_end()).states() == {"b": "COMPLETED"}


async def test_a_batch_has_a_deadline() -> None:
    """What has not ended by batch_deadline expires, in flight or queued; the summary says so, and why."""
    async with house(num_parallel=2, settings={"slots": 2}) as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(6, num_predict=2), batch_deadline=span(0.5))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 2)
        await h.fake.step(2)
        seen = await call.to_end()
        assert sorted(seen.states().values()) == ["COMPLETED"] * 2 + ["EXPIRED"] * 4
        expired = [result for result in seen.results.values() if result.state == event_pb2.ITEM_STATE_EXPIRED]
        assert {reason_of(result) for result in expired} == {"BATCH_DEADLINE"}
        assert seen.summary.state == event_pb2.BATCH_STATE_EXPIRED
        assert refusal_of(seen.summary.error).reason == "BATCH_DEADLINE"
        await closed(h)


async def test_a_deadline_closes_the_input_of_a_stream() -> None:
    """A stream whose batch_deadline passes ends with its summary, though the caller has not half-closed."""
    async with house() as h:
        stream = h.stream()
        _ = await stream.open(batch_deadline=span(0.2))
        seen = await stream.to_end()
        assert seen.summary.state == event_pb2.BATCH_STATE_EXPIRED


async def test_the_calls_own_deadline_is_met_early() -> None:
    """Before DEADLINE_EXCEEDED, the results of expired items and the summary arrive, and the call ends well."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(5), timeout=5.0)
        began = time.monotonic()
        seen = await call.to_end()
        assert time.monotonic() - began < 5.0
        assert set(seen.states().values()) == {"EXPIRED"}
        assert len(seen.results) == 5
        assert seen.summary.state == event_pb2.BATCH_STATE_EXPIRED
        assert await call.call.code() is grpc.StatusCode.OK
        await closed(h)


async def test_a_detached_batch_does_not_inherit_the_calls_deadline() -> None:
    """With DETACH the call ends with DEADLINE_EXCEEDED, and the batch goes on without it."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(2), timeout=0.5, on_disconnect=pb.ON_DISCONNECT_DETACH)
        batch_id = (await call.until("accepted")).batch_id
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = await call.to_end()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        h.fake.release_passes()
        seen = await h.attach(batch_id)
        assert set(seen.states().values()) == {"COMPLETED"}


async def test_items_that_wait_for_a_backend_that_is_away_expire_in_time() -> None:
    """queue_timeout counts while the backend cannot be asked for its models: the items expire, they do not fail."""
    async with house(starts_away=True) as h:
        seen = await h.run(chats(3), queue_timeout=span(0.3))
        assert set(seen.states().values()) == {"EXPIRED"}
        assert {reason_of(result) for result in seen.results.values()} == {"QUEUE_TIMEOUT"}


async def test_items_that_are_not_released_expire_in_time() -> None:
    """queue_timeout counts from an item's acceptance, also while it waits for its stream's release."""
    async with house() as h:
        stream = h.stream()
        _ = await stream.open(queue_timeout=span(0.2), release=pb.ReleasePolicy(interval=span(0)))
        _ = await stream.add(chat("a"))
        _ = await stream.until(lambda s: "result a" in s.log)
        _ = await stream.add(chat("b"))
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert seen.states() == {"a": "EXPIRED", "b": "COMPLETED"}
        assert reason_of(seen.results["a"]) == "QUEUE_TIMEOUT"


# -- Lost callers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["cancel", "close"])
async def test_a_lost_caller_cancels_its_batch(way: str) -> None:
    """CANCEL: when the caller cancels its call, or its connection closes, those to the backend are closed soon."""
    async with house() as h:
        h.fake.hold_passes()
        channel = h.dial()
        stub = type(h.stub)(channel)
        call = h.run_batch(chats(12), stub=stub)
        batch_id = (await call.until("accepted")).batch_id
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        if way == "cancel":
            await call.lose()
        else:
            await channel.close()
        await closed(h)
        seen = await h.attach(batch_id)
        assert set(seen.states().values()) == {"CANCELLED"}
        assert seen.summary.state == event_pb2.BATCH_STATE_CANCELLED
        assert refusal_of(seen.summary.error).reason == "CANCELLED"
        assert "went away" in refusal_of(seen.summary.error).message
        await channel.close()


async def test_a_lost_caller_leaves_a_detached_batch_alone() -> None:
    """DETACH: the batch goes on without its caller, and whoever attaches sees all of it."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(6), on_disconnect=pb.ON_DISCONNECT_DETACH)
        batch_id = (await call.until("accepted")).batch_id
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        await call.lose()
        h.fake.release_passes()
        seen = await h.attach(batch_id)
        assert set(seen.states().values()) == {"COMPLETED"}
        assert seen.sequences == list(range(1, len(seen.sequences) + 1))


async def test_a_detached_batch_that_nobody_follows_is_cancelled_after_its_grace() -> None:
    """detach_grace counts while there is no reader: one that comes keeps the batch, and its leaving begins it."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(2), on_disconnect=pb.ON_DISCONNECT_DETACH, detach_grace=span(0.3))
        batch_id = (await call.until("accepted")).batch_id
        await h.fake.wait_for(lambda fake: fake.busy_slots == 2)
        reader = h.attach_batch(batch_id)
        _ = await reader.until("released")
        await call.lose()
        # A deadline elsewhere shows that more than the grace has passed.
        _ = await h.run([chat("x")], batch_deadline=span(0.6))
        assert not h.batches.get(batch_id).is_over
        await reader.lose()
        await closed(h)
        seen = await h.attach(batch_id)
        assert seen.summary.state == event_pb2.BATCH_STATE_CANCELLED
        assert "detach_grace" in refusal_of(seen.summary.error).message


async def test_a_batch_that_two_callers_share_lives_until_the_last_is_gone() -> None:
    """Callers that joined by request_id keep the batch; it is cancelled when the last of them is lost."""
    async with house() as h:
        h.fake.hold_passes()
        calls = [h.run_batch(chats(3), request_id="shared") for _ in range(2)]
        ids = {(await call.until("accepted")).batch_id for call in calls}
        assert len(ids) == 1
        await h.fake.wait_for(lambda fake: fake.busy_slots == 3)
        await calls[0].lose()
        await h.fake.step(1)
        assert h.fake.busy_slots == 3
        await calls[1].lose()
        await closed(h)


# -- CancelBatch -----------------------------------------------------------------------------------------------


async def test_one_item_is_cancelled_and_the_others_go_on() -> None:
    """CancelBatch with ids cancels those, wherever they are, frees their slots, and says how many had ended."""
    async with house(num_parallel=2, settings={"slots": 2}) as h:
        h.fake.hold_passes()
        call = h.run_batch([*chats(2, num_predict=8), *[chat(f"q{n}", num_predict=2) for n in range(4)]])
        batch_id = (await call.until("accepted")).batch_id
        await h.fake.wait_for(lambda fake: fake.busy_slots == 2)
        assert await h.cancel(batch_id, "i0", "q3", "i0") == (2, 0)
        await h.fake.wait_for(lambda fake: any(r.outcome == "client_gone" for r in fake.requests))
        h.fake.release_passes()
        seen = await call.to_end()
        assert {name for name, state in seen.states().items() if state == "CANCELLED"} == {"i0", "q3"}
        assert set(seen.states().values()) == {"COMPLETED", "CANCELLED"}
        assert seen.summary.state == event_pb2.BATCH_STATE_COMPLETED
        # Cancelling what has ended does nothing.
        assert await h.cancel(batch_id, "i0", "i1") == (0, 2)
        assert await h.cancel(batch_id) == (0, 6)
        assert len((await h.attach(batch_id)).events) == len(seen.events)


async def test_all_items_are_cancelled_and_the_batch_ends() -> None:
    """CancelBatch without ids cancels all, closes the input and the backend's connections; a stream ends, too."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(9))
        batch_id = (await call.until("accepted")).batch_id
        stream = h.stream()
        _ = await stream.open()
        _ = await stream.add(*chats(2))
        _ = await stream.until_acked(2)
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        assert await h.cancel(batch_id) == (9, 0)
        assert await h.cancel(stream.seen.batch_id) == (2, 0)
        await closed(h)
        seen = await call.to_end()
        assert set(seen.states().values()) == {"CANCELLED"}
        assert {reason_of(result) for result in seen.results.values()} == {"CANCELLED"}
        assert seen.summary.state == event_pb2.BATCH_STATE_CANCELLED
        ended = await stream.to_end()
        assert ended.summary.state == event_pb2.BATCH_STATE_CANCELLED


async def test_items_whose_model_is_not_found_yet_can_be_cancelled() -> None:
    """CancelBatch reaches items that wait for a backend that is away; the batch ends at once."""
    async with house(starts_away=True) as h:
        call = h.run_batch(chats(3))
        batch_id = (await call.until("accepted")).batch_id
        assert await h.cancel(batch_id) == (3, 0)
        seen = await call.to_end()
        assert set(seen.states().values()) == {"CANCELLED"}


async def test_a_cancelled_load_does_not_hold_up_the_next_batch() -> None:
    """A batch that is cancelled while its model is loaded ends at once; the load goes on, and serves the next."""
    async with house() as h:
        h.fake.hold_loads()
        call = h.run_batch(chats(2))
        batch_id = (await call.until("accepted")).batch_id
        await h.fake.wait_for(lambda fake: fake.loading)
        assert await h.cancel(batch_id) == (2, 0)
        assert (await call.to_end()).summary.state == event_pb2.BATCH_STATE_CANCELLED
        following = h.run_batch(chats(2))
        _ = await following.until("accepted")
        h.fake.release_loads()
        assert set((await following.to_end()).states().values()) == {"COMPLETED"}
        assert h.fake.loads == 1


# -- The end of the service ------------------------------------------------------------------------------------


async def test_a_service_that_stops_lets_its_batches_end() -> None:
    """While it drains, new batches are refused with SHUTTING_DOWN, and running ones end in their own time."""
    async with house(settings={"drain": 10.0}) as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(3), request_id="mine")
        _ = await call.until("released")
        closing = asyncio.get_running_loop().create_task(h.batches.close(drain_s=LIMIT_S))
        no = await refused(h.run_batch(chats(1)))
        assert (no.code, no.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert no.retry_after_s
        # The same request joins its batch, though the service is about to stop.
        again = h.run_batch(chats(3), request_id="mine")
        _ = await again.until("accepted")
        h.fake.release_passes()
        assert set((await call.to_end()).states().values()) == {"COMPLETED"}
        assert (await again.to_end()).summary.state == event_pb2.BATCH_STATE_COMPLETED
        await closing


async def test_a_service_that_must_stop_cancels_what_still_runs() -> None:
    """After the drain, running batches are cancelled; their callers hear the results and the summary."""
    async with house(settings={"drain": 0.1}) as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(3))
        _ = await call.until("released")
        reading = asyncio.get_running_loop().create_task(call.to_end())
        await h.batches.close(drain_s=0.1)
        seen = await reading
        assert set(seen.states().values()) == {"CANCELLED"}
        assert {reason_of(result) for result in seen.results.values()} == {"SHUTTING_DOWN"}
        assert refusal_of(seen.summary.error).reason == "SHUTTING_DOWN"


async def test_a_service_that_stops_during_a_load_does_not_wait_for_it() -> None:
    """A load that takes for ever, or a stream that nobody ends, does not keep the service from stopping."""
    began = time.monotonic()
    async with house() as h:
        h.fake.hold_loads()
        call = h.run_batch(chats(2))
        _ = await call.until("accepted")
        stream = h.stream()
        _ = await stream.open()
        _ = await stream.until(lambda s: s.credits)
        await h.fake.wait_for(lambda fake: fake.loading)
    assert time.monotonic() - began < LIMIT_S / 2
