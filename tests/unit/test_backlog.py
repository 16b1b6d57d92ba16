"""The items of a kept batch that wait in the store: what is fetched, when, and how much is in memory."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.fakes.journals import an_item
from unisono.app.backlog import Backlog
from unisono.core.batch import BadItem
from unisono.core.durable import KeptItem

AT_NS = 1_000


def waiting(count: int, size: int = 100, *, most_items: int = 8, most_bytes: int = 10_000) -> Backlog:
    """A backlog in which so many items of a size wait."""
    backlog = Backlog(most_items=most_items, most_bytes=most_bytes)
    for index in range(count):
        backlog.wait(KeptItem(index=index, item_id=f"i{index}", size_bytes=size), AT_NS + index)
    return backlog


def asked(backlog: Backlog) -> list[int]:
    """The places that the store would be asked for now."""
    return [before + 1 + n for count, before in backlog.pages() for n in range(count)]


def fetch(backlog: Backlog) -> list[int]:
    """Fetches what fits."""
    places = asked(backlog)
    for place in places:
        assert backlog.fetched(place) == AT_NS + place
    return places


async def is_wanted(backlog: Backlog) -> bool:
    """Whether something is to be fetched at once."""
    wanted = asyncio.ensure_future(backlog.wanted())
    await asyncio.sleep(0)
    found = wanted.done() and wanted.result()
    _ = wanted.cancel()
    return found


async def test_what_fits_is_fetched_at_one_time() -> None:
    """A batch that is below the limits is in memory as a whole, as it came."""
    backlog = waiting(8)
    assert fetch(backlog) == list(range(8))
    assert len(backlog) == 0
    assert not await is_wanted(backlog)
    assert asked(backlog) == []


async def test_so_many_items_and_no_more() -> None:
    """The next ones when a quarter of the room is free."""
    backlog = waiting(20)
    assert fetch(backlog) == list(range(8))
    backlog.ended(3)
    assert not await is_wanted(backlog)
    backlog.ended(0)
    assert await is_wanted(backlog)
    assert fetch(backlog) == [8, 9]
    assert backlog.here == (8, 800)


async def test_so_many_bytes_and_no_more() -> None:
    """Whatever their number; one that is larger than all the room goes by itself."""
    backlog = waiting(7, 3_000)
    assert fetch(backlog) == [0, 1, 2]
    backlog.ended(0)
    assert await is_wanted(backlog)
    assert fetch(backlog) == [3]
    large = waiting(2, 50_000)
    assert fetch(large) == [0]
    assert not await is_wanted(large)
    large.ended(0)
    assert await is_wanted(large)
    assert fetch(large) == [1]


async def test_questions_are_small() -> None:
    """The store is asked for five hundred items at a time, whatever has ended between them."""
    backlog = waiting(1_200, most_items=1_100, most_bytes=10**9)
    assert [backlog.take(place) is not None for place in (1, 700, 5_000)] == [True, True, False]
    assert backlog.pages() == [(500, -1), (500, 500), (100, 1_001)]


async def test_what_comes_has_room_or_waits() -> None:
    """An item of a stream is in memory at once, unless it would be one too many, or others wait before it."""
    backlog = waiting(0)
    for place in range(8):
        assert backlog.has_room_for(place, an_item(place, "x" * 10), AT_NS)
    assert backlog.here == (8, 80)
    assert not backlog.has_room_for(8, an_item(8, "x" * 10), AT_NS + 8)
    backlog.ended(0)
    assert not backlog.has_room_for(9, BadItem(item_id="bad", violations=()), AT_NS + 9)
    assert backlog.waiting() == [(8, AT_NS + 8), (9, AT_NS + 9)]
    backlog.ended(1)
    assert fetch(backlog) == [8, 9]
    assert backlog.here == (8, 70)


async def test_what_has_ended_is_not_fetched() -> None:
    """It was cancelled while the store was asked for it."""
    backlog = waiting(3)
    assert 1 in backlog
    assert backlog.take(1) == (KeptItem(index=1, item_id="i1", size_bytes=100), AT_NS + 1)
    assert 1 not in backlog
    assert backlog.fetched(1) is None
    assert backlog.here == (0, 0)


async def test_who_feeds_it_is_told() -> None:
    """When there is room, when somebody waits, and when the batch is over."""
    backlog = waiting(9)
    _ = fetch(backlog)
    told = asyncio.ensure_future(backlog.wanted())
    await asyncio.sleep(0)
    assert not told.done()
    for place in range(3):
        backlog.ended(place)
    assert await told
    _ = fetch(backlog)
    told = asyncio.ensure_future(backlog.wanted())
    await asyncio.sleep(0)
    assert not told.done()
    backlog.close()
    assert not await told
    assert not await backlog.wanted()


@pytest.mark.parametrize("seed", range(30))
async def test_all_are_fetched_once_and_the_bounds_are_kept(seed: int) -> None:
    """In any order of ends, with items of any size: never more than fits, but for one that fits nowhere."""
    chance = random.Random(seed)
    most_items, most_bytes = chance.randint(1, 40), chance.randint(100, 20_000)
    sizes = [chance.choice((1, 100, 1_000, 30_000)) for _ in range(chance.randint(1, 300))]
    backlog = Backlog(most_items=most_items, most_bytes=most_bytes)
    for index, size in enumerate(sizes):
        backlog.wait(KeptItem(index=index, item_id="", size_bytes=size), AT_NS + index)
    here: list[int] = []
    seen: list[int] = []
    while len(backlog) or here:
        if await is_wanted(backlog):
            found = fetch(backlog)
            assert found
            here += found
            seen += found
        count, size = backlog.here
        assert (count, size) == (len(here), sum(sizes[place] for place in here))
        assert count == 1 or (count <= most_items and size <= most_bytes)
        for _ in range(chance.randint(0 if here and await is_wanted(backlog) else 1, len(here))):
            backlog.ended(here.pop(chance.randrange(len(here))))
    assert seen == list(range(len(sizes)))
