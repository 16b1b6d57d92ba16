"""Batches of files where nothing can be written for a while: what is told is what is done."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_rest_edge import create, put, request, served, until
from unisono.adapters.journal.files import SqliteFiles
from unisono.adapters.journal.sqlite import SqliteJournal
from unisono.core.errors import LimitExceededError


async def test_what_is_not_cancelled_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wish cannot be kept, the caller is told, and nothing of it is done."""
    submit, asked, may_go = SqliteJournal.submit_in_pages, asyncio.Event(), asyncio.Event()

    async def later(self: SqliteJournal, *given: Any) -> Any:
        asked.set()
        _ = await may_go.wait()
        return await submit(self, *given)

    async def no_room(*_: object) -> None:
        raise LimitExceededError("no room", metadata={"limit": "journal"})

    monkeypatch.setattr(SqliteJournal, "submit_in_pages", later)
    async with served(tmp_path) as (_, client):
        batch_id = await create(client, await put(client, request("a", max_tokens=1)))
        _ = await asked.wait()
        with monkeypatch.context() as patched:
            patched.setattr(SqliteFiles, "set_cancelling", no_room)
            assert (await client.post(f"/v1/batches/{batch_id}/cancel")).status_code == 429
        may_go.set()
        await until(client, batch_id, "completed")
        found = (await client.get(f"/v1/batches/{batch_id}")).json()
        assert found["request_counts"]["completed"] == 1


async def test_what_cannot_be_written_is_tried_less_and_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each try, the whole of a file may have to be read."""
    monkeypatch.setattr("unisono.app.file_batches._AGAIN_S", 0.05)
    submit = SqliteJournal.submit_in_pages
    moments: list[float] = []

    async def late(self: SqliteJournal, *given: Any) -> Any:
        moments.append(time.monotonic())
        if len(moments) <= 4:
            raise LimitExceededError("no room", metadata={"limit": "journal"})
        return await submit(self, *given)

    monkeypatch.setattr(SqliteJournal, "submit_in_pages", late)
    async with served(tmp_path) as (_, client):
        batch_id = await create(client, await put(client, request("a", max_tokens=1)))
        await until(client, batch_id, "completed")
    pauses = [after - before for before, after in pairwise(moments)]
    assert len(pauses) == 4
    assert all(pause >= 0.05 * 2**number for number, pause in enumerate(pauses))
