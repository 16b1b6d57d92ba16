"""What callers were told, and what was measured beside them: values, without a judgement.

Whoever calls the service writes down here what it hears (`callers.py`, `streams.py`, `uploads.py`); what must be so
is in `validators.py`. A history has plain values only, so that a test can spoil one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from google.rpc import error_details_pb2, status_pb2

from unisono._generated.unisono.v1 import event_pb2

COMPLETED = "COMPLETED"


@dataclass(frozen=True, kw_only=True)
class End:
    """How an item ended."""

    item_id: str
    # "COMPLETED", "FAILED" and so on.
    state: str = COMPLETED
    # Why it has no answer; empty where it has one.
    reason: str = ""
    # How often it was sent to a backend, and how many tokens its answer has, as its result says.
    calls: int = 1
    tokens: int = 0


@dataclass
class Connection:
    """One connection that followed a batch."""

    # It asked for the events after this one,
    after: int
    # and these came, by their numbers.
    numbers: list[int] = field(default_factory=list)


@dataclass
class History:
    """All that was told of one batch, in the order in which it was told."""

    # The caller's name for it; prompts begin with it.
    name: str
    # Items that were accepted.
    wanted: set[str]
    # The batch's id, each time that it was told.
    ids: list[str] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    # Events that last, as bytes, so that what is compared is everything; how each item ended; and how many had, each
    # time that somebody said.
    events: list[bytes] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)
    # After how many events each end of the batch was told.
    over_at: list[int] = field(default_factory=list)
    # In the end: all events read once more; results as they came, and as pages have them; and the batch's counters.
    again: list[bytes] = field(default_factory=list)
    results: dict[str, bytes] = field(default_factory=dict)
    pages: list[tuple[str, bytes]] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)

    @property
    def batch_id(self) -> str:
        """What the service calls it; empty before it was said."""
        return self.ids[0] if self.ids else ""

    @property
    def is_over(self) -> bool:
        """Whether the batch's end was told."""
        return bool(self.over_at)

    @property
    def last(self) -> int:
        """The number of the last event that came: a connection goes on from there."""
        return next((one.numbers[-1] for one in reversed(self.connections) if one.numbers), 0)

    def connect(self) -> Connection:
        """A new connection follows the batch."""
        connection = Connection(self.last)
        self.connections.append(connection)
        return connection

    def add(self, event: event_pb2.BatchEvent) -> None:
        """An event came on the newest connection."""
        if not event.HasField("sequence"):
            return
        self.connections[-1].numbers.append(event.sequence)
        self.events.append(packed(event))
        match event.WhichOneof("event"):
            case "result":
                self.ends.append(end_of(event.result))
                self.results[event.result.item_id] = packed(event.result)
            case "progress":
                counts = event.progress
                self.progress.append(counts.completed + counts.failed + counts.cancelled + counts.expired)
            case "summary":
                self.over_at.append(len(self.events))
            case _:
                pass


def tokens_of(item_id: str) -> int:
    """How many tokens the answer of item "iN" has when it is whole: short ones, of different lengths."""
    return 3 + int(item_id.removeprefix("i")) % 5


def packed(message: event_pb2.BatchEvent | event_pb2.Result) -> bytes:
    """A message as bytes, equal where the messages are."""
    return message.SerializeToString(deterministic=True)


def end_of(result: event_pb2.Result) -> End:
    """What a result says."""
    return End(
        item_id=result.item_id,
        state=event_pb2.ItemState.Name(result.state).removeprefix("ITEM_STATE_"),
        reason=reason_of(result.error) if result.WhichOneof("outcome") == "error" else "",
        calls=result.attempts + result.disturbed,
        tokens=result.usage.completion_tokens,
    )


def reason_of(status: status_pb2.Status) -> str:
    """The reason of a status; empty where it has none."""
    info = error_details_pb2.ErrorInfo()
    return next((info.reason for detail in status.details if detail.Unpack(info)), "")


# -- Beside the callers ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How large the service was at one moment."""

    # What its process has in memory, and its folder on the disk: bytes.
    memory_bytes: int = 0
    folder_bytes: int = 0
    # Batches that run; items at the backend, and in the queue before it.
    running: int = 0
    in_flight: int = 0
    queued: int = 0


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What no sample may exceed."""

    memory_bytes: int
    folder_bytes: int
    running: int
    in_flight: int
    queued: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the backend was asked for."""

    # How often for each prompt, "NAME ITEM".
    calls: Counter[str]
    # Deaths of the service, and of the backend.
    service_kills: int = 0
    backend_kills: int = 0
    # What one death may cost: calls that are made again, or that never arrived.
    a_kill: int = 0


def calls_told(histories: Sequence[History]) -> int:
    """How often items were sent to a backend, as their results say."""
    return sum(end.calls for one in histories for end in one.ends)
