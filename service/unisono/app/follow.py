"""Follows one batch for one reader: its lasting events after a sequence, what items say meanwhile, and heartbeats.

The reader sets the pace: nothing is read from the journal before the last event was taken, and text gathers as an
offset, not as a queue. A reader that is slow, or stops reading, costs no memory beyond the journal's own limit.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unisono.app.batch_journal import Reader
from unisono.core.errors import ShuttingDownError
from unisono.core.events import Delta, Deltas, Heartbeat, Result, ResultPart, Summary
from unisono.core.paging import MAX_MESSAGE_WEIGHT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from unisono.app.item_run import ItemRun
    from unisono.app.ports import Clock
    from unisono.app.run_batch import RunningBatch
    from unisono.core.batch import DeltaSettings
    from unisono.core.events import Journalled, LastingEvent

# Events that are taken from the journal at once.
_PAGE = 64
# A message with less room than this takes no more text.
_LEAST_ROOM = 4096
# A stream that was silent for so long says that it lives: less than the minute after which proxies give up.
HEARTBEAT_S = 15.0
# Who followed a batch that this process has left looks for it so much later.
AGAIN_S = 1.0


async def follow(
    batch: RunningBatch,
    clock: Clock,
    *,
    after: int = 0,
    deltas: DeltaSettings | None = None,
    heartbeat_s: float = HEARTBEAT_S,
) -> AsyncGenerator[Journalled | Deltas | Heartbeat, None]:
    """Yields the batch's events after a sequence number, and ends after its summary.

    Raises SequenceOutOfRangeError where events are asked for that are not kept, or were never there, and
    ShuttingDownError where another process goes on with the batch. Text that was
    said before the reader came is in its first `Deltas`; the last of an item's text comes before its result.
    """
    batch.journal.read(after, 1)  # raises for a number that was never reached, before anybody waits for it
    woken = asyncio.Event()
    speech = _Speech(batch, deltas, woken) if deltas is not None else None
    reader = Reader(woken.set, speech.spoke if speech else None, has_read=after)
    batch.callers.attach(reader)
    silent_since_s = clock.monotonic_s()
    try:
        while True:
            for entry in batch.journal.read(after, _PAGE):
                if speech is not None and (index := _ending(entry.event)) is not None:
                    for said in speech.last_words(index):
                        yield said
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
            if batch.is_left:
                raise ShuttingDownError(
                    f"another process goes on with batch {batch.batch_id}, or will: follow it there, after {after}",
                    metadata={"batch_id": batch.batch_id},
                    retry_after_s=AGAIN_S,
                )
            if batch.is_over and batch.journal.is_settled:
                # The reader had all of it before it came.
                return
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
        batch.callers.detach(reader)


def _ending(event: LastingEvent) -> int | None:
    """The item whose result, or the first part of it, this is."""
    match event:
        case Result(parts=0) | ResultPart(part=0):
            return event.index
        case _:
            return None


async def _woken(event: asyncio.Event, wait_s: float) -> bool:
    """Whether the event was set within a time."""
    try:
        async with asyncio.timeout(wait_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


@dataclass(slots=True)
class _Place:
    """How much of an item's text one reader has been sent."""

    # Pieces, and characters of the one after them; in all, characters, and bytes of UTF-8.
    pieces: int = 0
    within: int = 0
    chars: int = 0
    size: int = 0

    def take(self, run: ItemRun, pieces: list[str], room: int) -> str:
        """What comes next, in about so many bytes at most."""
        text = pieces[0][self.chars :] if run.is_over else "".join(pieces[self.pieces :])[self.within :]
        fits = room if text.isascii() else room // 4
        if len(text) > fits:
            text = text[:fits]
            self.within += fits
        else:
            self.pieces, self.within = len(pieces), 0
        self.chars += len(text)
        self.size += len(text.encode())
        return text


@dataclass(slots=True)
class _Heard:
    """How much of an item one reader has been sent."""

    attempt: int = 0
    content: _Place = field(default_factory=_Place)
    thinking: _Place = field(default_factory=_Place)


class _Speech:
    """What items said since a reader's last flush, as places in their own text."""

    def __init__(self, batch: RunningBatch, settings: DeltaSettings, woken: asyncio.Event) -> None:
        self._batch = batch
        self._settings = settings
        self._woken = woken
        self._heard: dict[int, _Heard] = {}
        # Items that spoke since the last flush, and about how many bytes they said.
        self._fresh: dict[int, ItemRun] = {run.item.index: run for run in batch.running_items() if run.has_spoken}
        self._fresh_bytes = 0
        self._flushed_s = 0.0

    def spoke(self, index: int) -> None:
        """An item spoke: that makes a flush due once the interval is over, or the bytes are many."""
        run = self._batch.run_of(index)
        if run is None:
            return
        is_first = not self._fresh
        self._fresh[index] = run
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
        """What was said since the last flush, as much as fits in a message; the rest is due at once."""
        said: list[Delta] = []
        room = MAX_MESSAGE_WEIGHT
        while self._fresh and room >= _LEAST_ROOM:
            index, run = next(iter(self._fresh.items()))
            delta = self._delta(run, room)
            if delta is None:
                del self._fresh[index]
            else:
                said.append(delta)
                room -= _weight(delta)
        if not self._fresh:
            self._fresh_bytes = 0
            self._flushed_s = now
        return Deltas(items=tuple(said))

    def last_words(self, index: int) -> Iterator[Deltas]:
        """What an item that has ended said since the last flush."""
        run = self._fresh.pop(index, None)
        while run is not None and (delta := self._delta(run, MAX_MESSAGE_WEIGHT)) is not None:
            yield Deltas(items=(delta,))
        _ = self._heard.pop(index, None)

    def _delta(self, run: ItemRun, room: int) -> Delta | None:
        index = run.item.index
        heard = self._heard.get(index)
        if heard is None or heard.attempt != run.attempt:
            heard = self._heard[index] = _Heard(attempt=run.attempt)
        content_offset, thinking_offset = heard.content.size, heard.thinking.size
        thinking = heard.thinking.take(run, run.thinking, room)
        content = heard.content.take(run, run.content, max(0, room - 4 * len(thinking)))
        if not content and not thinking:
            return None
        return Delta(
            item_id=run.item.item_id,
            index=index,
            attempt=run.attempt,
            content_offset=content_offset,
            content=content,
            thinking_offset=thinking_offset,
            thinking=thinking,
        )


def _weight(delta: Delta) -> int:
    """Bytes that a delta takes in a message, at most."""
    return 4 * (len(delta.content) + len(delta.thinking)) + len(delta.item_id) + 64
