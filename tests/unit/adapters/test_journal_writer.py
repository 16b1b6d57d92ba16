"""The journal's writer where the file, the disk, another process or the batch itself is wrong."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from tests.fakes.journals import (
    MADE_NS,
    Told,
    a_part,
    a_result,
    an_end,
    begun,
    events_of,
    new_batch,
    numbers,
    some_items,
    sqlite_journal,
    until,
)
from unisono.adapters.journal.doubts import Doubts
from unisono.adapters.journal.errors import LeaseLostError
from unisono.adapters.journal.failpoints import PLACES, Failpoints, failure
from unisono.adapters.journal.file import JOURNAL_FILE
from unisono.adapters.journal.sqlite import SqliteJournal
from unisono.core.errors import InvalidRequestError, LimitExceededError, RequestIdReusedError, ShuttingDownError
from unisono.core.events import Result
from unisono.core.model import ItemState, Usage

MIB = 1024 * 1024


class Faults:
    """Fails at places, as often as it is told: each entry is for one passage."""

    def __init__(self, **left: int) -> None:
        self.left = Counter({name.replace("__", "."): count for name, count in left.items()})
        self.failed = 0

    def __call__(self, place: str) -> None:
        """The writer is at a place."""
        if self.left[place] > 0:
            self.left[place] -= 1
            self.failed += 1
            raise failure(place)


def rows(folder: Path, query: str) -> list[tuple[object, ...]]:
    """What stands in the file, asked of SQLite itself."""
    connection = sqlite3.connect(folder / JOURNAL_FILE)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


# -- A commit that failed, or seemed to ------------------------------------------------------------------------


async def test_a_write_reported_failed_that_had_succeeded(tmp_path: Path) -> None:
    """A thousand times: no batch is there twice, no event is, and what is counted was counted once."""
    faults = Faults()
    async with sqlite_journal(tmp_path, failpoint=faults) as journal:
        count = 500
        for number in range(count):
            batch_id = f"b{number}"
            faults.left["call.after_commit"] = 1
            stored, is_new = await journal.submit(
                new_batch(batch_id, request_id=f"r{number}"), some_items(1), is_whole=True
            )
            assert is_new
            assert stored.batch_id == batch_id
            assert stored.tally.items == 1
            told = Told()
            journal.create(batch_id, told.on_visible, told.on_lost)
            faults.left["events.after_commit"] = 1
            journal.append(batch_id, a_result(0), MADE_NS)
            await journal.settle(batch_id)
            assert told.lost == []
            assert told.visible == 1
            assert numbers(events_of(journal, batch_id)) == [1, 2]
        assert faults.failed == 2 * count
    assert rows(
        tmp_path, "select count(*), count(distinct request_id), sum(completed), sum(item_count) from batches"
    ) == [(count, count, count, count)]
    assert rows(tmp_path, "select count(*) from events") == [(2 * count,)]
    assert rows(tmp_path, "select count(*) from batches where last_sequence = 2") == [(count,)]


async def test_commits_that_fail_are_tried_again_in_their_order(tmp_path: Path) -> None:
    """What comes meanwhile waits its turn; readers see all of it, once, and never part of it."""
    faults = Faults(events__before_commit=3, events__after_commit=2)
    told = Told()
    async with sqlite_journal(tmp_path, failpoint=faults) as journal:
        _ = await begun(journal, count=40, told=told)
        for index in range(40):
            journal.append("b", a_result(index), MADE_NS + index)
            await asyncio.sleep(0.01)
            if index == 5:
                assert journal.trouble != ""
                assert journal.last_sequence("b") == 1
                assert not journal.is_settled("b")
                assert journal.size_bytes("b") > 0
        await journal.settle("b")
        assert journal.trouble == ""
        assert journal.size_bytes("b") == 0
        found = events_of(journal)
        assert numbers(found) == list(range(1, 42))
        assert [entry.event.index for entry in found if isinstance(entry.event, Result)] == list(range(40))
        assert (await journal.get("b")).tally.completed == 40
    assert faults.failed == 5
    assert told.lost == []


async def test_a_lost_disk_is_not_tried_at_every_event(tmp_path: Path) -> None:
    """After a pause only, however much comes."""
    faults = Faults(events__before_commit=10**6)
    async with sqlite_journal(tmp_path, failpoint=faults) as journal:
        _ = await begun(journal, count=0)
        for index in range(300):
            journal.append("b", a_result(index), MADE_NS)
            await asyncio.sleep(0.001)
        assert faults.failed < 20
        faults.left.clear()
        await journal.settle("b")
        assert len(events_of(journal)) == 301


async def test_a_submit_that_failed_left_nothing(tmp_path: Path) -> None:
    """The same request can be sent again, and is new."""
    faults = Faults(call__before_commit=0)
    async with sqlite_journal(tmp_path, failpoint=faults) as journal:
        faults.left["call.before_commit"] = 1
        with pytest.raises(LimitExceededError, match="journal's file"):
            _ = await journal.submit(new_batch("b", request_id="r"), some_items(2), is_whole=True)
        assert await journal.page(limit=10) == []
        stored, is_new = await journal.submit(new_batch("c", request_id="r"), some_items(2), is_whole=True)
        assert is_new
        assert stored.batch_id == "c"


async def test_a_submit_of_which_nobody_can_say_whether_it_was_kept_is_taken_back(tmp_path: Path) -> None:
    """It was refused: so it may not run later. The same request again is a batch of its own, and the only one."""
    faults = Faults()
    async with sqlite_journal(tmp_path, failpoint=faults) as journal:
        # The first commit succeeds and is reported failed, and so is the look whether it did.
        faults.left["call.after_commit"] = 2
        with pytest.raises(LimitExceededError):
            _ = await journal.submit(new_batch("b", request_id="r"), some_items(2), is_whole=True)
        stored, is_new = await journal.submit(new_batch("c", request_id="r"), some_items(2), is_whole=True)
        assert is_new
        assert stored.batch_id == "c"
        assert [one.batch_id for one in await journal.take_over()] == ["c"]


async def test_what_was_found_kept_is_never_taken_back(tmp_path: Path) -> None:
    """Not by a change that came while it was being looked for either."""
    faults = Faults()
    async with sqlite_journal(tmp_path, failpoint=faults) as journal:
        _ = await begun(journal, "first")
        for round_ in range(5):
            faults.left["call.after_commit"] = 1
            submitted = asyncio.ensure_future(journal.submit(new_batch(f"b{round_}"), some_items(1), is_whole=True))
            changes = []
            # So many and no more: without end they would keep the look waiting behind them.
            for _ in range(100):
                changes.append(asyncio.ensure_future(journal.delete_old(0)))
                await asyncio.sleep(0)
            stored, _ = await submitted
            _ = await asyncio.gather(*changes, return_exceptions=True)
            _ = await journal.delete_old(0)
            assert (await journal.get(stored.batch_id)).batch_id == stored.batch_id


async def test_a_caller_who_goes_away_during_a_submit_leaves_no_batch(tmp_path: Path) -> None:
    """Nobody was told of it, and nobody would run it; so it is gone with the next change."""
    async with sqlite_journal(tmp_path) as journal:
        submitting = asyncio.ensure_future(journal.submit(new_batch("b"), some_items(500), is_whole=True))
        await asyncio.sleep(0)
        _ = submitting.cancel()
        _ = await asyncio.gather(submitting, return_exceptions=True)
        assert submitting.cancelled()
        assert await journal.take_over() == []


async def test_a_batch_that_somebody_else_was_told_of_stays(tmp_path: Path) -> None:
    """The same request twice at one time, and the caller who was first goes away: at whatever moment."""
    async with sqlite_journal(tmp_path) as journal:
        for round_ in range(40):
            new = (new_batch(f"{name}{round_}", request_id=f"r{round_}") for name in "ab")
            first, second = (asyncio.ensure_future(journal.submit(one, some_items(20), is_whole=True)) for one in new)
            changes = [asyncio.ensure_future(journal.delete_old(0))]
            await asyncio.sleep(random.random() * 0.004)
            _ = first.cancel()
            changes.append(asyncio.ensure_future(journal.delete_old(0)))
            stored, _ = await second
            _ = await asyncio.gather(first, *changes, return_exceptions=True)
            _ = await journal.delete_old(0)
            assert (await journal.get(stored.batch_id)).batch_id == stored.batch_id
            assert len(await journal.page(limit=100)) == round_ + 1


def test_doubts() -> None:
    """Whichever comes first counts: that nobody was told of a batch, or that somebody was."""
    doubts = Doubts()
    for name in ("told", "lost", "found", "lost and found"):
        doubts.begin(name)
    assert doubts.vouch("nobody's")
    assert doubts.vouch("found")
    doubts.end("told")
    doubts.end("found", is_doubtful=True)
    doubts.end("lost", is_doubtful=True)
    doubts.end("lost and found", is_doubtful=True)
    assert not doubts.vouch("lost and found")
    assert doubts.all() == ["lost", "lost and found"]
    doubts.settle(["lost"])
    assert doubts.all() == ["lost and found"]


# -- A full disk -----------------------------------------------------------------------------------------------


async def test_a_full_disk(tmp_path: Path) -> None:
    """A submit is refused at once and says why, reading works, nothing accepted is lost, and room heals it."""
    told = Told()
    async with sqlite_journal(tmp_path, max_bytes=MIB) as journal:
        _ = await begun(journal, "old", count=10)
        journal.append("old", an_end("old"), MADE_NS)
        await journal.settle("old")
        _ = await begun(journal, "b", count=60, told=told)
        filler = 0

        async def fill() -> None:
            nonlocal filler
            while True:
                _ = await journal.submit(new_batch(f"f{filler}"), some_items(20, "x" * 1000), is_whole=True)
                filler += 1

        with pytest.raises(LimitExceededError, match=r"has no room for this.*MAX_DATA_BYTES") as refused:
            await fill()
        assert refused.value.metadata == {"limit": "journal"}
        assert refused.value.retry_after_s
        # The rest of the room goes to what was accepted; then its events wait.
        for index in range(60):
            journal.append("b", a_result(index, content="y" * 10_000), MADE_NS)
            await asyncio.sleep(0.002)
        await until(lambda: journal.trouble != "")
        assert "cannot grow" in journal.trouble
        began = time.monotonic()
        for _ in range(3):
            with pytest.raises(LimitExceededError):
                _ = await journal.submit(new_batch("no"), some_items(200, "x" * 1000), is_whole=True)
        assert time.monotonic() - began < 5.0
        seen = events_of(journal)
        assert numbers(seen) == list(range(1, len(seen) + 1))
        assert len(seen) < 61
        assert journal.size_bytes("b") >= 10_000
        assert len(await journal.page(limit=100)) == filler + 2
        assert (await journal.get("b")).tally.items == 60
        # Room: nothing else is done, and all is there.
        for number in range(filler):
            await journal.delete(f"f{number}")
        async with asyncio.timeout(5.0):
            await journal.settle("b")
        assert journal.trouble == ""
        found = events_of(journal)
        assert numbers(found) == list(range(1, 62))
        assert [entry.sequence for entry in found[: len(seen)]] == numbers(seen)
        assert (await journal.get("b")).tally.completed == 60
        _ = await journal.submit(new_batch("again"), some_items(20), is_whole=True)
    assert told.lost == []


async def test_a_disk_that_is_full_at_the_end(tmp_path: Path) -> None:
    """The service stops all the same, soon; with more room, the next one goes on from what was seen."""
    async with sqlite_journal(tmp_path, max_bytes=MIB) as journal:
        _ = await begun(journal, count=100)
        for index in range(100):
            journal.append("b", a_result(index, content="y" * 20_000), MADE_NS)
            await asyncio.sleep(0.001)
        await until(lambda: journal.trouble != "")
        seen = journal.last_sequence("b")
        waiting = asyncio.ensure_future(journal.settle("b"))
        began = time.monotonic()
        await journal.close()
        assert time.monotonic() - began < 8.0
        async with asyncio.timeout(1.0):
            await waiting
    async with sqlite_journal(tmp_path, max_bytes=100 * MIB) as journal:
        (stored,) = await journal.take_over()
        assert stored.last_sequence == seen == stored.tally.completed + 1
        assert len(events_of(journal)) == seen
        left = await journal.items("b", after=-1, limit=1000)
        assert len(left) == 100 - stored.tally.completed


# -- Another process -------------------------------------------------------------------------------------------


async def test_a_lease_that_is_lost(tmp_path: Path) -> None:
    """A process that was believed dead cannot speak for the one that took over, whatever it tries."""
    told = Told()
    async with sqlite_journal(tmp_path) as first:
        _ = await begun(first, told=told)
        first.append("b", a_result(0), MADE_NS)
        await first.settle("b")
        # By force: somebody took the lock away.
        (tmp_path / "journal.lock").unlink()
        async with sqlite_journal(tmp_path) as second:
            (taken,) = await second.take_over()
            assert (taken.restarts, taken.last_sequence) == (1, 2)
            second.create("b", lambda: None)
            first.append("b", a_result(1), MADE_NS)
            await first.settle("b")
            (lost,) = told.lost
            assert isinstance(lost, LeaseLostError)
            assert first.is_settled("b")
            # Nothing more of it either, though the numbers would fit.
            first.append("b", a_result(1), MADE_NS)
            with pytest.raises(LeaseLostError, match="another process"):
                await first.set("b", is_cancelling=True)
            with pytest.raises(LeaseLostError):
                await first.add("b", some_items(1), first=3)
            second.append("b", a_result(1, ItemState.FAILED), MADE_NS)
            await second.settle("b")
            stored = await second.get("b")
            assert (stored.tally.completed, stored.tally.failed, stored.tally.items) == (1, 1, 3)
            assert not stored.is_cancelling
            assert numbers(events_of(second)) == numbers(events_of(second)) == [1, 2, 3]
            # The first sees what the second wrote, as anybody would who reads.
            first.forget("b")
            assert numbers(events_of(first)) == [1, 2, 3]
    assert len(told.lost) == 1


# -- One batch that is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        a_result(0, ItemState.FAILED),
        Result(item_id="i9", index=9, state=ItemState.COMPLETED, usage=Usage(prompt_tokens=2**63 - 1)),
    ],
    ids=["a second result", "a number beyond SQLite's"],
)
async def test_what_is_wrong_with_one_batch_costs_no_other(tmp_path: Path, wrong: Result) -> None:
    """It is lost, which is said; the others' events, in the same commit, are there."""
    bad, good = Told(), Told()
    async with sqlite_journal(tmp_path) as journal:
        _ = await begun(journal, "bad", told=bad)
        _ = await begun(journal, "good", told=good)
        journal.append("bad", a_result(0), MADE_NS)
        await journal.settle("bad")
        journal.append("good", a_result(0), MADE_NS)
        journal.append("bad", a_result(1), MADE_NS)
        journal.append("bad", wrong, MADE_NS)
        journal.append("good", a_result(1), MADE_NS)
        await journal.settle("good")
        await journal.settle("bad")
        # Of what was appended together, all or nothing.
        journal.append("bad", a_result(2), MADE_NS)
        journal.append("good", a_result(2), MADE_NS)
        await journal.settle("good")
        assert numbers(events_of(journal, "good")) == [1, 2, 3, 4]
        assert journal.trouble == ""
        assert len(bad.lost) == 1
        assert good.lost == []
        assert journal.is_settled("bad")
        found = events_of(journal, "bad")
        assert numbers(found) == list(range(1, len(found) + 1))
        assert len(found) < 4
        stored = await journal.get("bad")
        assert stored.last_sequence == len(found)
        assert stored.tally.completed == len(found) - 1


async def test_what_is_wrong_with_a_call_costs_no_other(tmp_path: Path) -> None:
    """Refusals and values that SQLite does not take are their caller's, and the connection stays."""
    async with sqlite_journal(tmp_path) as journal:
        _ = await begun(journal, "b", request_id="r", fingerprint=b"1")
        with pytest.raises(RequestIdReusedError, match="batch b"):
            _ = await journal.submit(new_batch("c", request_id="r", fingerprint=b"2"), some_items(1), is_whole=True)
        with pytest.raises(InvalidRequestError, match="surrogate"):
            _ = await journal.submit(new_batch("c", request_id="\ud800"), some_items(1), is_whole=True)
        with pytest.raises(OverflowError):
            _ = await journal.submit(new_batch("c", created_ns=2**70), some_items(1), is_whole=True)
        assert [stored.batch_id for _, stored in await journal.page(limit=9)] == ["b"]


async def test_a_batch_that_is_lost_is_reported(tmp_path: Path) -> None:
    """Once, by its name and with what is wrong; also where nobody here runs it any more."""
    reported: list[tuple[str, Exception]] = []
    journal = SqliteJournal(tmp_path, keep_s=1.0, report_lost=lambda *lost: reported.append(lost))
    await journal.start(MADE_NS)
    for batch_id in ("here", "left"):
        _ = await begun(journal, batch_id)
        for _ in range(2):
            journal.append(batch_id, a_result(0), MADE_NS)
    journal.forget("left")
    await journal.settle("here")
    journal.append("here", a_result(1), MADE_NS)
    await until(lambda: len(reported) == 2)
    await journal.close()
    assert sorted(batch_id for batch_id, _ in reported) == ["here", "left"]
    assert all("UNIQUE constraint failed" in str(error) for _, error in reported)


async def test_errors_do_not_hold_what_was_to_be_written(tmp_path: Path) -> None:
    """They come to the log, and whoever reads that need not read what people ask."""
    async with sqlite_journal(tmp_path) as journal:
        _ = await begun(journal, "b")
        with pytest.raises(IntegrityError, match="UNIQUE constraint failed") as failed:
            _ = await journal.submit(new_batch("b", request_id="for-nobody's-eyes"), [], is_whole=True)
    assert "nobody" not in str(failed.value)


# -- Its end ---------------------------------------------------------------------------------------------------


async def test_closing_writes_what_is_left(tmp_path: Path) -> None:
    """All of it, though nobody waited for it; and what comes afterwards is not taken."""
    async with sqlite_journal(tmp_path) as journal:
        _ = await begun(journal, count=1000)
        for index in range(1000):
            journal.append("b", a_result(index), MADE_NS)
        await journal.close()
        journal.append("b", an_end(), MADE_NS)
        async with asyncio.timeout(1.0):
            await journal.settle("b")
        with pytest.raises(ShuttingDownError, match="being stopped"):
            _ = await journal.submit(new_batch("c"), some_items(1), is_whole=True)
        with pytest.raises(ShuttingDownError):
            await journal.set("b", is_cancelling=True)
        await journal.close()
    async with sqlite_journal(tmp_path) as journal:
        (stored,) = await journal.take_over()
        assert (stored.tally.completed, stored.last_sequence) == (1000, 1001)


async def test_closing_tries_again_for_a_while(tmp_path: Path) -> None:
    """A disk that is away for a moment costs nothing."""
    faults = Faults(events__before_commit=3)
    async with sqlite_journal(tmp_path, failpoint=faults) as journal:
        _ = await begun(journal)
        journal.append("b", a_result(0), MADE_NS)
    async with sqlite_journal(tmp_path) as journal:
        assert (await journal.get("b")).tally.completed == 1


async def test_a_batch_that_is_left_and_taken_up_again(tmp_path: Path) -> None:
    """What was appended before is written, and what is appended then follows it."""
    first, again = Told(), Told()
    async with sqlite_journal(tmp_path) as journal:
        for round_ in range(30):
            batch_id = f"b{round_}"
            _ = await begun(journal, batch_id, told=first)
            journal.append(batch_id, a_result(0), MADE_NS)
            journal.append(batch_id, a_result(1), MADE_NS)
            journal.forget(batch_id)
            if round_ % 2:
                await asyncio.sleep(random.random() * 0.004)
            journal.create(batch_id, again.on_visible, again.on_lost)
            journal.append(batch_id, a_result(2), MADE_NS)
            await journal.settle(batch_id)
            assert numbers(events_of(journal, batch_id)) == [1, 2, 3, 4]
    assert first.lost == again.lost == []


# -- Its speed and its places ----------------------------------------------------------------------------------


async def test_readers_and_the_event_loop_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Twenty long lists at one time, and an event is read at once."""
    async with sqlite_journal(tmp_path) as journal:
        _ = await begun(journal, count=500)
        for index in range(500):
            journal.append("b", a_part(index, 0), MADE_NS)
            journal.append("b", a_result(index, parts=1), MADE_NS)
        await journal.settle("b")
        asked = [asyncio.ensure_future(journal.results("b", after=0, limit=500)) for _ in range(20)]
        longest = 0.0
        while not all(task.done() for task in asked):
            began = time.monotonic()
            assert journal.read("b", 17, 1)[0].sequence == 18
            longest = max(longest, time.monotonic() - began)
            await asyncio.sleep(0.001)
        assert longest < 2.0
        assert {len(task.result()) for task in asked} == {1000}


def test_failpoints_do_what_they_say() -> None:
    """Each at its place, at its time; and nothing where nothing is said."""
    quiet = Failpoints("")
    points = Failpoints("call.after_commit=error@2, events.before_commit=error")
    for place in PLACES:
        quiet(place)
    points("call.after_commit")
    with pytest.raises(OperationalError, match=r"failpoint call\.after_commit"):
        points("call.after_commit")
    points("call.after_commit")
    for _ in range(2):
        with pytest.raises(OperationalError):
            points("events.before_commit")
    points("events.after_commit")


@pytest.mark.parametrize(
    "text", ["x", "call.after_commit", "call.after_commit=error@0", "nowhere=kill", "call.after_commit=dance"]
)
def test_failpoints_that_are_none(text: str) -> None:
    """The message says what there is."""
    with pytest.raises(ValueError, match=r"not PLACE=ACTION.*events\.before_commit.*kill"):
        _ = Failpoints(text)


def test_a_journal_names_its_places(tmp_path: Path) -> None:
    """Those at which a test can make it fail are those that it passes."""
    passed: list[str] = []
    check: Callable[[str], None] = passed.append

    async def use() -> None:
        journal = SqliteJournal(tmp_path, keep_s=1.0, failpoint=check)
        await journal.start(MADE_NS)
        _ = await begun(journal)
        journal.append("b", a_result(0), MADE_NS)
        await journal.close()

    asyncio.run(use())
    assert set(passed) == set(PLACES)
