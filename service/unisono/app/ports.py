"""What the application needs of the world: a backend, a journal, a clock, and somebody who watches.

Each port is a Protocol; `adapters/` implements them, and every implementation passes the same contract tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from unisono.core.capacity import SlotMemo
    from unisono.core.commands import ReleaseReason
    from unisono.core.errors import UnisonoError
    from unisono.core.events import Journalled, LastingEvent, Result, Summary
    from unisono.core.model import (
        Finished,
        Item,
        LoadedRunner,
        ModelInfo,
        PassMethod,
        RunnerSpec,
        SlotState,
        Spoke,
    )
    from unisono.core.report import GroupPlanned, RunnerFigures


class Clock(Protocol):
    """The time, so that tests may set it."""

    def monotonic_s(self) -> float:
        """Seconds since some moment; never goes back."""
        ...

    def time_ns(self) -> int:
        """Nanoseconds since 1970."""
        ...


class HeldCall(Protocol):
    """One request whose last byte is held back.

    It holds a connection of its own. Released by `Backend.release`; then `answer` is read once, to its end.
    """

    @property
    def is_closed(self) -> bool:
        """Whether the other side closed the connection while the call was held, or `abort` was called."""
        ...

    async def wait_closed(self) -> None:
        """Returns when the other side closes the connection of a call that is still held, or at the release."""
        ...

    def answer(self) -> AsyncGenerator[Spoke | Finished, None]:
        """The pieces of the answer, then `Finished` as the last thing, and only if the backend said "done".
        For embeddings it has as many vectors as there were texts.

        Raises a class of `core.errors`: everything the backend or the network can do is translated.
        Closing the iterator early, or cancelling its reader, closes the connection.
        """
        ...

    def abort(self) -> None:
        """Closes the connection at once, without waiting; safe at any time, any number of times."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseTimes:
    """When the last bytes of a wave went out, on this machine."""

    # Time of day of the first and of the last.
    first_ns: int
    last_ns: int

    @property
    def spread_s(self) -> float:
        """From the first to the last, in seconds."""
        return (self.last_ns - self.first_ns) / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOutcome:
    """What a load did."""

    # Whether the runner was there already, so that nothing was loaded.
    was_loaded: bool
    duration_s: float
    # Slots of the runner, where the backend tells them.
    slots: int | None = None
    # Tokens of context of each slot; 0 where the backend does not tell.
    context_tokens: int = 0


class Backend(Protocol):
    """An inference server. One arbiter drives each; nothing else talks to it.

    Every method raises classes of `core.errors` only (and CancelledError).
    """

    @property
    def name(self) -> str:
        """Its name in the configuration."""
        ...

    @property
    def kind(self) -> str:
        """What it is: "ollama", "llama-server" or "embedded"."""
        ...

    @property
    def url(self) -> str:
        """Where it is, without credentials."""
        ...

    @property
    def pass_method(self) -> PassMethod:
        """What `Spoke.at_ns` is: the backend's own time, or that of the arrival here."""
        ...

    async def version(self) -> str:
        """Its version, as proof that it answers; raises BackendUnavailableError where it does not."""
        ...

    async def models(self) -> tuple[ModelInfo, ...]:
        """The models that it can load."""
        ...

    async def find_model(self, name: str) -> ModelInfo:
        """The model of that name; empty: the only one it has. Raises ModelNotFoundError."""
        ...

    async def loaded(self) -> tuple[LoadedRunner, ...]:
        """What it holds in memory."""
        ...

    async def load(self, runner: RunnerSpec, *, keep_alive_s: float) -> LoadOutcome:
        """Makes the runner ready, by a request that generates nothing; at once where it is loaded.

        Raises LoadFailedError, ModelNotFoundError, BackendUnavailableError, BackendBusyError, …
        """
        ...

    async def unload(self, runner: RunnerSpec) -> None:
        """Takes the model out of memory; nothing where the backend cannot."""
        ...

    async def stage(self, item: Item, runner: RunnerSpec, headers: Mapping[str, str]) -> HeldCall:
        """Opens a connection and sends all of the request but its last byte, which starts it.

        Returns when the bytes have left this machine's buffers. `headers` are added to the request
        (trace context). Raises BackendUnavailableError where no connection can be had.
        """
        ...

    def release(self, calls: Sequence[HeldCall]) -> ReleaseTimes:
        """Sends the last byte of each call, in one loop that yields to nobody."""
        ...

    async def close(self) -> None:
        """Closes what is open; a child process is ended and waited for."""
        ...


class SlotMemory(Protocol):
    """What was learned of slots, for the next run. Nothing here waits or raises: what cannot be kept is not kept.

    A key is a backend's address, a space, and whatever names a runner on it.
    """

    def get(self, key: str) -> SlotMemo | None:
        """What was last put for a key; None: nothing, or it had to make room."""
        ...

    def put(self, key: str, memo: SlotMemo) -> None:
        """Remembers something instead of what was there."""
        ...

    def forget(self, backend: str) -> None:
        """Forgets all runners of a backend, which is named by its address."""
        ...


class BatchWatch(Protocol):
    """Somebody who watches one batch: telemetry. Told values, never asked for decisions; must not raise or wait.

    All times are nanoseconds since 1970. Items are named by their index.
    """

    def planned(self, *, started_ns: int, ended_ns: int, groups: Sequence[GroupPlanned], families: int) -> None:
        """Items were assigned to groups. Said again when a stream adds items.

        `families`: groups of items whose prompts begin alike, among those that were assigned now.
        """
        ...

    def group_loaded(
        self, *, group: int, started_ns: int, ended_ns: int, outcome: LoadOutcome | None, error: UnisonoError | None
    ) -> None:
        """The group's runner was made ready, or could not be."""
        ...

    def wave_released(
        self, *, group: int, wave: int, wave_key: int, item_count: int, others: int, times: ReleaseTimes
    ) -> None:
        """Requests were released together; said after `item_released` of each.

        `wave` counts the group's releases. `wave_key` names the release in this process: where it held items of other
        batches too (`others`), their watches are told the same one, one batch after the other.
        """
        ...

    def item_staging(self, *, item: Item, group: int, attempt: int, at_ns: int) -> Mapping[str, str]:
        """An attempt of an item begins; the answer is headers that go with its request (W3C trace context)."""
        ...

    def item_staged(self, *, index: int, at_ns: int) -> None:
        """All but the last byte of it is sent."""
        ...

    def item_released(
        self, *, index: int, wave: int, wave_key: int, at_ns: int, reason: ReleaseReason, lane: int | None
    ) -> None:
        """Its last byte is sent: why it was the next, and the lane that it is meant for (None: the first free one).

        `wave` and `wave_key`: see `wave_released`.
        """
        ...

    def item_first_token(self, *, index: int, at_ns: int) -> None:
        """It spoke for the first time in this attempt."""
        ...

    def item_retried(
        self, *, index: int, attempt: int, error: UnisonoError, again_in_s: float, is_free: bool, at_ns: int
    ) -> None:
        """The attempt failed, at that time, and there will be another.

        `is_free`: another item's attempt ended the runner, as far as is known, and this one was broken off with it.
        """
        ...

    def item_ended(self, *, result: Result, at_ns: int) -> None:
        """It ended; the last word on this item, also for one that never ran."""
        ...

    def ended(self, *, summary: Summary, at_ns: int) -> None:
        """The batch ended; the last word."""
        ...


class Listener(Protocol):
    """Whoever wants to watch batches."""

    def batch_accepted(self, *, batch_id: str, method: str, carrier: Mapping[str, str], at_ns: int) -> BatchWatch:
        """A batch exists. `method`: an rpc's full name ("unisono.v1.BatchInference/RunBatch"), or "POST /v1/batches".

        `carrier` is the caller's trace context: those of traceparent, tracestate and baggage that it sent.
        """
        ...


class BackendStanding(Protocol):
    """How a backend stands at a moment, for whoever shows it: only read, and from the event loop's thread."""

    @property
    def is_silent(self) -> bool:
        """Whether it was last found not to answer: an item, a load, a probe, or who asked for its models."""
        ...

    @property
    def queued(self) -> int:
        """Items that are not at the backend."""
        ...

    @property
    def in_flight(self) -> int:
        """Items at the backend."""
        ...

    @property
    def known_slots(self) -> Mapping[RunnerSpec, SlotState]:
        """What is known of the slots of all runners that had work lately."""
        ...

    def figures(self, runner: RunnerSpec) -> RunnerFigures:
        """What was seen of a runner since it first had work."""
        ...


class Journal(Protocol):
    """The numbered events of batches. Appending and reading never wait.

    What was appended is *visible* once it is as safe as this journal makes it; only then can it be read.
    """

    def create(
        self, batch_id: str, on_visible: Callable[[], None], on_lost: Callable[[Exception], None] | None = None
    ) -> None:
        """Begins the journal of a batch, or goes on with it.

        `on_visible` is called whenever there is more to read, maybe within `append`; `on_lost` when nothing more of
        the batch can be written, ever. Neither may raise or wait.
        """
        ...

    def append(self, batch_id: str, event: LastingEvent, at_ns: int) -> None:
        """Adds an event and gives it the next number."""
        ...

    def read(self, batch_id: str, after: int, limit: int) -> Sequence[Journalled]:
        """Up to `limit` visible events with numbers above `after`.

        Raises SequenceOutOfRangeError where some of these are no longer kept or `after` was never reached, and
        BatchNotFoundError.
        """
        ...

    def last_sequence(self, batch_id: str) -> int:
        """The highest number that is visible; 0 for none."""
        ...

    def is_settled(self, batch_id: str) -> bool:
        """Whether all that was appended is visible, as far as it ever will be."""
        ...

    def size_bytes(self, batch_id: str) -> int:
        """Bytes of memory that the batch's events are charged for."""
        ...

    @property
    def can_prune(self) -> bool:
        """Whether pruning makes room."""
        ...

    def prune(self, batch_id: str, up_to: int) -> None:
        """Forgets events with numbers up to this one, where that makes room."""
        ...

    def forget(self, batch_id: str) -> None:
        """This process has nothing to do with the batch any more; where nothing else keeps it, it is gone."""
        ...
