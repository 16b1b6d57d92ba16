"""Kept batches where the journal's file has no more room: what is taken can end, be cancelled, and be deleted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from grpc import StatusCode

from tests.fakes.ollama import Answer
from tests.integration.service import LIMIT_S, House, chat, chats, config, house, refused
from unisono import serving
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import item_pb2

MIB = 1024 * 1024
# The least that the setting takes.
SMALL = {"max_data_bytes": MIB}


async def test_what_its_results_have_no_room_for_is_refused(tmp_path: Path) -> None:
    """A batch of many small items, in one message or over a stream; one that fits runs to its end."""
    async with house(keeps_in=tmp_path, settings=SMALL) as h:
        submit = pb.SubmitBatchRequest(config=config(), items=chats(1_000))
        found = await refused(h.stub.SubmitBatch(submit, timeout=LIMIT_S))
        assert (found.code, found.reason) == (StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED")
        assert found.metadata["limit"] == "journal"
        assert "are kept for results" in found.message
        assert not (await h.stub.ListBatches(pb.ListBatchesRequest())).batches
        taken = await h.submit(chats(200, num_predict=1))
        seen = await h.attach(taken.batch_id)
        assert seen.summary.report.counts.completed == 200


async def test_a_full_journal_can_be_left(tmp_path: Path) -> None:
    """Where answers were larger than anybody could know: cancelling answers, deleting makes room, work goes on."""
    async with full(tmp_path) as (h, batch_id):
        found = await refused(h.stub.SubmitBatch(pb.SubmitBatchRequest(config=config(), items=chats(5))))
        assert found.reason == "LIMIT_EXCEEDED"
        running = await refused(h.stub.DeleteBatch(pb.DeleteBatchRequest(batch_id=batch_id)))
        assert running.reason == "BATCH_RUNNING"
        began_s = time.monotonic()
        cancelled, ended = await h.cancel(batch_id)
        assert time.monotonic() - began_s < 10.0
        assert cancelled + ended == 100
        assert (await h.kept(batch_id)).cancelling
        async with asyncio.timeout(LIMIT_S):
            _ = await h.stub.DeleteBatch(pb.DeleteBatchRequest(batch_id=batch_id))
        gone = await refused(h.stub.GetBatch(pb.GetBatchRequest(batch_id=batch_id)))
        assert gone.reason == "BATCH_NOT_FOUND"
        again = await h.submit(chats(50, num_predict=1))
        assert (await h.attach(again.batch_id)).summary.report.counts.completed == 50


async def test_the_log_tells_that_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and that it can again."""
    told: list[str] = []
    monkeypatch.setattr(serving, "report_trouble", told.append)
    async with full(tmp_path) as (h, batch_id):
        assert len(told) == 1
        assert "cannot grow" in told[0]
        _ = await h.cancel(batch_id)
        _ = await h.stub.DeleteBatch(pb.DeleteBatchRequest(batch_id=batch_id), timeout=LIMIT_S)
        again = await h.submit(chats(5, num_predict=1))
        assert (await h.attach(again.batch_id)).summary.report.counts.completed == 5
    assert told[1:] == [""]


async def test_cancelling_an_item_tells_that_it_is_not_kept(tmp_path: Path) -> None:
    """Where nothing can be written, and within seconds."""
    async with full(tmp_path) as (h, batch_id):
        call = h.stub.CancelBatch(pb.CancelBatchRequest(batch_id=batch_id, item_ids=["i99"]), timeout=LIMIT_S)
        found = await refused(call)
        assert (found.code, found.reason) == (StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED")
        assert "cannot grow" in found.message


async def test_a_full_journal_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    """Nothing of what is at a backend could be written: it is not waited for."""
    slow = chats(1, num_predict=100_000)
    async with full(tmp_path, beside=slow, pass_s=0.02, drain=25.0):
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 15.0


@asynccontextmanager
async def full(
    folder: Path, *, beside: Sequence[item_pb2.Item] = (), pass_s: float = 0.0, **settings: Any
) -> AsyncGenerator[tuple[House, str], None]:
    """A service whose journal is full, and the batch that has filled it. `beside`: items of another batch."""
    async with house(keeps_in=folder, settings=SMALL | settings, with_http=True, pass_s=pass_s) as h:
        h.fake.answer("the book", Answer(content=("x" * 20_000,)))
        if beside:
            _ = await h.submit(beside)
        batch = await h.submit([chat(f"i{number}", "the book") for number in range(100)])
        async with asyncio.timeout(LIMIT_S):
            while not await is_full(h):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.05)
        yield h, batch.batch_id


async def is_full(h: House) -> bool:
    """Whether the service says that its journal cannot be written to."""
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"{h.http_url}/ready")
    return "cannot grow" in answer.text
