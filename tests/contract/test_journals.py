"""What every journal promises: the one in memory, and the one in a file; and what a store of batches promises."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.journals import (
    KEEP_S,
    MADE_NS,
    Told,
    a_part,
    a_result,
    an_end,
    an_item,
    begun,
    events_of,
    new_batch,
    numbers,
    some_items,
    sqlite_journal,
)
from unisono.adapters.journal.memory import MemoryJournal
from unisono.adapters.journal.sqlite import SqliteJournal
from unisono.app.ports import Journal
from unisono.core.batch import BadItem
from unisono.core.durable import KeptItem, Tally
from unisono.core.errors import (
    BatchNotFoundError,
    RequestIdReusedError,
    SequenceOutOfRangeError,
    Violation,
)
from unisono.core.events import Accepted, BatchState, Journalled, LastingEvent, Result, weight
from unisono.core.model import Item, ItemState
from unisono.core.paging import MAX_MESSAGE_WEIGHT

COMPLETED, FAILED = ItemState.COMPLETED, ItemState.FAILED
CANCELLED, EXPIRED = ItemState.CANCELLED, ItemState.EXPIRED


class Kept:
    """A journal with a batch that has its first event, whichever journal it is."""

    def __init__(self, journal: Journal, store: SqliteJournal | None) -> None:
        self.journal = journal
        self.store = store
        self.told = Told()

    async def begin(self, batch_id: str = "b") -> None:
        """A batch exists, and this process runs it."""
        if self.store is not None:
            _ = await self.store.submit(new_batch(batch_id), some_items(3), is_whole=True)
        self.journal.create(batch_id, self.told.on_visible, self.told.on_lost)
        if self.store is None:
            self.journal.append(batch_id, Accepted(batch_id=batch_id, item_count=3), MADE_NS)

    async def settled(self, batch_id: str = "b") -> None:
        """All that was appended is as safe as it will be."""
        if self.store is not None:
            await self.store.settle(batch_id)
        assert self.journal.is_settled(batch_id)


@pytest.fixture(params=["memory", "file"])
async def kept(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kept]:
    """A journal with one batch."""
    if request.param == "memory":
        memory = Kept(MemoryJournal(), None)
        await memory.begin()
        yield memory
        return
    async with sqlite_journal(tmp_path) as journal:
        file = Kept(journal, journal)
        await file.begin()
        yield file


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteJournal]:
    """An empty store."""
    async with sqlite_journal(tmp_path) as journal:
        yield journal


# -- Events ----------------------------------------------------------------------------------------------------


async def test_events_are_numbered_without_gaps(kept: Kept) -> None:
    """From 1, in the order in which they were appended, with their times and all that they hold."""
    given: list[LastingEvent] = [
        a_part(0, 0),
        a_result(0, parts=1),
        a_result(2, FAILED),
        a_result(1, content="\ud800 é"),
        an_end(),
    ]
    for place, event in enumerate(given):
        kept.journal.append("b", event, MADE_NS + place)
    await kept.settled()
    found = events_of(kept.journal)
    assert found == [
        Journalled(sequence=1, at_ns=MADE_NS, event=Accepted(batch_id="b", item_count=3)),
        *(Journalled(sequence=place + 2, at_ns=MADE_NS + place, event=event) for place, event in enumerate(given)),
    ]
    assert kept.journal.last_sequence("b") == 6


async def test_what_can_be_read_stays_as_it_is(kept: Kept) -> None:
    """While more is written: what is visible has no gaps at any moment, and never changes."""
    seen: list[Journalled] = []
    for index in range(300):
        kept.journal.append("b", a_result(index), MADE_NS + index)
        if index % 3 == 0:
            await asyncio.sleep(0)
        last = kept.journal.last_sequence("b")
        page = kept.journal.read("b", len(seen), 1000)
        seen += page
        assert numbers(seen) == list(range(1, last + 1))
        assert kept.journal.read("b", 0, 1000) == seen
    await kept.settled()
    assert numbers(events_of(kept.journal)) == list(range(1, 302))


async def test_readers_are_told_and_find_something(kept: Kept) -> None:
    """Whenever there is more; and never while there is not. Who goes on with a batch is told from then on."""
    lasts = [kept.journal.last_sequence("b")]
    before = kept.told.visible
    kept.journal.create("b", lambda: lasts.append(kept.journal.last_sequence("b")), kept.told.on_lost)
    for index in range(20):
        kept.journal.append("b", a_result(index), MADE_NS)
        if index % 4 == 0:
            await kept.settled()
    await kept.settled()
    assert (lasts[0], lasts[-1]) == (1, 21)
    assert all(last < more for last, more in pairwise(lasts))
    assert kept.told.visible == before
    assert kept.told.lost == []


async def test_pages_are_no_longer_than_asked_for(kept: Kept) -> None:
    """From any number on."""
    for index in range(9):
        kept.journal.append("b", a_result(index), MADE_NS)
    await kept.settled()
    for after in range(11):
        for limit in (1, 2, 5, 100):
            expected = list(range(after + 1, min(after + limit, 10) + 1))
            assert numbers(kept.journal.read("b", after, limit)) == expected


async def test_numbers_that_were_never_reached(kept: Kept) -> None:
    """An error says what the last one is; for a batch that there is not, another."""
    kept.journal.append("b", a_result(0), MADE_NS)
    await kept.settled()
    assert kept.journal.read("b", 2, 5) in ([], ())
    with pytest.raises(SequenceOutOfRangeError, match="has no event 3 yet; its last is 2") as told:
        _ = kept.journal.read("b", 3, 5)
    assert told.value.metadata == {"batch_id": "b", "last": "2"}
    with pytest.raises(BatchNotFoundError, match="'nobody'"):
        _ = kept.journal.read("nobody", 0, 5)
    with pytest.raises(BatchNotFoundError):
        _ = kept.journal.last_sequence("nobody")


async def test_pruning(kept: Kept) -> None:
    """Forgets where that makes room, and says what is left; elsewhere it forgets nothing."""
    for index in range(5):
        kept.journal.append("b", a_result(index), MADE_NS)
    await kept.settled()
    before = kept.journal.size_bytes("b")
    kept.journal.prune("b", 4)
    assert kept.journal.last_sequence("b") == 6
    if not kept.journal.can_prune:
        assert numbers(events_of(kept.journal)) == list(range(1, 7))
        return
    assert kept.journal.size_bytes("b") < before
    assert numbers(kept.journal.read("b", 4, 10)) == [5, 6]
    with pytest.raises(SequenceOutOfRangeError, match="attach after 4") as told:
        _ = kept.journal.read("b", 3, 10)
    assert told.value.metadata == {"batch_id": "b", "first_kept": "5"}
    kept.journal.prune("b", 6)
    assert kept.journal.size_bytes("b") == 0
    kept.journal.append("b", an_end(), MADE_NS)
    assert numbers(kept.journal.read("b", 6, 10)) == [7]


async def test_what_is_charged(kept: Kept) -> None:
    """Memory that events take: all of it here, and there only until they are in the file."""
    before = kept.journal.size_bytes("b")
    sizes = 0
    for index in range(5):
        kept.journal.append("b", a_result(index, content="x" * 1000), MADE_NS)
        sizes += weight(a_result(index, content="x" * 1000))
    assert kept.journal.size_bytes("b") == before + sizes
    await kept.settled()
    assert kept.journal.size_bytes("b") == (before + sizes if kept.journal.can_prune else 0)


async def test_what_is_forgotten(kept: Kept) -> None:
    """Is gone from memory; a file keeps it, for whoever goes on with it."""
    kept.journal.append("b", a_result(0), MADE_NS)
    await kept.settled()
    kept.journal.forget("b")
    kept.journal.forget("b")
    kept.journal.forget("nobody")
    if kept.store is None:
        with pytest.raises(BatchNotFoundError):
            _ = kept.journal.read("b", 0, 1)
        return
    assert kept.journal.size_bytes("b") == 0
    assert numbers(events_of(kept.journal)) == [1, 2]
    kept.journal.create("b", lambda: None)
    kept.journal.append("b", a_result(1), MADE_NS)
    await kept.settled()
    assert numbers(events_of(kept.journal)) == [1, 2, 3]


async def test_batches_do_not_mix(kept: Kept) -> None:
    """Each has numbers of its own."""
    await kept.begin("other")
    for index in range(10):
        kept.journal.append("b" if index % 2 else "other", a_result(index), MADE_NS)
    await kept.settled("b")
    await kept.settled("other")
    for batch_id, first in (("b", 1), ("other", 0)):
        found = events_of(kept.journal, batch_id)
        assert numbers(found) == [1, 2, 3, 4, 5, 6]
        indexes = [entry.event.index for entry in found if isinstance(entry.event, Result)]
        assert indexes == list(range(first, 10, 2))


# -- Batches ---------------------------------------------------------------------------------------------------


def bad(item_id: str, **more: Any) -> BadItem:
    """An item that cannot be run."""
    return BadItem(item_id=item_id, violations=(Violation(field="chat", description="is empty"),), **more)


async def all_items(
    store: SqliteJournal, batch_id: str = "b", states: Sequence[ItemState] = ()
) -> list[tuple[int, Item | BadItem]]:
    """All pages of items, three at a time."""
    found: list[tuple[int, Item | BadItem]] = []
    while page := await store.items(batch_id, after=found[-1][0] if found else -1, limit=3, states=states):
        assert len(page) <= 3
        found += page
    return found


async def test_a_batch_is_kept_as_it_came(store: SqliteJournal, tmp_path: Path) -> None:
    """With its terms, its caller's words, its trace context; as new as it is; and after a restart too."""
    new = new_batch(
        "b",
        request_id="r",
        fingerprint=b"\0\xff",
        parent_id="p",
        metadata={"who": "me", "": "é"},
        method="svc/Method",
        carrier={"traceparent": "00-1-2-01"},
        deadline_ns=MADE_NS + 5,
    )
    stored, is_new = await store.submit(new, some_items(4), is_whole=True)
    assert is_new
    assert (stored.batch_id, stored.config, stored.fingerprint) == ("b", new.config, b"\0\xff")
    assert (stored.parent_id, stored.metadata, stored.method) == ("p", new.metadata, "svc/Method")
    assert (stored.carrier, stored.created_ns, stored.deadline_ns) == (new.carrier, MADE_NS, MADE_NS + 5)
    assert (stored.started_ns, stored.ended_ns, stored.keep_until_ns) == (None, None, None)
    assert (stored.state, stored.is_over, stored.is_cancelling) == (BatchState.RUNNING, False, False)
    assert stored.is_input_closed
    assert stored.tally == Tally(items=4)
    assert (stored.restarts, stored.last_sequence) == (0, 1)
    assert await store.get("b") == stored
    (first,) = store.read("b", 0, 9)
    assert first == Journalled(sequence=1, at_ns=MADE_NS, event=Accepted(batch_id="b", item_count=4))
    await store.close()
    async with sqlite_journal(tmp_path) as again:
        assert await again.get("b") == stored


async def test_the_same_request_again(store: SqliteJournal) -> None:
    """Is the same batch; with other content it is refused; without a request_id, each is its own."""
    first, _ = await store.submit(new_batch("b", request_id="r", fingerprint=b"1"), some_items(2), is_whole=True)
    again, is_new = await store.submit(new_batch("c", request_id="r", fingerprint=b"1"), some_items(2), is_whole=True)
    assert (again, is_new) == (first, False)
    with pytest.raises(RequestIdReusedError, match=r"'r' was used for batch b, with other content") as told:
        _ = await store.submit(new_batch("d", request_id="r", fingerprint=b"2"), some_items(2), is_whole=True)
    assert told.value.metadata == {"batch_id": "b"}
    for batch_id in ("e", "f"):
        stored, is_new = await store.submit(new_batch(batch_id), some_items(1), is_whole=True)
        assert (stored.batch_id, is_new) == (batch_id, True)
    assert [one.batch_id for _, one in await store.page(limit=9)] == ["f", "e", "b"]
    # Many at one time: one is new.
    several = await asyncio.gather(
        *(store.submit(new_batch(f"m{n}", request_id="m"), some_items(1), is_whole=True) for n in range(10))
    )
    assert sum(is_new for _, is_new in several) == 1
    assert len({stored.batch_id for stored, _ in several}) == 1
    # A batch that was deleted is forgotten with its request.
    await store.delete("b")
    _, is_new = await store.submit(new_batch("g", request_id="r", fingerprint=b"2"), some_items(1), is_whole=True)
    assert is_new


async def test_items_stand_in_their_places(store: SqliteJournal) -> None:
    """Those that can be run, those that cannot (with any id, or none), and several answers of one."""
    given: list[Item | BadItem] = [
        an_item(0),
        bad(""),
        an_item(2, item_id="x#0", variant_of="x"),
        an_item(3, item_id="x#1", variant_of="x"),
        bad("i0"),
        bad(""),
        bad("y#1", variant_of="y"),
        an_item(7, text="\ud800" * 3),
    ]
    stored, _ = await store.submit(new_batch(), given, is_whole=True)
    assert stored.tally.items == 8
    assert await all_items(store) == list(enumerate(given))
    assert [one.variant_of for one in await store.names("b")] == ["", "", "x", "x", "", "", "y", ""]
    assert await store.items("b", after=6, limit=9) == [(7, given[7])]
    assert await store.items("b", after=7, limit=9) == []
    with pytest.raises(BatchNotFoundError):
        _ = await store.items("nobody", after=-1, limit=1)


async def test_items_are_added(store: SqliteJournal) -> None:
    """After those that are there; the same ones again, which may have been lost on their way, change nothing."""
    stored, _ = await store.submit(new_batch(), [], is_whole=False)
    assert not stored.is_input_closed
    many: list[Item | BadItem] = [an_item(index) for index in range(1203)]
    await store.add("b", many[:1001], first=0)
    await store.add("b", many[1001:], first=1001)
    await store.add("b", many[1001:], first=1001)
    assert (await store.get("b")).tally.items == 1203
    found = await store.items("b", after=-1, limit=5000)
    assert [index for index, _ in found] == list(range(1203))
    assert [item.item_id for _, item in found] == [f"i{index}" for index in range(1203)]
    await store.set("b", is_input_closed=True, started_ns=MADE_NS + 1)
    await store.set("b", is_cancelling=True)
    stored = await store.get("b")
    assert (stored.is_input_closed, stored.started_ns, stored.is_cancelling) == (True, MADE_NS + 1, True)
    for change in (store.set("nobody", is_cancelling=True), store.add("nobody", [], first=0)):
        with pytest.raises(BatchNotFoundError):
            await change


async def test_items_that_are_large_are_read_a_few_at_a_time(store: SqliteJournal) -> None:
    """At least one, however large it is."""
    given = [an_item(index, text="x" * 5 * 2**20) for index in range(3)]
    _ = await store.submit(new_batch(), given, is_whole=True)
    assert [index for index, _ in await store.items("b", after=-1, limit=100)] == [0, 1]
    assert [index for index, _ in await store.items("b", after=1, limit=100)] == [2]


async def in_pages(*pages: Sequence[Item | BadItem], meanwhile: Callable[[], Awaitable[None]] | None = None) -> Any:
    """Items page by page; `meanwhile` happens before the last."""
    for page in pages[:-1]:
        yield page
    if meanwhile is not None:
        await meanwhile()
    yield pages[-1]


async def test_a_batch_comes_page_by_page(store: SqliteJournal) -> None:
    """Nobody finds it before its last page is there; then it is as one that came at one time."""
    new = new_batch(request_id="r", fingerprint=b"1")

    async def look() -> None:
        with pytest.raises(BatchNotFoundError):
            _ = await store.get("b")
        with pytest.raises(BatchNotFoundError):
            _ = store.read("b", 0, 1)
        assert await store.page(limit=5) == []
        assert await store.take_over() == []

    many = some_items(1203)
    stored, is_new = await store.submit_in_pages(new, in_pages(many[:500], many[500:700], many[700:], meanwhile=look))
    assert (is_new, stored.tally.items, stored.is_input_closed, stored.config.request_id) == (True, 1203, True, "r")
    assert [item for _, item in await all_items(store)] == many
    assert [entry.event for entry in events_of(store)] == [Accepted(batch_id="b", item_count=1203)]
    again, is_new = await store.submit_in_pages(replace(new, batch_id="c"), in_pages(many[:1]))
    assert (again.batch_id, is_new) == ("b", False)
    with pytest.raises(RequestIdReusedError):
        _ = await store.submit_in_pages(replace(new, batch_id="d", fingerprint=b"2"), in_pages(many[:1]))


async def test_the_same_request_comes_while_its_pages_do(store: SqliteJournal, tmp_path: Path) -> None:
    """Whoever is whole first is the batch; of the other nothing stays."""
    new = new_batch(request_id="r", fingerprint=b"1")

    async def overtake() -> None:
        _ = await store.submit(replace(new, batch_id="first"), some_items(2), is_whole=True)

    stored, is_new = await store.submit_in_pages(new, in_pages(some_items(2), [], meanwhile=overtake))
    assert (stored.batch_id, is_new) == ("first", False)
    assert _rows(tmp_path, "batches") == 1


async def test_pages_that_do_not_come_leave_nothing(tmp_path: Path) -> None:
    """Neither where they end with an error, nor where the process ends: then the next one sees to it."""
    async with sqlite_journal(tmp_path) as store:

        async def fail() -> None:
            raise OSError("the file is gone")

        with pytest.raises(OSError, match="the file is gone"):
            _ = await store.submit_in_pages(new_batch(), in_pages(some_items(3), [], meanwhile=fail))
        assert await store.take_over() == []
        assert (_rows(tmp_path, "batches"), _rows(tmp_path, "items")) == (0, 0)

        async def stop() -> None:
            await store.close()
            raise OSError("the process ends")

        with pytest.raises(OSError, match="the process ends"):
            _ = await store.submit_in_pages(new_batch(), in_pages(some_items(3), [], meanwhile=stop))
    assert _rows(tmp_path, "items") == 3
    async with sqlite_journal(tmp_path) as store:
        assert await store.take_over() == []
        assert (_rows(tmp_path, "batches"), _rows(tmp_path, "items")) == (0, 0)


def _rows(folder: Path, table: str) -> int:
    """How many rows a table has."""
    connection = sqlite3.connect(folder / "journal.sqlite3")
    (count,) = connection.execute(f"select count(*) from {table}").fetchone()
    connection.close()
    return int(count)


async def test_items_are_added_in_any_order(store: SqliteJournal) -> None:
    """What had to wait for room may come after what did not: of neither is anything left out, or counted twice."""
    _ = await store.submit(new_batch(), [], is_whole=False)
    many: list[Item | BadItem] = [an_item(index) for index in range(7)]
    for first, last in ((4, 7), (0, 2), (2, 4), (0, 2), (4, 7)):
        await store.add("b", many[first:last], first=first)
    assert (await store.get("b")).tally.items == 7
    assert [index for index, _ in await store.items("b", after=-1, limit=99)] == list(range(7))


async def test_results_are_counted_as_they_come(store: SqliteJournal) -> None:
    """By state, with their tokens; and the summary ends the batch and says how long it is kept."""
    _ = await begun(store, count=6)
    for index, state in enumerate((COMPLETED, FAILED, COMPLETED, CANCELLED, EXPIRED, COMPLETED)):
        store.append("b", a_result(index, state), MADE_NS)
    await store.settle("b")
    counted = Tally(items=6, completed=3, failed=1, cancelled=1, expired=1, prompt_tokens=6, completion_tokens=9)
    running = await store.get("b")
    assert (running.tally, running.tally.ended, running.is_over) == (counted, 6, False)
    store.append("b", an_end(state=BatchState.CANCELLED), MADE_NS + 7)
    await store.settle("b")
    over = await store.get("b")
    assert (over.tally, over.state, over.is_over) == (counted, BatchState.CANCELLED, True)
    assert (over.ended_ns, over.keep_until_ns) == (MADE_NS + 7, MADE_NS + 7 + round(KEEP_S * 1e9))
    assert over.last_sequence == 8


async def test_what_has_not_ended_is_taken_over(tmp_path: Path) -> None:
    """The oldest first, each restart counted; what has ended stays as it is."""
    async with sqlite_journal(tmp_path) as first:
        for batch_id in ("b", "over", "c"):
            _ = await begun(first, batch_id)
        first.append("b", a_result(1), MADE_NS)
        first.append("over", an_end("over"), MADE_NS)
        await first.settle("over")
        mine = await first.take_over()
        assert [(one.batch_id, one.restarts) for one in mine] == [("b", 0), ("c", 0)]
    for restart in (1, 2):
        async with sqlite_journal(tmp_path) as again:
            taken = await again.take_over()
            assert [(one.batch_id, one.restarts) for one in taken] == [("b", restart), ("c", restart)]
            assert [(one.batch_id, one.restarts) for one in await again.take_over()] == [
                ("b", restart),
                ("c", restart),
            ]
            assert (await again.get("over")).restarts == 0
            again.create("b", lambda: None)
            again.append("b", a_result(1 + restart, FAILED), MADE_NS)
            await again.settle("b")
            assert numbers(events_of(again)) == list(range(1, 3 + restart))
    async with sqlite_journal(tmp_path) as last:
        assert (await last.get("b")).tally == Tally(
            items=3, completed=1, failed=2, prompt_tokens=2, completion_tokens=3
        )


async def test_batches_are_listed(store: SqliteJournal) -> None:
    """The newest first, by pages, and those in some states only."""
    for number in range(10):
        batch_id = f"b{number}"
        _ = await begun(store, batch_id)
        if number % 3 == 0:
            store.append(batch_id, an_end(batch_id, BatchState.EXPIRED), MADE_NS)
        if number % 3 == 1:
            store.append(batch_id, an_end(batch_id), MADE_NS)
        await store.settle(batch_id)

    async def listed(limit: int, *states: BatchState) -> list[int]:
        found: list[int] = []
        after = 0
        while page := await store.page(after=after, limit=limit, states=states):
            assert len(page) <= limit
            after = page[-1][0]
            found += [int(one.batch_id[1:]) for _, one in page]
        return found

    for limit in (1, 3, 10, 50):
        assert await listed(limit) == [*range(9, -1, -1)]
        assert await listed(limit, BatchState.EXPIRED) == [9, 6, 3, 0]
        assert await listed(limit, BatchState.RUNNING, BatchState.COMPLETED) == [8, 7, 5, 4, 2, 1]
        assert await listed(limit, BatchState.CANCELLED) == []


async def test_results_are_listed_with_their_parts(store: SqliteJournal) -> None:
    """By pages of results, in the order in which they came; from the middle of a result's parts too."""
    _ = await begun(store, count=4)
    for event in (
        a_part(2, 0),
        a_part(2, 1),
        a_part(2, 2),
        a_result(2, parts=3),
        a_result(0, FAILED),
        a_part(1, 0),
        a_result(1, parts=1),
        a_result(3),
    ):
        store.append("b", event, MADE_NS)
    await store.settle("b")

    async def listed(after: int, limit: int, *states: ItemState) -> list[int]:
        return numbers(await store.results("b", after=after, limit=limit, states=states))

    assert await listed(0, 9) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert await listed(0, 1) == [2, 3, 4, 5]
    assert await listed(5, 2) == [6, 7, 8]
    assert await listed(3, 1) == [4, 5]
    assert await listed(4, 2) == [5, 6]
    assert await listed(7, 5) == [8, 9]
    assert await listed(9, 5) == []
    assert await listed(0, 9, FAILED) == [6]
    assert await listed(3, 9, COMPLETED) == [4, 5, 7, 8, 9]
    assert await listed(0, 2, COMPLETED, FAILED) == [2, 3, 4, 5, 6]
    assert await store.results("b", after=0, limit=9) == events_of(store)[1:]
    with pytest.raises(BatchNotFoundError):
        _ = await store.results("nobody", after=0, limit=1)


async def test_what_is_large_comes_a_little_at_a_time(store: SqliteJournal) -> None:
    """So that no page fills the memory; what is left out comes with the next page, and nothing comes twice."""
    _ = await begun(store, count=12)
    size = MAX_MESSAGE_WEIGHT // 2
    for index in range(10):
        store.append("b", a_result(index, content="x" * size), MADE_NS)
    # One that is larger than all that is read at one time.
    for part in range(9):
        store.append("b", a_part(10, part, "y" * size), MADE_NS)
    store.append("b", a_result(10, parts=9), MADE_NS)
    store.append("b", a_result(11), MADE_NS)
    await store.settle("b")
    for from_pages in (store.results, _reading(store)):
        found: list[Journalled] = []
        while page := await from_pages("b", after=found[-1].sequence if found else 1, limit=1000):
            assert MAX_MESSAGE_WEIGHT < sum(weight(entry.event) for entry in page) < 4 * MAX_MESSAGE_WEIGHT or (
                page[-1].sequence == 22
            )
            found += page
        assert numbers(found) == list(range(2, 23))


def _reading(store: SqliteJournal) -> Callable[..., Awaitable[Sequence[Journalled]]]:
    async def read(batch_id: str, *, after: int, limit: int) -> Sequence[Journalled]:
        return store.read(batch_id, after, limit)

    return read


async def test_items_by_how_they_ended(store: SqliteJournal) -> None:
    """Those that have not; those that ended so; and all that have, by their names."""
    _ = await begun(store, count=12)
    states = {1: FAILED, 3: COMPLETED, 4: FAILED, 8: EXPIRED, 9: CANCELLED, 11: FAILED}
    for index in (11, 3, 9, 1, 8, 4):
        store.append("b", a_result(index, states[index]), MADE_NS)
        # A part is no end.
        store.append("b", a_part(index + 1 if index != 11 else 0, 0), MADE_NS)
    await store.settle("b")
    assert [index for index, _ in await all_items(store)] == [0, 2, 5, 6, 7, 10]
    assert [index for index, _ in await all_items(store, "b", (FAILED,))] == [1, 4, 11]
    assert [index for index, _ in await all_items(store, "b", (EXPIRED, CANCELLED))] == [8, 9]
    known = await store.names("b")
    assert all(one.size_bytes > 0 for one in known)
    assert [replace(one, size_bytes=0) for one in known] == [
        KeptItem(index=index, item_id=f"i{index}", state=states.get(index)) for index in range(12)
    ]
    with pytest.raises(BatchNotFoundError):
        _ = await store.names("nobody")


async def test_a_deleted_batch_is_gone(store: SqliteJournal, tmp_path: Path) -> None:
    """With its items and events, and nobody else's."""
    for batch_id in ("a", "b"):
        _ = await begun(store, batch_id)
        store.append(batch_id, a_result(0), MADE_NS)
        store.append(batch_id, an_end(batch_id), MADE_NS)
        await store.settle(batch_id)
        store.forget(batch_id)
    await store.delete("a")
    with pytest.raises(BatchNotFoundError, match="'a', or it was deleted"):
        await store.delete("a")
    with pytest.raises(BatchNotFoundError):
        _ = await store.get("a")
    with pytest.raises(BatchNotFoundError):
        _ = store.read("a", 0, 1)
    assert numbers(events_of(store, "b")) == [1, 2, 3]
    assert [one.state for one in await store.names("b")] == [COMPLETED, None, None]
    await store.delete("b")
    await store.close()
    connection = sqlite3.connect(tmp_path / "journal.sqlite3")
    counts = [
        connection.execute(f"select count(*) from {name}").fetchone() for name in ("batches", "items", "events")
    ]
    connection.close()
    assert counts == [(0,), (0,), (0,)]


async def test_what_was_kept_long_enough_is_deleted(store: SqliteJournal) -> None:
    """From its moment on, and not before; what has not ended never is."""
    keep_ns = round(KEEP_S * 1e9)
    for place, batch_id in enumerate(("a", "b", "c")):
        _ = await begun(store, batch_id)
        if batch_id != "c":
            store.append(batch_id, an_end(batch_id), MADE_NS + place)
            await store.settle(batch_id)
            store.forget(batch_id)
    assert await store.delete_old(MADE_NS + keep_ns - 1) == 0
    assert await store.delete_old(MADE_NS + keep_ns) == 1
    assert [one.batch_id for _, one in await store.page(limit=9)] == ["c", "b"]
    assert await store.delete_old(MADE_NS + 2**60) == 1
    assert [one.batch_id for _, one in await store.page(limit=9)] == ["c"]
    for number in range(230):
        _ = await begun(store, f"d{number}", count=1)
        store.append(f"d{number}", an_end(f"d{number}"), MADE_NS)
        await store.settle(f"d{number}")
        store.forget(f"d{number}")
    # More than one transaction deletes.
    assert await store.delete_old(MADE_NS + 2**60) == 230


async def test_a_change_of_what_is_being_read(store: SqliteJournal) -> None:
    """A list is of one moment: with a batch being deleted and made again, it is all there, or an error."""
    for round_ in range(20):
        _ = await begun(store, f"b{round_}", count=50)
        for index in range(50):
            store.append(f"b{round_}", a_result(index), MADE_NS)
        store.append(f"b{round_}", an_end(f"b{round_}"), MADE_NS)
        await store.settle(f"b{round_}")
        store.forget(f"b{round_}")
        asked = [asyncio.ensure_future(store.results(f"b{round_}", after=0, limit=100)) for _ in range(3)]
        deleting = asyncio.ensure_future(store.delete(f"b{round_}"))
        for found in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(found, BaseException):
                assert isinstance(found, BatchNotFoundError)
            else:
                assert len(found) == 50
        await deleting
