"""What a batch allows of itself: items at a time, items a second, waves, priority; all of it reaches the schedule."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from tests.integration.service import House, chat, chats, house
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2


def most_at_a_time(h: House) -> int:
    """The most requests that took part in one pass."""
    return max(len(one.requests) for one in h.fake.pass_log)


async def test_so_many_at_a_time() -> None:
    """Whatever the slots are; one alone gives an order that can be had again."""
    async with house(num_parallel=4, settings={"slots": 4}, pass_s=0.001) as h:
        _ = await h.run(chats(6, num_predict=10), max_concurrency=2)
        assert most_at_a_time(h) == 2
        h.fake.pass_log.clear()
        seen = await h.run(chats(4, num_predict=4), max_concurrency=1)
        assert most_at_a_time(h) == 1
        assert set(seen.states().values()) == {"COMPLETED"}


async def test_so_many_a_second() -> None:
    """Evenly: the last bytes are spread over four intervals, of which staging the first may take some."""
    async with house(num_parallel=4, settings={"slots": 4}) as h:
        _ = await h.run(chats(5, num_predict=2), items_per_second=20.0)
        sent = sorted(work.last_byte_ns for work in h.work)
        assert sent[-1] - sent[0] > 150_000_000
        assert all(later - earlier > 35_000_000 for earlier, later in pairwise(sent[1:]))


async def test_waves() -> None:
    """The next goes when the last of the one before has ended, and each item says that it went so."""
    async with house(num_parallel=4, settings={"slots": 4}, pass_s=0.002) as h:
        items = [chat(f"i{n}", num_predict=5 + 5 * (n % 4)) for n in range(8)]
        seen = await h.run(items, co_scheduling=pb.CO_SCHEDULING_TOGETHER)
        assert {result.release_reason for result in seen.results.values()} == {event_pb2.RELEASE_REASON_TOGETHER}
        assert [event.item_count for event in seen.of("released")] == [4, 4]


async def test_a_higher_priority_goes_first() -> None:
    """Of two batches that wait, the later one ends before the earlier one."""
    async with house(num_parallel=1, settings={"slots": 1}, pass_s=0.002) as h:
        low = h.run_batch(chats(8, num_predict=20), priority=pb.PRIORITY_LOW)
        _ = await low.until("released")
        high = await h.run(chats(3, num_predict=20), priority=pb.PRIORITY_HIGH)
        ended = await low.to_end()
        assert max(one.time.ToNanoseconds() for one in high.events if one.HasField("result")) < max(
            one.time.ToNanoseconds() for one in ended.events if one.HasField("result")
        )
        assert len(high.results) + len(ended.results) == 11


async def test_single_requests_of_several_callers_share_passes() -> None:
    """They are gathered for a moment, and go together."""
    async with house(num_parallel=4, settings={"slots": 4}, pass_s=0.002) as h:
        _ = await h.run([chat("warm")])
        h.fake.pass_log.clear()
        _ = await asyncio.gather(*(h.infer(chat("", num_predict=30)).to_end() for _ in range(4)))
        assert most_at_a_time(h) == 4
