"""Kept batches with more items than are in memory at one time: the rest waits in the store, as if it were there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.integration.service import LIMIT_S, House, chat, chats, house, reason_of, span
from tests.integration.test_kept_batches import CANCELLED, COMPLETED, EXPIRED, until_over
from tests.integration.test_kept_streams import opened
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb

MOST = 12


class Watched:
    """How many items of a batch were in memory at one time, as far as anybody looked."""

    def __init__(self, h: House, batch_id: str) -> None:
        self.most = 0
        self._task = asyncio.ensure_future(self._look(h, batch_id))

    async def _look(self, h: House, batch_id: str) -> None:
        while True:
            batch = h.batches.find(batch_id)
            if batch is not None:
                self.most = max(self.most, len(list(batch.running_items())))
            await asyncio.sleep(0)

    def stop(self) -> int:
        """The most that were seen."""
        _ = self._task.cancel()
        return self.most


def small(keeps_in: Path, **more: Any) -> Any:
    """A service that has a few items of a batch in memory."""
    return house(keeps_in=keeps_in, settings={"max_open_items": MOST}, **more)


async def test_all_are_answered_and_few_are_in_memory(tmp_path: Path) -> None:
    """Each once; those that are wrong, and those of which several answers are wanted, among them."""
    items = [*chats(100, num_predict=2), chat("bad", temperature=-1.0), chat("many", num_predict=1)]
    items[-1].n = 30
    async with small(tmp_path, pass_s=0.001) as h:
        batch = await h.submit(items, validation=pb.VALIDATION_MODE_PER_ITEM)
        watched = Watched(h, batch.batch_id)
        seen = await h.attach(batch.batch_id)
        most = watched.stop()
        found = await h.kept(batch.batch_id)
    assert 0 < most <= MOST
    assert (found.state, found.counts.accepted) == (COMPLETED, 131)
    assert (found.counts.completed, found.counts.failed) == (130, 1)
    assert seen.sequences == list(range(1, found.last_sequence + 1))
    assert len(seen.results) == 131
    assert reason_of(seen.results["bad"]) == "INVALID_REQUEST"
    assert [event.accepted for event in seen.of("progress")] == [131] * len(seen.of("progress"))


async def test_what_waits_is_counted_as_queued(tmp_path: Path) -> None:
    """As if it were in memory."""
    async with small(tmp_path, pass_s=0.02) as h:
        batch = await h.submit(chats(40, num_predict=1_000))
        reading = h.attach_batch(batch.batch_id)
        progress = await reading.until("progress", lambda event: event.in_flight)
        _ = await h.cancel(batch.batch_id)
        _ = await reading.to_end()
    assert progress.accepted == progress.queued + progress.in_flight == 40


async def test_items_that_wait_are_cancelled(tmp_path: Path) -> None:
    """Some by their names, all answers of one by its name, and then all that there are."""
    several = chat("many", num_predict=50)
    several.n = 3
    async with small(tmp_path, pass_s=0.005) as h:
        batch = await h.submit([*chats(60, num_predict=50), several])
        reading = h.attach_batch(batch.batch_id)
        _ = await reading.until("released")
        assert await h.cancel(batch.batch_id, "i59", "many", "many#2") == (4, 0)
        assert await h.cancel(batch.batch_id, "many#1") == (0, 1)
        cancelled, ended = await h.cancel(batch.batch_id)
        seen = await reading.to_end()
        found = await until_over(h, batch.batch_id)
        assert await h.cancel(batch.batch_id) == (0, 63)
    assert (cancelled + ended, found.state) == (63, CANCELLED)
    assert found.counts.cancelled == cancelled + 4
    assert len(seen.results) == 63
    assert {name for name, one in seen.results.items() if one.variant_of == "many"} == {
        f"many#{n}" for n in (1, 2, 3)
    }


async def test_items_that_wait_expire(tmp_path: Path) -> None:
    """With the batch's deadline, and for having waited too long."""
    async with small(tmp_path, pass_s=0.01) as h:
        late = await h.submit(chats(40, num_predict=1_000), batch_deadline=span(0.3))
        ended = await until_over(h, late.batch_id)
        assert (ended.state, ended.counts.expired) == (EXPIRED, 40)
        queued = await h.submit(chats(40, num_predict=60), queue_timeout=span(0.3))
        seen = await h.attach(queued.batch_id)
    assert seen.states()["i39"] == "EXPIRED"
    assert reason_of(seen.results["i39"]) == "QUEUE_TIMEOUT"
    assert "COMPLETED" in seen.states().values()
    assert len(seen.results) == 40


async def test_the_next_service_goes_on_with_it(tmp_path: Path) -> None:
    """With what has no result, wherever it was; and cancelling is kept for what nobody has fetched."""
    async with small(tmp_path, pass_s=0.002) as h:
        batch = await h.submit(chats(80, num_predict=4))
        await h.attach_batch(batch.batch_id).until("result", lambda result: result.index >= 20)
    async with small(tmp_path) as h:
        seen = await h.attach(batch.batch_id)
        found = await h.kept(batch.batch_id)
        assert (found.counts.completed, found.restarts) == (80, 1)
        assert len(seen.results) == 80


async def test_a_stream_may_send_more_than_is_in_memory(tmp_path: Path) -> None:
    """All that a batch may have at once: what was taken is on the disk, and goes when there is room."""
    async with small(tmp_path, pass_s=0.002) as h:
        stream = await opened(h)
        assert stream.credits[0] == 50_000
        watched = Watched(h, stream.seen.batch_id)
        for start in range(0, 100, 10):
            _ = await stream.add(*(chat(f"i{start + n}", num_predict=2) for n in range(10)))
        _ = await stream.until_acked(100)
        assert (await h.kept(stream.seen.batch_id)).counts.accepted == 100
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert 0 < watched.stop() <= MOST
    assert set(seen.states().values()) == {"COMPLETED"}
    assert len(seen.results) == 100


async def test_a_stream_is_lost_while_items_wait(tmp_path: Path) -> None:
    """The next service has them all; and takes more."""
    async with small(tmp_path, starts_away=True) as h:
        stream = await opened(h)
        _ = await stream.add(*chats(50, num_predict=1))
        _ = await stream.until_acked(50)
        batch_id = stream.seen.batch_id
    async with small(tmp_path) as h:
        again = await h.stream().reopen(batch_id)
        _ = await again.add(*chats(60, num_predict=1))
        _ = await again.half_close()
        seen = await again.to_end()
    assert [ack.HasField("refusal") for ack in again.acks] == [False] * 60
    assert len(seen.results) == 60
    assert set(seen.states().values()) == {"COMPLETED"}


async def test_the_service_ends_at_once_where_only_waiting_items_are_left(tmp_path: Path) -> None:
    """What waits in the store is no work that has to be waited for."""
    async with small(tmp_path, starts_away=True) as h:
        batch = await h.submit(chats(100))
        async with asyncio.timeout(LIMIT_S):
            while (running := h.batches.find(batch.batch_id)) is None or not running.accepted_count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 5
    async with small(tmp_path) as h:
        assert (await until_over(h, batch.batch_id)).counts.completed == 100
