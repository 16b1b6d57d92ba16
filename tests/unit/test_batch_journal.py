"""A batch's journal at its limit: what readers were given goes, but for what may still be on its way to them."""

from __future__ import annotations

import pytest

from unisono.adapters.journal.memory import MemoryJournal
from unisono.app.batch_journal import BatchJournal, Reader
from unisono.core.errors import SequenceOutOfRangeError
from unisono.core.events import Result, weight
from unisono.core.model import Completion, ItemState

LIMIT = 100_000


class StoppedClock:
    """Time is of no account here."""

    def time_ns(self) -> int:
        """Always the same."""
        return 0

    def monotonic_s(self) -> float:
        """Always the same."""
        return 0.0


def result(number: int, size: int = 1_000) -> Result:
    """An event of about so many bytes."""
    completion = Completion(model="m", content="y" * size)
    return Result(item_id=f"i{number}", index=number, state=ItemState.COMPLETED, completion=completion)


def journal(told: list[str]) -> BatchJournal:
    """A journal that says when it is full, and when there is room."""
    return BatchJournal(
        MemoryJournal(),
        "batch",
        StoppedClock(),
        max_bytes=LIMIT,
        on_full=lambda: told.append("full"),
        on_room=lambda: told.append("room"),
        on_lost=lambda _error: told.append("lost"),
    )


def test_the_last_that_was_given_is_kept() -> None:
    """A reader that was given everything, and comes back with less, finds a quarter of the limit; no more is kept."""
    told: list[str] = []
    kept = journal(told)
    reader = Reader(lambda: None)
    kept.attach(reader)
    few = LIMIT // 4 // weight(result(999))
    for number in range(1_000):
        kept.write(result(number))
        kept.consumed(reader, kept.last_sequence)
        assert kept.size_bytes <= LIMIT + 2_000
        last = kept.last_sequence
        again = kept.read(max(0, last - few), few)
        assert [entry.sequence for entry in again] == list(range(max(1, last + 1 - few), last + 1))
    with pytest.raises(SequenceOutOfRangeError):
        _ = kept.read(0, 1)


def test_a_reader_that_comes_back_is_waited_for() -> None:
    """What it has not been given again is not forgotten, though the connection before was given it."""
    told: list[str] = []
    kept = journal(told)
    first = Reader(lambda: None)
    kept.attach(first)
    while told != ["full"]:
        kept.write(result(kept.last_sequence))
    end = kept.last_sequence
    for sequence in range(1, end + 1):
        kept.consumed(first, sequence)
    assert told == ["full", "room"]
    again = Reader(lambda: None, has_read=end - 10)
    kept.detach(first)
    kept.attach(again)
    while told != ["full", "room", "full"]:
        kept.write(result(kept.last_sequence))
    assert kept.read(end - 10, 1)[0].sequence == end - 9
    for sequence in range(end - 9, kept.last_sequence + 1):
        assert kept.read(sequence - 1, 1)[0].sequence == sequence
        kept.consumed(again, sequence)
    assert told == ["full", "room", "full", "room"]


def test_one_event_above_the_limit_does_not_stop_a_batch_for_ever() -> None:
    """Once it was given, it is forgotten, though nothing else is kept then."""
    told: list[str] = []
    kept = journal(told)
    reader = Reader(lambda: None)
    kept.attach(reader)
    kept.write(result(0, 2 * LIMIT))
    assert told == ["full"]
    kept.consumed(reader, 1)
    assert told == ["full", "room"]
