"""What happens to a batch, as values.

Lasting events are journalled and numbered without gaps; passing ones (`Heartbeat`, `Deltas`) are seen by those
who watch at that moment and by nobody later. `weight` says how many bytes of memory an event is charged for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# The journal reads the types of events at run time.
from unisono.core.commands import ReleaseReason
from unisono.core.errors import UnisonoError
from unisono.core.model import Completion, ItemState, Timings, TokenLogprob, Usage, Vector

# Figures of a batch at one moment, which are events too.
from unisono.core.report import GroupPlanned, Progress, Report


class BatchState(Enum):
    """How a batch ended, or that it has not."""

    RUNNING = "running"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class LoadState(Enum):
    """How far a load is."""

    STARTED = "started"
    LOADED = "loaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The batch exists; always the first event."""

    batch_id: str
    item_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """A model is being loaded for a group, or was."""

    group: int
    state: LoadState
    duration_s: float | None = None
    error: UnisonoError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A wave of the group was released together."""

    group: int
    # The wave's number within the group, from 0.
    wave: int
    # Requests of this batch in it, and of others.
    item_count: int
    others: int
    # From the first to the last final byte at our sockets.
    spread_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPart:
    """A part of a result that is too large for one message; parts stand just before their result."""

    item_id: str
    index: int
    # The part's number, from 0.
    part: int
    content: str = ""
    thinking: str = ""
    embeddings: tuple[Vector, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """An item ended. Exactly one of `completion` and `error` is set."""

    item_id: str
    index: int
    state: ItemState
    completion: Completion | None = None
    error: UnisonoError | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    # How often it was sent to a backend.
    attempts: int = 0
    # Other items that shared at least one of its passes.
    shared_with: int = 0
    # Passes that it took part in.
    passes: int = 0
    # The group that it ran in; None where it never ran.
    group: int | None = None
    # How many parts stand before this event.
    parts: int = 0
    # For one of several answers of an item: the item's own id.
    variant_of: str = ""
    # Why it was released when it was; None where it never was.
    release_reason: ReleaseReason | None = None
    # Times that it was broken off because another item's attempt ended the runner, or because its request was refused
    # for what may have been another item's text; not among `attempts`.
    disturbed: int = 0
    # Items that went in one request with it, itself included.
    bundle_size: int = 1
    # From its acceptance to its last release, in seconds; to its end where it was not released or had come back. For
    # those who watch: what callers are told is in `timings`.
    waited_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The batch ended; always the last event."""

    state: BatchState
    report: Report
    error: UnisonoError | None = None


LastingEvent = Accepted | GroupPlanned | Loading | Released | ResultPart | Result | Progress | Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Journalled:
    """A lasting event in its place."""

    # From 1, without gaps.
    sequence: int
    # When it happened, time of day.
    at_ns: int
    event: LastingEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """The stream lives, though nothing happens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Text that one item said since the last flush."""

    item_id: str
    index: int
    # The attempt that speaks, from 1; a new one starts again at offset 0.
    attempt: int
    # Bytes of UTF-8 that came before.
    content_offset: int
    content: str
    thinking_offset: int
    thinking: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Deltas:
    """Text of all items that spoke since the last flush."""

    items: tuple[Delta, ...]


PassingEvent = Heartbeat | Deltas

# What an event is charged beyond its texts and vectors: the objects around them. Measured with batches of two items:
# some 13 kB for six events and what a batch keeps beside them.
_BASE_WEIGHT = 2048
_LOGPROB_WEIGHT = 160


def weight(event: LastingEvent) -> int:
    """Bytes of memory that an event is charged for: its texts and vectors, and a flat sum for the rest.

    An estimate on the safe side (UTF-8 is counted at one byte for ASCII, and as much as four for others), so that
    a journal's limit in bytes holds without encoding every event.
    """
    match event:
        case Result():
            done = event.completion
            total = _BASE_WEIGHT + len(event.item_id)
            if event.error is not None:
                total += len(event.error.message)
            if done is not None:
                total += _weight_of(done.content, done.thinking, done.embeddings, done.logprobs)
                total += sum(len(call.arguments_json) for call in done.tool_calls)
            return total
        case ResultPart():
            return _BASE_WEIGHT + _weight_of(event.content, event.thinking, event.embeddings, event.logprobs)
        case _:
            return _BASE_WEIGHT


def _weight_of(
    content: str, thinking: str, embeddings: tuple[Vector, ...], logprobs: tuple[TokenLogprob, ...]
) -> int:
    texts = sum(len(text) if text.isascii() else 4 * len(text) for text in (content, thinking))
    vectors = sum(4 * len(vector) for vector in embeddings)
    tokens = sum(_LOGPROB_WEIGHT * (1 + len(entry.top)) for entry in logprobs)
    return texts + vectors + tokens
