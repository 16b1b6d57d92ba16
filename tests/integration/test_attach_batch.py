"""AttachBatch, and request_id, through the real port: several callers of one batch, now and later."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import grpc
import pytest

from tests.fakes.ollama import Answer
from tests.integration.service import LIMIT_S, House, Seen, chat, chats, embed, house, refused, span
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2
from unisono.adapters.held.exchange import HeldExchange

DETACH = pb.ON_DISCONNECT_DETACH


def written(seen: Seen) -> list[bytes]:
    """The lasting events, byte by byte."""
    return [event.SerializeToString(deterministic=True) for event in seen.events if event.HasField("sequence")]


async def test_a_batch_is_replayed_from_any_event() -> None:
    """After N come exactly N+1, N+2, …, the same to the byte; after the last there is nothing, and the call ends."""
    async with house(settings={"slots": 4}) as h:
        seen = await h.run(chats(10, num_predict=3))
        whole = written(seen)
        for after in (0, 1, 5, len(whole) - 1, len(whole)):
            again = await h.attach(seen.batch_id, after)
            assert written(again) == whole[after:]


async def test_a_batch_is_followed_live_by_several_readers() -> None:
    """Each reader gets all events once, whenever it came; one that leaves harms nobody."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(8, num_predict=4))
        batch_id = (await call.until("accepted")).batch_id
        early = [h.attach_batch(batch_id) for _ in range(3)]
        leaver = h.attach_batch(batch_id)
        _ = await leaver.until("accepted")
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        await h.fake.step(2)
        await leaver.lose()
        late = h.attach_batch(batch_id, after=2)
        _ = await late.until("loading")
        h.fake.release_passes()
        seen = await call.to_end()
        for reader in early:
            assert written(await reader.to_end()) == written(seen)
        assert written(await late.to_end()) == written(seen)[2:]
        assert set(seen.states().values()) == {"COMPLETED"}


async def test_an_event_that_was_never_reached_is_out_of_range() -> None:
    """OUT_OF_RANGE for a sequence beyond the last, of a running batch as of one that ended."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(1))
        batch_id = (await call.until("released")) and call.seen.batch_id
        no = await refused(h.attach_batch(batch_id, 1000))
        assert (no.code, no.reason) == (grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_OUT_OF_RANGE")
        h.fake.release_passes()
        seen = await call.to_end()
        no = await refused(h.attach_batch(batch_id, seen.sequences[-1] + 1))
        assert no.code is grpc.StatusCode.OUT_OF_RANGE


async def test_an_ended_batch_is_kept_for_its_time_and_then_forgotten() -> None:
    """Attached to again and again after its end, and NOT_FOUND when its time is over, with its request_id."""
    async with house(settings={"keep_ended": 0.5}) as h:
        seen = await h.run(chats(2), request_id="once")
        assert written(await h.attach(seen.batch_id)) == written(await h.attach(seen.batch_id)) == written(seen)
        assert (await h.run(chats(2), request_id="once")).batch_id == seen.batch_id
        async with asyncio.timeout(LIMIT_S):
            while seen.batch_id in h.batches._batches:
                _ = await h.stub.GetServerInfo(pb.GetServerInfoRequest())
        no = await refused(h.attach_batch(seen.batch_id))
        assert (no.code, no.reason) == (grpc.StatusCode.NOT_FOUND, "BATCH_NOT_FOUND")
        assert (await h.run(chats(2), request_id="once")).batch_id != seen.batch_id


async def test_ended_batches_take_so_much_memory_and_no_more() -> None:
    """Beyond a number of bytes the oldest is forgotten before its time; others are kept."""
    async with house() as h:
        object.__setattr__(h.batches.settings, "max_ended_bytes", 1)
        first, last = await h.run(chats(2)), await h.run(chats(2))
        no = await refused(h.attach_batch(first.batch_id))
        assert (no.code, no.reason) == (grpc.StatusCode.NOT_FOUND, "BATCH_NOT_FOUND")
        assert written(await h.attach(last.batch_id)) == written(last)


@pytest.mark.parametrize("how", ["by time", "by size"])
async def test_of_a_forgotten_batch_nothing_stays_in_memory(how: str) -> None:
    """It is free at once, and not when Python looks for circles: in a service at work for hours, that is seldom."""
    async with house(settings={"keep_ended": 0.2 if how == "by time" else 900}) as h:
        if how == "by size":
            object.__setattr__(h.batches.settings, "max_ended_bytes", 1)
        stream = await h.stream().open()
        _ = await (await stream.add(*chats(5), embed("e", "text"))).half_close()
        _ = gc.collect()
        gc.disable()
        try:
            batch_id = (await stream.to_end()).batch_id
            batch = weakref.ref(h.batches._batches[batch_id])
            # What the others do has an end as well: the last of them is kept.
            for _ in range(2):
                _ = await h.run(chats(1))
            async with asyncio.timeout(LIMIT_S):
                # Nor of its calls to the backend.
                while batch() is not None or any(isinstance(each, HeldExchange) for each in gc.get_objects()):
                    _ = await h.stub.GetServerInfo(pb.GetServerInfoRequest())
        finally:
            gc.enable()


async def test_a_batch_is_not_forgotten_under_its_readers_eyes() -> None:
    """Even where ended batches are not kept at all, its own caller reads it to its end."""
    async with house(settings={"keep_ended": 0.0}) as h:
        for _ in range(5):
            seen = await h.run(chats(20, num_predict=1))
            assert len(seen.results) == 20


async def test_a_reader_hears_what_running_items_have_said_so_far() -> None:
    """With deltas, an attached reader first gets all text so far of running items, then the rest as it comes."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch([chat("a", num_predict=9), chat("b", num_predict=9)])
        batch_id = (await call.until("accepted")).batch_id
        await h.fake.wait_for(lambda fake: fake.busy_slots == 2)
        await h.fake.step(4)
        reader = h.attach_batch(batch_id, deltas=pb.DeltaConfig(flush_interval=span(0.01)))
        first = await reader.until("deltas")
        assert {delta.content_offset for delta in first.items} == {0}
        h.fake.release_passes()
        seen = await reader.to_end()
        for name in ("a", "b"):
            text = "".join(d.content for deltas in seen.of("deltas") for d in deltas.items if d.item_id == name)
            assert text == seen.results[name].completion.content
        assert "deltas" not in (await call.to_end()).kinds
        no = await refused(h.attach_batch(batch_id, deltas=pb.DeltaConfig(flush_bytes=0)))
        assert no.fields == ["deltas.flush_bytes"]


# -- The journal's limit ---------------------------------------------------------------------------------------

LARGE = "y" * 50_000


async def _work_pauses(h: House, batch_id: str) -> int:
    """Waits until the batch's journal is full and nothing of it is at the backend; how much of it was sent so far."""
    batch = h.batches.get(batch_id)

    def sent() -> int:
        return len([request for request in h.work if "big" in str(request.body)])

    async with asyncio.timeout(LIMIT_S):
        while True:
            before = sent()
            # Others go on, and this batch does not.
            for _ in range(3):
                assert (await h.run([chat("x", num_predict=1)])).states() == {"x": "COMPLETED"}
            if batch.journal.is_full and sent() == before:
                return before


async def test_the_work_pauses_while_a_reader_is_too_slow_for_the_journal() -> None:
    """A caller that does not read makes its own batch pause at the journal's limit; when it reads, all is done."""
    async with house(settings={"max_journal_bytes": "1MB", "slots": 4}) as h:
        h.fake.answer("big", Answer(content=(LARGE,)))
        call = h.run_batch(chats(300, "big {}"))
        batch_id = (await call.until("accepted")).batch_id
        assert await _work_pauses(h, batch_id) < 250
        seen = await call.to_end()
        assert len(seen.results) == 300
        assert set(seen.states().values()) == {"COMPLETED"}
        assert seen.sequences == list(range(1, len(seen.sequences) + 1))
        # What its only reader had was forgotten, to make room.
        no = await refused(h.attach_batch(batch_id))
        assert (no.code, no.reason) == (grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_OUT_OF_RANGE")
        first = int(no.metadata["first_kept"])
        assert written(await h.attach(batch_id, first - 1)) == written(seen)[first - 1 :]


async def test_a_slow_reader_pauses_no_other_batch_and_loses_nothing_to_a_fast_one() -> None:
    """The slowest reader decides what is kept: a fast one beside it does not make it lose events."""
    async with house(settings={"max_journal_bytes": "1MB", "slots": 4}) as h:
        h.fake.answer("big", Answer(content=(LARGE,)))
        call = h.run_batch(chats(120, "big {}"))
        batch_id = (await call.until("accepted")).batch_id
        slow = h.attach_batch(batch_id)
        _ = await slow.until("accepted")
        reading = asyncio.get_running_loop().create_task(call.to_end())
        _ = await _work_pauses(h, batch_id)
        seen = await slow.to_end()
        assert written(await reading) == written(seen)
        assert len(seen.results) == 120


async def test_a_batch_without_a_reader_is_parked_at_the_journals_limit() -> None:
    """DETACH: without any reader the work pauses at the limit, nothing is lost, and a reader sets it going again."""
    async with house(settings={"max_journal_bytes": "1MB", "slots": 4}) as h:
        h.fake.answer("big", Answer(content=(LARGE,)))
        call = h.run_batch(chats(100, "big {}"), on_disconnect=DETACH)
        batch_id = (await call.until("accepted")).batch_id
        await call.lose()
        assert await _work_pauses(h, batch_id) < 50
        seen = await h.attach(batch_id)
        assert len(seen.results) == 100
        assert set(seen.states().values()) == {"COMPLETED"}


# -- request_id ------------------------------------------------------------------------------------------------


async def test_the_same_request_joins_the_same_batch() -> None:
    """request_id: the same content is the same batch, from its first event, while it runs and after its end."""
    async with house() as h:
        h.fake.hold_passes()
        calls = [h.run_batch(chats(4), request_id="r", on_disconnect=DETACH)]
        _ = await calls[0].until("released")
        calls.append(h.run_batch(chats(4), request_id="r", on_disconnect=DETACH))
        _ = await calls[1].until("released")
        h.fake.release_passes()
        first, second = [await call.to_end() for call in calls]
        assert (
            written(first) == written(second) == written(await h.run(chats(4), request_id="r", on_disconnect=DETACH))
        )
        assert len(h.work) == 4


async def test_two_callers_at_once_are_one_batch() -> None:
    """The same request_id from many callers at the same moment runs once, and all of them get all of it."""
    async with house() as h:
        seen = await asyncio.gather(*(h.run(chats(5), request_id="r") for _ in range(8)))
        assert len({one.batch_id for one in seen}) == 1
        assert len({tuple(written(one)) for one in seen}) == 1
        assert len(h.work) == 5


async def test_other_content_under_the_same_request_id_is_refused() -> None:
    """ALREADY_EXISTS where config or items differ, or another rpc is meant; the batch is left alone."""
    async with house() as h:
        seen = await h.run(chats(2), request_id="r")
        others: list[Any] = [
            h.run_batch(chats(3), request_id="r"),
            h.run_batch(chats(2, "Other {}"), request_id="r"),
            h.run_batch(chats(2), request_id="r", max_attempts=2),
            await h.stream().open(request_id="r"),
        ]
        for call in others:
            no = await refused(call)
            assert (no.code, no.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
            assert no.metadata["batch_id"] == seen.batch_id
        assert (await h.run(chats(2))).batch_id != seen.batch_id
        assert (await h.run(chats(2))).summary.state == event_pb2.BATCH_STATE_COMPLETED


async def test_a_lost_caller_that_asks_again_finds_its_batch() -> None:
    """DETACH and request_id: a caller whose connection broke sends the same request, and misses nothing."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(6), request_id="r", on_disconnect=DETACH)
        batch_id = (await call.until("accepted")).batch_id
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        await call.lose()
        h.fake.release_passes()
        seen = await h.run(chats(6), request_id="r", on_disconnect=DETACH)
        assert seen.batch_id == batch_id
        assert set(seen.states().values()) == {"COMPLETED"}
        assert len(seen.results) == 6
