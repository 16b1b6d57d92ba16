"""Streams whose batches are kept: acknowledged when on the disk, and gone on with by the next service."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from tests.fakes.journals import until
from tests.integration.service import LIMIT_S, House, Stream, chat, chats, config, house, refused, span
from tests.integration.test_kept_batches import COMPLETED, RUNNING, until_over
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono.adapters.journal.sqlite import SqliteJournal
from unisono.core.errors import LimitExceededError


async def opened(h: House, metadata: dict[str, str] | None = None, **fields: Any) -> Stream:
    """A stream on a new batch that is kept; its batch is known."""
    stream = h.stream()
    _ = await stream.send(open=pb.StreamBatchOpen(config=config(**fields), durable=True, metadata=metadata))
    return await stream.until(lambda one: one.credits)


async def test_a_stream_of_a_kept_batch(tmp_path: Path) -> None:
    """Items in several messages; afterwards it is a kept batch like any other."""
    async with house(keeps_in=tmp_path) as h:
        stream = await opened(h, {"job": "a"})
        for start in range(0, 100, 10):
            _ = await stream.add(*(chat(f"i{start + n}", num_predict=1) for n in range(10)))
        _ = await stream.half_close()
        seen = await stream.to_end()
        found = await until_over(h, seen.batch_id)
        listed = await h.list_results(seen.batch_id)
    assert len(seen.results) == len(stream.acks) == 100
    assert (found.state, found.counts.completed, dict(found.metadata)) == (COMPLETED, 100, {"job": "a"})
    assert listed.results == seen.results


async def test_what_was_acknowledged_is_kept(tmp_path: Path) -> None:
    """Also where its stream, and then the service, ended before it went: the next one runs it."""
    async with house(keeps_in=tmp_path, starts_away=True) as h:
        stream = await opened(h, detach_grace=span(0.0))
        _ = await stream.add(*chats(5, num_predict=1))
        _ = await stream.until_acked(5)
        batch_id = stream.seen.batch_id
    async with house(keeps_in=tmp_path) as h:
        # Nobody adds to it for its detach_grace, so that its input is closed.
        assert (await until_over(h, batch_id)).counts.completed == 5


async def test_a_stream_goes_on_with_the_next_service(tmp_path: Path) -> None:
    """What it sends again is acknowledged again, and runs once; what is new joins."""
    items = chats(8, num_predict=1)
    async with house(keeps_in=tmp_path) as h:
        stream = await opened(h)
        _ = await stream.add(*items[:4])
        _ = await stream.until(lambda one: len(one.seen.results) == 4)
        before = stream.seen
    async with house(keeps_in=tmp_path) as h:
        again = await h.stream().reopen(before.batch_id, before.sequences[-1])
        _ = await again.add(*items)
        _ = await again.half_close()
        after = await again.to_end()
        found = await until_over(h, before.batch_id)
        assert len(h.work) == 4
    assert [ack.item_id for ack in again.acks] == [item.item_id for item in items]
    assert not any(ack.HasField("refusal") for ack in again.acks)
    assert set(after.results) == {"i4", "i5", "i6", "i7"}
    assert before.sequences + after.sequences == list(range(1, found.last_sequence + 1))
    assert (found.counts.completed, found.restarts) == (8, 1)


async def test_a_lost_stream_does_not_end_its_batch(tmp_path: Path) -> None:
    """Whatever on_disconnect says; it can be reopened, by the same service too."""
    async with house(keeps_in=tmp_path, pass_s=0.01) as h:
        stream = await opened(h)
        _ = await stream.add(*chats(4, num_predict=20))
        _ = await stream.until_acked(4)
        _ = stream.call.cancel()
        batch_id = stream.seen.batch_id
        again = await h.stream().reopen(batch_id, stream.seen.sequences[-1])
        _ = await again.add(chat("last", num_predict=1))
        _ = await again.half_close()
        _ = await again.to_end()
        found = await h.kept(batch_id)
    assert (found.state, found.counts.completed) == (COMPLETED, 5)


async def test_one_that_has_ended_gives_its_events(tmp_path: Path) -> None:
    """A stream that comes back late finds what it missed, also in the next service."""
    async with house(keeps_in=tmp_path) as h:
        stream = await opened(h)
        _ = await stream.add(*chats(3, num_predict=1))
        _ = await stream.half_close()
        seen = await stream.to_end()
    async with house(keeps_in=tmp_path) as h:
        again = await h.stream().reopen(seen.batch_id, 2)
        found = await again.to_end()
    assert [event.sequence for event in found.events] == seen.sequences[2:]
    assert found.results == seen.results


async def test_one_that_has_ended_is_found_by_its_request(tmp_path: Path) -> None:
    """Whoever heard nothing of the batch knows its request_id only: the same request gives all its events."""
    async with house(keeps_in=tmp_path) as h:
        stream = await opened(h, request_id="r")
        _ = await stream.add(*chats(3, num_predict=1))
        _ = await stream.half_close()
        seen = await stream.to_end()
        again = h.stream()
        _ = await again.send(open=pb.StreamBatchOpen(config=config(request_id="r"), durable=True))
        found = await again.to_end()
        assert len(h.work) == 3
    assert (found.batch_id, found.sequences) == (seen.batch_id, seen.sequences)
    assert found.results == seen.results


async def test_what_is_wrong_or_twice_is_told(tmp_path: Path) -> None:
    """As on any stream; only what was taken is kept."""
    async with house(keeps_in=tmp_path) as h:
        stream = await opened(h, validation=pb.VALIDATION_MODE_PER_ITEM)
        _ = await stream.add(chat("a", num_predict=1), chat("a"), chat("bad", temperature=-1.0))
        _ = await stream.half_close()
        seen = await stream.to_end()
        found = await until_over(h, seen.batch_id)
    assert [ack.HasField("refusal") for ack in stream.acks] == [False, True, False]
    assert seen.states() == {"a": "COMPLETED", "bad": "FAILED"}
    assert (found.counts.accepted, found.counts.completed, found.counts.failed) == (2, 1, 1)


async def test_cancelled_while_items_come(tmp_path: Path) -> None:
    """Each item that was taken has an end."""
    async with house(keeps_in=tmp_path, pass_s=0.01) as h:
        stream = await opened(h)
        _ = await stream.add(*chats(20, num_predict=100))
        _ = await h.cancel(stream.seen.batch_id)
        seen = await stream.to_end()
        found = await until_over(h, stream.seen.batch_id)
    taken = [ack for ack in stream.acks if not ack.HasField("refusal")]
    assert len(seen.results) == len(taken) == found.counts.accepted == found.counts.cancelled


async def test_the_call_s_deadline_is_not_the_batch_s(tmp_path: Path) -> None:
    """The stream ends, the batch goes on."""
    async with house(keeps_in=tmp_path, pass_s=0.01) as h:
        call = h.stub.StreamBatch(timeout=0.3)
        stream = Stream(call)
        _ = await stream.send(open=pb.StreamBatchOpen(config=config(detach_grace=span(0.0)), durable=True))
        _ = await stream.add(*chats(2, num_predict=60))
        _ = await stream.until_acked(2)
        async with asyncio.timeout(LIMIT_S):
            assert await call.code() is StatusCode.DEADLINE_EXCEEDED
        assert (await h.kept(stream.seen.batch_id)).state == RUNNING
        assert (await until_over(h, stream.seen.batch_id)).counts.completed == 2


async def test_a_service_that_ends_says_so_at_once(tmp_path: Path) -> None:
    """To a stream, to who follows a batch that runs, and one that waits: all go on with the next service."""
    async with house(keeps_in=tmp_path, settings={"drain": 15.0, "max_kept_running": 1}) as h:
        stream = await opened(h)
        _ = await stream.add(*chats(3, num_predict=2))
        _ = await stream.until(lambda one: len(one.seen.results) == 3)
        waiting = await h.submit(chats(2, num_predict=2))
        readers = [h.attach_batch(stream.seen.batch_id), h.attach_batch(waiting.batch_id)]
        for reader in readers:
            _ = await reader.until("accepted")
        told = [asyncio.ensure_future(refused(one)) for one in (stream, *readers)]
        channel, h.channel = h.channel, h.dial()
        began = asyncio.get_running_loop().time()
    took_s = asyncio.get_running_loop().time() - began
    found = await asyncio.gather(*told)
    await channel.close()
    assert [(one.code, one.reason) for one in found] == [(StatusCode.UNAVAILABLE, "SHUTTING_DOWN")] * 3
    assert took_s < 5
    async with house(keeps_in=tmp_path) as h:
        again = await h.stream().reopen(stream.seen.batch_id, stream.seen.sequences[-1])
        _ = await again.add(*chats(4, num_predict=2))
        _ = await again.half_close()
        seen = await again.to_end()
        assert set(seen.results) == {"i3"}
        assert (await until_over(h, waiting.batch_id)).counts.completed == 2


async def test_what_waits_for_room_is_acknowledged_when_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is sent again by the stream that has reopened the batch, and the first one's write is waiting."""
    add, room = SqliteJournal.add, asyncio.Event()
    tries = 0

    async def add_when_there_is_room(self: SqliteJournal, *given: Any, **more: Any) -> None:
        nonlocal tries
        tries += 1
        if not room.is_set():
            raise LimitExceededError("no room", retry_after_s=0.05)
        await add(self, *given, **more)

    monkeypatch.setattr(SqliteJournal, "add", add_when_there_is_room)
    async with house(keeps_in=tmp_path) as h:
        stream = await opened(h)
        _ = await stream.add(*chats(3, num_predict=1))
        await until(lambda: tries > 0)
        _ = stream.call.cancel()
        again = await h.stream().reopen(stream.seen.batch_id, stream.seen.sequences[-1])
        _ = await again.add(*chats(3, num_predict=1))
        _ = await again.half_close()
        reading = asyncio.ensure_future(again.to_end())
        before = tries
        await until(lambda: tries > before + 3)
        assert not again.acks
        room.set()
        seen = await reading
    assert [ack.item_id for ack in again.acks] == ["i0", "i1", "i2"]
    assert len(seen.results) == 3


async def test_what_could_not_be_kept_is_not_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was wrong: the stream is told to send it again, the batch goes on without it, and ends."""
    add, is_broken = SqliteJournal.add, True

    async def broken(self: SqliteJournal, *given: Any, **more: Any) -> None:
        if is_broken:
            raise LookupError("broken")
        await add(self, *given, **more)

    monkeypatch.setattr(SqliteJournal, "add", broken)
    monkeypatch.setattr("unisono.app.kept_runs._AGAIN_S", 0.1)
    async with house(keeps_in=tmp_path) as h:
        h.expected_defects.add("a kept batch")
        stream = await opened(h)
        _ = await stream.add(*chats(2, num_predict=1))
        found = await refused(stream)
        assert (found.code, found.reason) == (StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert not stream.acks
        assert h.defects
        is_broken = False
        again = await h.stream().reopen(stream.seen.batch_id, stream.seen.sequences[-1])
        _ = await again.add(*chats(2, num_predict=1))
        _ = await again.half_close()
        seen = await again.to_end()
        assert (await until_over(h, stream.seen.batch_id)).counts.completed == 2
    assert len(again.acks) == len(seen.results) == 2


async def test_a_service_that_keeps_nothing_refuses_it() -> None:
    """Before anything is sent."""
    async with house() as h:
        stream = h.stream()
        _ = await stream.send(open=pb.StreamBatchOpen(config=config(), durable=True))
        found = await refused(stream)
        assert found.reason == "NOTHING_KEPT"
