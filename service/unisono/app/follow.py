"""Follows one batch for one reader: its lasting events after a sequence, what items say meanwhile, and heartbeats.

The reader sets the pace: nothing is read from the journal before the last event was taken, and text gathers as an
offset, not as a queue. A reader that is slow, or stops reading, costs no memory beyond the journal's own limit.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unisono.app.batch_journal import Reader
from unisono.core.events import Delta, Deltas, Heartbeat, Summary

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from unisono.app.item_run import ItemRun
    from unisono.app.ports import Clock
    from unisono.app.run_batch import RunningBatch
    from unisono.core.batch import DeltaSettings
    from unisono.core.events import Journalled

# Events that are taken from the journal at once.
_PAGE = 64
# A stream that was silent for so long says that it lives: less than the minute after which proxies give up.
HEARTBEAT_S = 15.0


async def follow(
    batch: RunningBatch,
    clock: Clock,
    *,
    after: int = 0,
    deltas: DeltaSettings | None = None,
    heartbeat_s: float = HEARTBEAT_S,
) -> AsyncGenerator[Journalled | Deltas | Heartbeat, None]:
    """Yields the batch's events after a sequence number, and ends after its summary.

    Raises SequenceOutOfRangeError where events are asked for that are not kept, or were never there. Text that was
    said before the reader came is in its first `Deltas`.
    """
    batch.journal.read(after, 1)  # raises for a number that was never reached, before anybody waits for it
    woken = asyncio.Event()
    speech = _Speech(batch, deltas, woken) if deltas is not None else None
    reader = Reader(woken.set, speech.spoke if speech else None, has_read=after)
    batch.attach(reader)
    silent_since_s = clock.monotonic_s()
    try:
        while True:
            for entry in batch.journal.read(after, _PAGE):
                yield entry
                after = entry.sequence
                batch.journal.consumed(reader, after)
                silent_since_s = clock.monotonic_s()
                if isinstance(entry.event, Summary):
                    return
            now = clock.monotonic_s()
            if speech is not None and speech.is_due(now):
                said = speech.flush(now)
                if said.items:
                    yield said
                    silent_since_s = clock.monotonic_s()
                    continue
            if batch.journal.last_sequence > after:
                continue
            wait_s = silent_since_s + heartbeat_s - now
            if speech is not None and (due_s := speech.due_in(now)) is not None:
                wait_s = min(wait_s, due_s)
            woken.clear()
            if wait_s > 0 and await _woken(woken, wait_s):
                continue
            if clock.monotonic_s() - silent_since_s >= heartbeat_s:
                yield Heartbeat()
                silent_since_s = clock.monotonic_s()
    finally:
        batch.journal.detach(reader)


async def _woken(event: asyncio.Event, wait_s: float) -> bool:
    """Whether the event was set within a time."""
    try:
        async with asyncio.timeout(wait_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


@dataclass(slots=True)
class _Heard:
    """How much of an item one reader has been sent."""

    attempt: int = 0
    # Pieces sent, and the bytes of UTF-8 in them.
    content_pieces: int = 0
    content_bytes: int = 0
    thinking_pieces: int = 0
    thinking_bytes: int = 0


class _Speech:
    """What items said since a reader's last flush, as places in their own text."""

    def __init__(self, batch: RunningBatch, settings: DeltaSettings, woken: asyncio.Event) -> None:
        self._batch = batch
        self._settings = settings
        self._woken = woken
        self._heard: dict[int, _Heard] = {}
        # Items that spoke since the last flush, and about how many bytes they said.
        self._fresh: dict[int, None] = {run.item.index: None for run in batch.running_items() if run.has_spoken}
        self._fresh_bytes = 0
        self._flushed_s = 0.0

    def spoke(self, index: int) -> None:
        """An item spoke: that makes a flush due once the interval is over, or the bytes are many."""
        is_first = not self._fresh
        self._fresh[index] = None
        run = self._batch.run_of(index)
        if run is not None:
            self._fresh_bytes += run.last_piece_bytes
        if is_first or self._fresh_bytes >= self._settings.flush_bytes:
            self._woken.set()

    def is_due(self, now: float) -> bool:
        """Whether there is something to flush, and it is time."""
        due_s = self.due_in(now)
        return due_s is not None and due_s <= 0

    def due_in(self, now: float) -> float | None:
        """Seconds until the next flush; None while nothing was said."""
        if not self._fresh:
            return None
        if self._fresh_bytes >= self._settings.flush_bytes:
            return 0.0
        return self._flushed_s + self._settings.flush_interval_s - now

    def flush(self, now: float) -> Deltas:
        """All that was said since the last flush, of the items that have not ended."""
        said: list[Delta] = []
        for index in self._fresh:
            run = self._batch.run_of(index)
            if run is None:
                self._heard.pop(index, None)
            elif (delta := self._delta(index, run)) is not None:
                said.append(delta)
        self._fresh.clear()
        self._fresh_bytes = 0
        self._flushed_s = now
        return Deltas(items=tuple(said))

    def _delta(self, index: int, run: ItemRun) -> Delta | None:
        heard = self._heard.get(index)
        if heard is None or heard.attempt != run.attempt:
            heard = self._heard[index] = _Heard(attempt=run.attempt)
        content = "".join(run.content[heard.content_pieces :])
        thinking = "".join(run.thinking[heard.thinking_pieces :])
        if not content and not thinking:
            return None
        delta = Delta(
            item_id=run.item.item_id,
            index=index,
            attempt=run.attempt,
            content_offset=heard.content_bytes,
            content=content,
            thinking_offset=heard.thinking_bytes,
            thinking=thinking,
        )
        heard.content_pieces, heard.thinking_pieces = len(run.content), len(run.thinking)
        heard.content_bytes += len(content.encode())
        heard.thinking_bytes += len(thinking.encode())
        return delta
