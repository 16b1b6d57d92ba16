"""The window: requests of single callers that gather to go together."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.integration.service import House, Seen, chat, chats, house

# Far longer than anything else here takes, so that what waits for it is seen to.
LONG_S = 0.5


def settings(**window: Any) -> dict[str, Any]:
    """Eight slots, and a window."""
    return {"slots": 8, **{f"batch_{name}": value for name, value in window.items()}}


async def ready(h: House) -> None:
    """The runner is loaded, and idle; the caller's connection is open."""
    _ = await h.run([chat("warm", num_predict=1)])


async def many(h: House, count: int, *, tokens: int = 30) -> list[Seen]:
    """So many Infer calls within a millisecond."""
    calls = [h.infer(chat("", num_predict=tokens)) for _ in range(count)]
    return list(await asyncio.gather(*(call.to_end() for call in calls)))


def waves(seen: list[Seen]) -> list[int]:
    """For each call, how many requests went together with its own; the fewest first."""
    sizes = [event.item_count + event.others for one in seen for event in one.of("released")]
    assert len(sizes) == len(seen)
    return sorted(sizes)


async def test_the_first_goes_at_once_and_the_others_together() -> None:
    """Nobody is there to wait for when the first comes; when the others do, somebody is."""
    async with house(num_parallel=8, pass_s=0.01, settings=settings(timeout=LONG_S)) as h:
        await ready(h)
        began = time.monotonic()
        seen = await many(h, 8, tokens=80)
        assert waves(seen)[0] == 1
        sent = [request.last_byte_ns / 1e9 - began for request in h.work[1:]]
        sent.sort()
        assert sent[0] < LONG_S / 2
        assert sent[1] >= LONG_S
        assert sent[-1] - sent[1] < 0.05


async def test_as_many_as_the_size_need_not_wait_for_the_time() -> None:
    """The window may be smaller than the slots. Of seven, one goes at once, and twice three gather."""
    async with house(num_parallel=8, pass_s=0.005, settings=settings(timeout=30, size=3)) as h:
        await ready(h)
        began = time.monotonic()
        _ = await many(h, 7)
        assert time.monotonic() - began < LONG_S


async def test_without_a_size_it_is_the_number_of_slots() -> None:
    """Of five, one goes at once, and four gather. With one less, they wait for another."""
    async with house(num_parallel=4, pass_s=0.005, settings={**settings(timeout=LONG_S), "slots": 4}) as h:
        await ready(h)
        for count, waits in ((5, False), (4, True)):
            began = time.monotonic()
            _ = await many(h, count)
            assert (time.monotonic() - began >= LONG_S) is waits


@pytest.mark.parametrize("off", [{"enabled": False, "timeout": LONG_S}, {"timeout": 0}])
async def test_without_a_window_each_goes_by_itself(off: dict[str, Any]) -> None:
    """As soon as it is there."""
    async with house(num_parallel=8, pass_s=0.005, settings=settings(**off)) as h:
        await ready(h)
        long = h.infer(chat("", num_predict=500))
        _ = await long.until("released")
        began = time.monotonic()
        assert waves(await many(h, 7)) == [1] * 7
        assert time.monotonic() - began < LONG_S
        await long.lose()


async def test_a_lone_request_does_not_wait() -> None:
    """Neither on an idle runner nor after another has ended."""
    async with house(num_parallel=8, settings=settings(timeout=LONG_S)) as h:
        await ready(h)
        for _ in range(2):
            began = time.monotonic()
            _ = await many(h, 1, tokens=1)
            assert time.monotonic() - began < LONG_S / 2


async def test_a_batch_does_not_wait_for_single_requests() -> None:
    """It is a wave already; and those who gather beside it go when their time is up."""
    async with house(num_parallel=8, pass_s=0.005, settings=settings(timeout=LONG_S)) as h:
        await ready(h)
        long = h.infer(chat("", num_predict=500))
        _ = await long.until("released")
        began = time.monotonic()
        single = asyncio.create_task(many(h, 1, tokens=2))
        _ = await h.run(chats(3, num_predict=2))
        assert time.monotonic() - began < LONG_S / 2
        assert waves(await single) == [1]
        assert time.monotonic() - began >= LONG_S
        await long.lose()
