"""Batches, items and events for the tests of journals, and a journal in a file that is closed when its test ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisono.adapters.journal.sqlite import SqliteJournal
from unisono.app.ports import Journal
from unisono.app.stores import BatchStore
from unisono.core.batch import BadItem, BatchConfig
from unisono.core.durable import NewBatch, StoredBatch
from unisono.core.events import BatchState, Journalled, Result, ResultPart, Summary
from unisono.core.model import ChatRequest, Completion, Item, ItemState, Message, Role, Usage
from unisono.core.report import Report

# A batch's life: made then, kept so long after its end.
MADE_NS = 1_700_000_000 * 10**9
KEEP_S = 60.0
# What every wait here is bounded by.
LIMIT_S = 20.0


def new_batch(batch_id: str = "b", **more: Any) -> NewBatch:
    """A batch to be kept; `request_id` is a part of its config."""
    config = BatchConfig(model="m", request_id=more.pop("request_id", ""))
    return NewBatch(**{"batch_id": batch_id, "config": config, "created_ns": MADE_NS, **more})


def an_item(index: int, text: str = "Hello", **more: Any) -> Item:
    """A conversation of one message."""
    request = ChatRequest(messages=(Message(role=Role.USER, content=text),))
    return Item(**{"item_id": f"i{index}", "index": index, "request": request, **more})


def some_items(count: int, text: str = "Hello") -> list[Item | BadItem]:
    """So many, numbered from 0."""
    return [an_item(index, text) for index in range(count)]


def a_result(index: int, state: ItemState = ItemState.COMPLETED, *, content: str = "yes", parts: int = 0) -> Result:
    """How an item ended."""
    usage = Usage(prompt_tokens=2, completion_tokens=3) if state is ItemState.COMPLETED else None
    completion = Completion(model="m", content=content) if state is ItemState.COMPLETED else None
    return Result(item_id=f"i{index}", index=index, state=state, completion=completion, usage=usage, parts=parts)


def a_part(index: int, part: int, content: str = "part") -> ResultPart:
    """A part of a result, which stands before it."""
    return ResultPart(item_id=f"i{index}", index=index, part=part, content=content)


def an_end(batch_id: str = "b", state: BatchState = BatchState.COMPLETED) -> Summary:
    """The last event of a batch."""
    return Summary(state=state, report=Report(batch_id=batch_id, duration_s=1.0))


@dataclass
class Told:
    """What a journal told of a batch."""

    visible: int = 0
    lost: list[Exception] = field(default_factory=list)

    def on_visible(self) -> None:
        """There is more to read."""
        self.visible += 1

    def on_lost(self, error: Exception) -> None:
        """There never will be more."""
        self.lost.append(error)


@asynccontextmanager
async def sqlite_journal(
    folder: Path,
    *,
    max_bytes: int | None = None,
    failpoint: Callable[[str], None] = lambda _place: None,
) -> AsyncGenerator[SqliteJournal, None]:
    """A journal in a file, from its start to its close."""
    journal = SqliteJournal(folder, keep_s=KEEP_S, max_bytes=max_bytes, failpoint=failpoint)
    await journal.start(MADE_NS)
    try:
        yield journal
    finally:
        await journal.close()


async def begun(
    journal: BatchStore, batch_id: str = "b", count: int = 3, told: Told | None = None, **more: Any
) -> StoredBatch:
    """A batch that was submitted, and that this process runs."""
    stored, _ = await journal.submit(new_batch(batch_id, **more), some_items(count), is_whole=True)
    told = told or Told()
    journal.create(batch_id, told.on_visible, told.on_lost)
    return stored


def events_of(journal: Journal, batch_id: str = "b") -> list[Journalled]:
    """All that can be read of a batch, a few at a time."""
    found: list[Journalled] = []
    while page := journal.read(batch_id, found[-1].sequence if found else 0, 7):
        found += page
    return found


def numbers(events: Sequence[Journalled]) -> list[int]:
    """Their numbers."""
    return [event.sequence for event in events]


async def until(is_true: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Waits for something that happens in many places."""
    async with asyncio.timeout(limit_s):
        while not is_true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
