"""Batches that outlive their caller and the service: kept, run, found again, tried again, deleted."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from tests.fakes.ollama import Answer, Fault, FaultKind
from tests.fakes.ollama.log import Outcome
from tests.integration.service import LIMIT_S, House, chat, chats, config, house, reason_of, refused, span
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2

COMPLETED, CANCELLED = event_pb2.BATCH_STATE_COMPLETED, event_pb2.BATCH_STATE_CANCELLED
EXPIRED, RUNNING = event_pb2.BATCH_STATE_EXPIRED, event_pb2.BATCH_STATE_RUNNING


async def until_over(h: House, batch_id: str) -> Any:
    """Until a kept batch has ended; answers with it."""
    async with asyncio.timeout(LIMIT_S):
        while (found := await h.kept(batch_id)).state == RUNNING:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    return found


def on_disk(folder: Path) -> bytes:
    """All bytes of the journal's files."""
    return b"".join(path.read_bytes() for path in folder.glob("journal.sqlite3*"))


# -- From the beginning to the end -----------------------------------------------------------------------------


async def test_a_batch_is_kept_run_and_found(tmp_path: Path) -> None:
    """Its caller may go away at once; what it said is given back, and the results are those of any batch."""
    async with house(keeps_in=tmp_path) as h:
        batch = await h.submit(chats(20, num_predict=3), {"job": "night"}, request_id="r")
        assert (batch.state, batch.counts.accepted, batch.request_id) == (RUNNING, 20, "r")
        ended = await until_over(h, batch.batch_id)
        assert (ended.state, ended.counts.completed, ended.counts.queued) == (COMPLETED, 20, 0)
        assert dict(ended.metadata) == {"job": "night"}
        assert ended.counts.completion_tokens == 60
        assert ended.created_at.ToNanoseconds() <= ended.started_at.ToNanoseconds() <= ended.ended_at.ToNanoseconds()
        assert ended.kept_until.ToNanoseconds() > ended.ended_at.ToNanoseconds()
        seen = await h.attach(batch.batch_id)
        assert seen.kinds[0] == "accepted"
        assert seen.sequences == list(range(1, ended.last_sequence + 1))
        assert seen.summary.report.counts.completed == 20
        listed = await h.list_results(batch.batch_id, page_size=7)
        assert listed.results == seen.results
        assert set(seen.states().values()) == {"COMPLETED"}


async def test_what_a_caller_is_let_in_by_is_not_kept(tmp_path: Path) -> None:
    """Of a call's metadata only its trace context comes to the disk, whichever rpc brought it."""
    metadata = (
        ("traceparent", f"00-{'a1' * 16}-{'b2' * 8}-01"),
        ("authorization", "Bearer s3cr3t-t0ken"),
        ("cookie", "session=s3cr3t-c00kie"),
    )
    async with house(keeps_in=tmp_path) as h:
        items = [*chats(1), chat("gone", model="absent")]
        request = pb.SubmitBatchRequest(config=config(), items=items)
        submitted = await h.stub.SubmitBatch(request, metadata=metadata, timeout=LIMIT_S)
        _ = await until_over(h, submitted.batch.batch_id)
        again = pb.RetryBatchRequest(batch_id=submitted.batch.batch_id)
        _ = await h.stub.RetryBatch(again, metadata=metadata, timeout=LIMIT_S)
        call = h.stub.StreamBatch(metadata=metadata, timeout=LIMIT_S)
        await call.write(pb.StreamBatchRequest(open=pb.StreamBatchOpen(config=config(), durable=True)))
        await call.done_writing()
        async for _ in call:
            pass
        kept = on_disk(tmp_path)
    assert kept.count(b"a1" * 16) >= 3
    assert b"s3cr3t" not in kept


async def test_it_can_be_followed_while_it_runs(tmp_path: Path) -> None:
    """From any number on, by as many as like; also while it waits for its turn."""
    async with house(keeps_in=tmp_path, settings={"max_kept_running": 1}, pass_s=0.005) as h:
        first = await h.submit(chats(30, num_predict=5))
        second = await h.submit(chats(4, num_predict=2))
        assert not (await h.kept(second.batch_id)).HasField("started_at")
        readers = await asyncio.gather(
            h.attach(first.batch_id), h.attach(first.batch_id, 1), h.attach(second.batch_id)
        )
    assert readers[0].events[1:] == [event for event in readers[1].events if event.HasField("sequence")]
    assert len(readers[0].results) == 30
    assert len(readers[2].results) == 4


async def test_its_passes_can_be_asked_for_after_its_end(tmp_path: Path) -> None:
    """For a moment: whoever has followed it to its summary asks then. With the batch, they are gone."""
    async with house(keeps_in=tmp_path) as h:
        batch = await h.submit(chats(4, num_predict=5))
        _ = await h.attach(batch.batch_id)
        await asyncio.sleep(0.1)  # readers are looked for every fiftieth of a second
        request = pb.ListPassesRequest(batch_id=batch.batch_id)
        passes = (await h.stub.ListPasses(request)).passes
        assert {index for each in passes for index in each.item_indexes} == set(range(4))
        seen = await h.attach(batch.batch_id)
        assert len(seen.results) == 4
        assert await h.cancel(batch.batch_id) == (0, 4)
        _ = await h.stub.DeleteBatch(pb.DeleteBatchRequest(batch_id=batch.batch_id))
        assert (await refused(h.stub.ListPasses(request))).reason == "BATCH_NOT_FOUND"


async def test_who_reads_an_ended_batch_keeps_no_other_waiting(tmp_path: Path) -> None:
    """A reader that does not take the last of it, or takes its time."""
    async with house(keeps_in=tmp_path, settings={"max_kept_running": 1}) as h:
        h.fake.answer("the book", Answer(content=("x" * 600_000,) * 8))
        first = await h.submit([chat("large", "the book")])
        reading = h.attach_batch(first.batch_id)
        _ = await reading.until("accepted")
        second = await h.submit(chats(1, num_predict=1))
        assert (await until_over(h, second.batch_id)).counts.completed == 1
        assert "large" in (await reading.to_end()).results


async def test_the_highest_priority_goes_first(tmp_path: Path) -> None:
    """Of those that wait; then the first that came."""
    async with house(keeps_in=tmp_path, settings={"max_kept_running": 1}, pass_s=0.005) as h:
        running = await h.submit(chats(8, num_predict=20))
        later = [
            await h.submit(chats(1, num_predict=1), priority=priority)
            for priority in (pb.PRIORITY_NORMAL, pb.PRIORITY_LOW, pb.PRIORITY_HIGH, pb.PRIORITY_NORMAL)
        ]
        started = [(await until_over(h, each.batch_id)).started_at.ToNanoseconds() for each in (running, *later)]
    assert sorted(range(5), key=lambda place: started[place]) == [0, 3, 1, 4, 2]


async def test_what_is_wrong_with_an_item_is_its_result(tmp_path: Path) -> None:
    """PER_ITEM; STRICT refuses the batch, and nothing is kept."""
    items = [chat("good", num_predict=2), chat("bad", temperature=-1.0), chat("gone", model="absent")]
    async with house(keeps_in=tmp_path) as h:
        batch = await h.submit(items, validation=pb.VALIDATION_MODE_PER_ITEM)
        seen = await h.attach(batch.batch_id)
        assert seen.states() == {"good": "COMPLETED", "bad": "FAILED", "gone": "FAILED"}
        assert reason_of(seen.results["bad"]) == "INVALID_REQUEST"
        assert reason_of(seen.results["gone"]) == "MODEL_NOT_FOUND"
        wrong = await refused(h.stub.SubmitBatch(pb.SubmitBatchRequest(config=config(), items=items)))
        assert (wrong.code, wrong.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert wrong.fields == ["items[1].options.temperature"]
        assert len((await h.stub.ListBatches(pb.ListBatchesRequest())).batches) == 1


async def test_answers_of_one_item_are_kept_as_such(tmp_path: Path) -> None:
    """As many as were wanted, each with a result."""
    async with house(keeps_in=tmp_path) as h:
        item = chat("a", num_predict=2)
        item.n = 3
        batch = await h.submit([item])
        seen = await h.attach(batch.batch_id)
    assert batch.counts.accepted == 3
    assert {result.variant_of for result in seen.results.values()} == {"a"}


async def test_a_large_result_is_paged(tmp_path: Path) -> None:
    """In parts, which may stand on several pages; together they are what was said."""
    pieces = ("x" * 600_000,) * 8
    async with house(keeps_in=tmp_path) as h:
        h.fake.answer("the book", Answer(content=pieces))
        batch = await h.submit([chat("large", "the book"), chat("small", num_predict=1)])
        seen = await h.attach(batch.batch_id)
        listed = await h.list_results(batch.batch_id, page_size=1)
    assert seen.results["large"].parts >= 2
    assert seen.results["large"].completion.content == "".join(pieces)
    assert listed.results == seen.results


async def test_results_of_some_states(tmp_path: Path) -> None:
    """Only the failed ones, say."""
    async with house(keeps_in=tmp_path) as h:
        batch = await h.submit([*chats(3, num_predict=1), chat("gone", model="absent")])
        _ = await until_over(h, batch.batch_id)
        failed = await h.list_results(batch.batch_id, states=[event_pb2.ITEM_STATE_FAILED])
        others = await h.list_results(batch.batch_id, states=[event_pb2.ITEM_STATE_COMPLETED])
        wrong = await refused(
            h.stub.ListResults(
                pb.ListResultsRequest(batch_id=batch.batch_id, states=[event_pb2.ITEM_STATE_UNSPECIFIED])
            )
        )
    assert set(failed.results) == {"gone"}
    assert set(others.results) == {"i0", "i1", "i2"}
    assert wrong.fields == ["states"]


# -- The same request, sent again ------------------------------------------------------------------------------


async def test_the_same_request_is_the_same_batch(tmp_path: Path) -> None:
    """Also after it has ended; other content under its name is refused."""
    async with house(keeps_in=tmp_path) as h:
        first = await h.submit(chats(2, num_predict=1), request_id="r")
        again = await h.submit(chats(2, num_predict=1), request_id="r")
        _ = await until_over(h, first.batch_id)
        late = await h.submit(chats(2, num_predict=1), request_id="r")
        assert first.batch_id == again.batch_id == late.batch_id
        other = pb.SubmitBatchRequest(config=config(request_id="r"), items=chats(3))
        found = await refused(h.stub.SubmitBatch(other))
        assert (found.code, found.reason) == (StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
        assert found.metadata["batch_id"] == first.batch_id
        assert len(h.work) == 2


# -- Cancelling, expiring, trying again, deleting --------------------------------------------------------------


async def test_cancelling_is_kept(tmp_path: Path) -> None:
    """Some items, then all; what had ended stays as it was."""
    async with house(keeps_in=tmp_path, pass_s=0.005) as h:
        batch = await h.submit(chats(40, num_predict=10))
        reading = h.attach_batch(batch.batch_id)
        _ = await reading.until("result")
        assert await h.cancel(batch.batch_id, "i39") == (1, 0)
        cancelled, ended = await h.cancel(batch.batch_id)
        seen = await reading.to_end()
        found = await h.kept(batch.batch_id)
        assert await h.cancel(batch.batch_id) == (0, 40)
    assert cancelled + ended == 40
    assert found.state == CANCELLED
    assert found.counts.cancelled == cancelled + 1
    assert seen.states()["i39"] == "CANCELLED"


async def test_one_that_waits_is_cancelled_at_once(tmp_path: Path) -> None:
    """It need not be its turn."""
    async with house(keeps_in=tmp_path, settings={"max_kept_running": 1}, pass_s=0.01) as h:
        first = await h.submit(chats(8, num_predict=50))
        second = await h.submit(chats(5, num_predict=50))
        assert await h.cancel(second.batch_id) == (5, 0)
        assert (await until_over(h, second.batch_id)).counts.cancelled == 5
        assert (await h.kept(first.batch_id)).state == RUNNING
        _ = await h.cancel(first.batch_id)


async def test_its_deadline_is_its_own(tmp_path: Path) -> None:
    """From its acceptance on, whatever the call's was."""
    async with house(keeps_in=tmp_path, pass_s=0.02) as h:
        batch = await h.submit(chats(4, num_predict=1_000), batch_deadline=span(0.3))
        assert batch.expires_at.ToNanoseconds() - batch.created_at.ToNanoseconds() == 300_000_000
        ended = await until_over(h, batch.batch_id)
    assert (ended.state, ended.counts.expired) == (EXPIRED, 4)


async def test_its_deadline_passes_while_no_service_runs(tmp_path: Path) -> None:
    """Each item has its end all the same, once there is one; as one whose deadline is over when it has its turn."""
    async with house(keeps_in=tmp_path, starts_away=True) as h:
        batch = await h.submit(chats(4), batch_deadline=span(0.05))
    await asyncio.sleep(0.05)
    async with house(keeps_in=tmp_path, settings={"max_kept_running": 1}, pass_s=0.01) as h:
        ended = await until_over(h, batch.batch_id)
        assert (ended.state, ended.counts.expired) == (EXPIRED, 4)
        assert set((await h.attach(batch.batch_id)).states().values()) == {"EXPIRED"}
        first = await h.submit(chats(8, num_predict=30))
        second = await h.submit(chats(3), batch_deadline=span(0.01))
        assert (await until_over(h, second.batch_id)).counts.expired == 3
        assert (await h.kept(first.batch_id)).counts.completed == 8


async def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    """In a batch of its own, that names its parent; what was answered is not asked again."""
    async with house(keeps_in=tmp_path) as h:
        fails = Fault(
            FaultKind.ANSWER, when=lambda body: "odd" in str(body), times=None, status=500, body={"error": "no"}
        )
        _ = h.fake.faults.add(fails)
        items = [chat(f"i{n}", "odd" if n % 2 else "even", num_predict=1) for n in range(6)]
        parent = await h.submit(items, max_attempts=1)
        ended = await until_over(h, parent.batch_id)
        assert (ended.counts.completed, ended.counts.failed) == (3, 3)
        h.fake.faults.clear()
        before = len(h.work)
        request = pb.RetryBatchRequest(batch_id=parent.batch_id, request_id="again")
        child = (await h.stub.RetryBatch(request)).batch
        same = (await h.stub.RetryBatch(request)).batch
        assert child.parent_batch_id == parent.batch_id
        assert same.batch_id == child.batch_id
        assert (await until_over(h, child.batch_id)).counts.completed == 3
        assert len(h.work) - before == 3
        nothing = await refused(h.stub.RetryBatch(pb.RetryBatchRequest(batch_id=child.batch_id)))
        assert (nothing.code, nothing.fields) == (StatusCode.INVALID_ARGUMENT, ["batch_id"])


async def test_only_what_has_ended_is_deleted_or_tried_again(tmp_path: Path) -> None:
    """Then it is gone."""
    async with house(keeps_in=tmp_path, pass_s=0.01) as h:
        batch = await h.submit(chats(4, num_predict=100))
        for call in (
            h.stub.DeleteBatch(pb.DeleteBatchRequest(batch_id=batch.batch_id)),
            h.stub.RetryBatch(pb.RetryBatchRequest(batch_id=batch.batch_id)),
        ):
            found = await refused(call)
            assert (found.code, found.reason) == (StatusCode.FAILED_PRECONDITION, "BATCH_RUNNING")
        _ = await h.cancel(batch.batch_id)
        _ = await until_over(h, batch.batch_id)
        _ = await h.stub.DeleteBatch(pb.DeleteBatchRequest(batch_id=batch.batch_id))
        for call in (
            h.stub.GetBatch(pb.GetBatchRequest(batch_id=batch.batch_id)),
            h.stub.ListResults(pb.ListResultsRequest(batch_id=batch.batch_id)),
            h.stub.DeleteBatch(pb.DeleteBatchRequest(batch_id=batch.batch_id)),
            h.attach_batch(batch.batch_id),
        ):
            found = await refused(call)
            assert (found.code, found.reason) == (StatusCode.NOT_FOUND, "BATCH_NOT_FOUND")


async def test_what_was_kept_for_long_enough_goes(tmp_path: Path) -> None:
    """By the setting; at the next start at the latest."""
    async with house(keeps_in=tmp_path, settings={"retention": 0.0}) as h:
        batch = await h.submit(chats(1, num_predict=1))
        _ = await until_over(h, batch.batch_id)
    async with house(keeps_in=tmp_path) as h:
        async with asyncio.timeout(LIMIT_S):
            while (await h.stub.ListBatches(pb.ListBatchesRequest())).batches:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)


# -- Lists, limits, and where nothing is kept ------------------------------------------------------------------


async def test_batches_are_listed_newest_first(tmp_path: Path) -> None:
    """Page by page; a token of another list is refused."""
    async with house(keeps_in=tmp_path) as h:
        made = [(await h.submit(chats(1, num_predict=1))).batch_id for _ in range(5)]
        for batch_id in made:
            _ = await until_over(h, batch_id)
        found: list[str] = []
        token = ""
        while not found or token:
            page = await h.stub.ListBatches(pb.ListBatchesRequest(page_size=2, page_token=token))
            found += [batch.batch_id for batch in page.batches]
            token = page.next_page_token
        running = await h.stub.ListBatches(pb.ListBatchesRequest(states=[RUNNING]))
        wrong = await refused(h.stub.ListBatches(pb.ListBatchesRequest(page_token="mine")))
    assert found == made[::-1]
    assert not running.batches
    assert wrong.fields == ["page_token"]


@pytest.mark.parametrize(
    "metadata",
    [{str(number): "" for number in range(17)}, {"": "x"}, {"k" * 65: "x"}, {"k": "v" * 513}],
    ids=["too many", "empty key", "long key", "long value"],
)
async def test_metadata_has_limits(tmp_path: Path, metadata: dict[str, str]) -> None:
    """What is beyond them is refused, and nothing is kept."""
    async with house(keeps_in=tmp_path) as h:
        request = pb.SubmitBatchRequest(config=config(), items=chats(1), metadata=metadata)
        found = await refused(h.stub.SubmitBatch(request))
        assert (found.code, found.fields) == (StatusCode.INVALID_ARGUMENT, ["metadata"])
        assert not (await h.stub.ListBatches(pb.ListBatchesRequest())).batches


async def test_so_many_may_be_open(tmp_path: Path) -> None:
    """One more is refused, and told to wait; what is kept already is found, though it is sent again."""
    async with house(keeps_in=tmp_path, settings={"max_kept_batches": 2}, pass_s=0.01) as h:
        made = [await h.submit(chats(2, num_predict=100), request_id=f"r{n}") for n in range(2)]
        again = await h.submit(chats(2, num_predict=100), request_id="r1")
        assert again.batch_id == made[1].batch_id
        found = await refused(h.stub.SubmitBatch(pb.SubmitBatchRequest(config=config(), items=chats(1))))
        assert (found.code, found.reason) == (StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED")
        assert found.retry_after_s == 30.0
        for each in made:
            _ = await h.cancel(each.batch_id)


async def test_a_batch_that_must_run_whole_is_not_kept(tmp_path: Path) -> None:
    """What is free now says nothing of when it is its turn."""
    async with house(keeps_in=tmp_path) as h:
        request = pb.SubmitBatchRequest(config=config(co_scheduling=pb.CO_SCHEDULING_REQUIRED), items=chats(1))
        found = await refused(h.stub.SubmitBatch(request))
        assert found.fields == ["config.co_scheduling"]


async def test_a_service_that_keeps_nothing_says_so() -> None:
    """And what to do."""
    async with house() as h:
        found = await refused(h.stub.SubmitBatch(pb.SubmitBatchRequest(config=config(), items=chats(1))))
        assert (found.code, found.reason) == (StatusCode.FAILED_PRECONDITION, "NOTHING_KEPT")
        assert "UNISONO_DATA_DIR" in found.message


# -- A service that ends, and another that begins --------------------------------------------------------------


async def test_another_service_goes_on_where_one_ended(tmp_path: Path) -> None:
    """Asked to stop in mid-batch. Nothing is lost, or seen twice; what had a result is not asked again."""
    async with house(keeps_in=tmp_path, pass_s=0.005) as h:
        batch = await h.submit(chats(60, num_predict=5))
        waiting = await h.submit(chats(3, num_predict=1))
        reading = h.attach_batch(batch.batch_id)
        for _ in range(10):
            _ = await reading.until("result")
    before = reading.seen
    assert 0 < len(before.results) < 60
    async with house(keeps_in=tmp_path) as h:
        after = await h.attach(batch.batch_id, before.sequences[-1])
        found = await until_over(h, batch.batch_id)
        assert (await until_over(h, waiting.batch_id)).counts.completed == 3
        asked = len(h.work)
    assert before.sequences + after.sequences == list(range(1, found.last_sequence + 1))
    assert not set(before.results) & set(after.results)
    assert len(before.results) + len(after.results) == 60
    assert (found.state, found.counts.completed, found.restarts) == (COMPLETED, 60, 1)
    assert asked <= 63 - len(before.results)


async def test_what_is_at_the_backend_may_be_answered_before_the_end(tmp_path: Path) -> None:
    """For as long as the service drains; nothing new goes."""
    async with house(keeps_in=tmp_path, settings={"drain": LIMIT_S}, num_parallel=4, pass_s=0.01) as h:
        batch = await h.submit(chats(40, num_predict=10))
        reading = h.attach_batch(batch.batch_id)
        _ = await reading.until("released")
        first = h
    answered = sum(request.outcome is Outcome.COMPLETED for request in first.work)
    assert 4 <= answered < 40
    async with house(keeps_in=tmp_path) as h:
        found = await until_over(h, batch.batch_id)
        assert found.counts.completed == 40
        # Nobody was asked twice.
        assert len(h.work) == 40 - answered


async def test_a_report_says_what_it_is_of(tmp_path: Path) -> None:
    """Tokens and retries of the whole batch, whoever ran it; passes and groups since the last start, as it says."""
    async with house(keeps_in=tmp_path) as h:
        _ = h.fake.faults.add(Fault(FaultKind.CLOSE, when=lambda body: "Question 1" in str(body), times=1))
        _ = h.fake.faults.add(Fault(FaultKind.STALL, when=lambda body: "slow" in str(body), times=None))
        whole = await h.submit(chats(2, num_predict=3))
        report = (await h.attach(whole.batch_id)).report
        assert not report.HasField("counted_since")
        assert (report.completion_tokens, report.retries) == (6, 1)
        _ = h.fake.faults.add(Fault(FaultKind.CLOSE, when=lambda body: "Question 2" in str(body), times=1))
        batch = await h.submit([*chats(5, num_predict=3), chat("slow", "slow", num_predict=4)])
        reading = h.attach_batch(batch.batch_id)
        for _ in range(5):
            _ = await reading.until("result")
        prompts = (await h.kept(batch.batch_id)).prompt_tokens
    between_ns = time.time_ns()
    async with house(keeps_in=tmp_path) as h:
        report = (await h.attach(batch.batch_id)).report
        found = await h.kept(batch.batch_id)
    assert report.counted_since.ToNanoseconds() > between_ns
    assert report.completion_tokens == found.counts.completion_tokens == report.counts.completion_tokens == 19
    assert report.prompt_tokens == found.prompt_tokens > prompts > 0
    assert report.retries == 1
    (group,) = report.groups
    assert (group.completion_tokens, group.passes.count, report.counts.passes) == (4, 4, 4)


async def test_answers_of_one_item_are_known_by_the_next_service(tmp_path: Path) -> None:
    """Also where all of them have ended: the item's own id stands for them."""
    several = chat("many", num_predict=1)
    several.n = 3
    async with house(keeps_in=tmp_path) as h:
        fails = Fault(FaultKind.STALL, when=lambda body: "slow" in str(body), times=None)
        _ = h.fake.faults.add(fails)
        batch = await h.submit([several, chat("slow", "slow")])
        reading = h.attach_batch(batch.batch_id)
        for _ in range(3):
            _ = await reading.until("result")
    async with house(keeps_in=tmp_path, starts_away=True) as h:
        assert await h.cancel(batch.batch_id, "many") == (0, 3)
        assert await h.cancel(batch.batch_id, "many#2") == (0, 1)
        assert (await refused(cancelling(h, batch.batch_id, "none"))).reason == "ITEM_NOT_FOUND"
        assert await h.cancel(batch.batch_id) == (1, 3)


def cancelling(h: House, batch_id: str, item_id: str) -> Any:
    """A call that cancels an item."""
    return h.stub.CancelBatch(pb.CancelBatchRequest(batch_id=batch_id, item_ids=[item_id]))


async def test_a_cancelled_batch_is_not_run_by_the_next_service(tmp_path: Path) -> None:
    """That it was cancelled is kept before it is answered."""
    async with house(keeps_in=tmp_path, starts_away=True) as h:
        batch = await h.submit(chats(5))
        assert await h.cancel(batch.batch_id) == (5, 0)
    async with house(keeps_in=tmp_path) as h:
        found = await until_over(h, batch.batch_id)
        assert (found.state, found.counts.cancelled) == (CANCELLED, 5)
        assert not h.work


async def test_items_of_an_ended_batch_had_ended(tmp_path: Path) -> None:
    """Those that are named, and no others; what is none of its items is told, as while it runs."""
    async with house(keeps_in=tmp_path) as h:
        several = chat("many", num_predict=1)
        several.n = 3
        batch = await h.submit([*chats(4, num_predict=1), several])
        _ = await until_over(h, batch.batch_id)
        assert await h.cancel(batch.batch_id) == (0, 7)
        assert await h.cancel(batch.batch_id, "i1", "i3") == (0, 2)
        assert await h.cancel(batch.batch_id, "many") == (0, 3)
        asked = pb.CancelBatchRequest(batch_id=batch.batch_id, item_ids=["i1", "none"])
        found = await refused(h.stub.CancelBatch(asked))
        assert (found.code, found.reason) == (StatusCode.NOT_FOUND, "ITEM_NOT_FOUND")
        assert "'none'" in found.message


# -- What goes wrong with the file -----------------------------------------------------------------------------


async def test_a_batch_that_cannot_be_read_costs_no_other(tmp_path: Path) -> None:
    """It is reported, and makes room."""
    settings = {"max_kept_running": 1}
    async with house(keeps_in=tmp_path, settings=settings, starts_away=True) as h:
        broken = await h.submit(chats(2, num_predict=1))
        whole = await h.submit(chats(2, num_predict=1))
    with closing(sqlite3.connect(tmp_path / "journal.sqlite3")) as file:
        _ = file.execute("UPDATE items SET packed = x'c1' WHERE batch = 1")
        file.commit()
    async with house(keeps_in=tmp_path, settings=settings) as h:
        h.expected_defects.add(f"reading kept batch {broken.batch_id}")
        assert (await until_over(h, whole.batch_id)).counts.completed == 2
        assert (await h.kept(broken.batch_id)).state == RUNNING
        assert h.defects
        # It is begun again to be cancelled, for which nothing needs to be read of its items.
        assert await h.cancel(broken.batch_id) == (2, 0)
        assert (await until_over(h, broken.batch_id)).state == CANCELLED


async def test_a_batch_whose_row_cannot_be_read_costs_no_other(tmp_path: Path) -> None:
    """The service starts, says which it is, and goes on with the others."""
    async with house(keeps_in=tmp_path, starts_away=True) as h:
        broken = await h.submit(chats(2, num_predict=1))
        whole = await h.submit(chats(2, num_predict=1))
    with closing(sqlite3.connect(tmp_path / "journal.sqlite3")) as file:
        _ = file.execute("UPDATE batches SET config = x'c1' WHERE number = 1")
        file.commit()
    async with house(keeps_in=tmp_path) as h:
        assert (await until_over(h, whole.batch_id)).counts.completed == 2
        assert any(broken.batch_id in str(entry) for entry in h.logs)


async def test_two_services_do_not_share_a_folder(tmp_path: Path) -> None:
    """The second does not start where it was told to keep batches there, and says which process has it."""
    async with house(keeps_in=tmp_path):
        with pytest.raises(Exception, match=rf"process {os.getpid()}.*UNISONO_DATA_DIR"):
            async with house(keeps_in=tmp_path):
                pass


async def test_the_usual_folder_is_no_reason_not_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody has set one, and another service has it: then nothing is kept, and the log says so."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    async with house(keeps_in=tmp_path / "unisono"), house(keeps_in=tmp_path, settings={"data_dir": ""}) as h:
        found = await refused(h.stub.SubmitBatch(pb.SubmitBatchRequest(config=config(), items=chats(1))))
        assert found.reason == "NOTHING_KEPT"
        assert any("no batches are kept" in entry["event"] for entry in h.logs)
