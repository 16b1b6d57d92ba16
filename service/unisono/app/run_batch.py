"""Runs one batch: takes its items, releases them, gives each its result, and ends with the summary.

Theory of operation. A batch goes through three stages: its input is open (items may be added), its input is closed,
it has ended. Items wait in `_waiting` until they are released; then `dispatch.py` finds their models, plans them into
groups and submits them. From there on the drivers tell the groups what happens (`group_run.py`), and each event goes
into the journal. When the input is closed and the last item has its result, the summary is written, and nothing
follows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from unisono.app import intake
from unisono.app.batch_journal import BatchJournal
from unisono.app.callers import Callers
from unisono.app.dispatch import Dispatch
from unisono.app.intake import Gate
from unisono.app.item_run import ItemRun
from unisono.app.register import Register
from unisono.app.timers import Timers
from unisono.core import paging
from unisono.core.batch import Ack, BadItem
from unisono.core.errors import (
    BatchDeadlineError,
    BatchFullError,
    CancelledItemError,
    CreditExceededError,
    DuplicateItemError,
    InputClosedError,
    InvalidRequestError,
    ItemNotFoundError,
    QueueTimeoutError,
    ShuttingDownError,
    UnisonoError,
)
from unisono.core.events import Accepted, BatchState, Result, Summary
from unisono.core.model import ItemState
from unisono.core.report import Progress, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from unisono.app.coalesce import Company
    from unisono.app.driver import BackendDriver
    from unisono.app.intake import Checked
    from unisono.app.ports import BatchWatch, Clock, Journal, Relay
    from unisono.app.resolve import Resolver
    from unisono.core.batch import BatchConfig
    from unisono.core.durable import EndedItem, StoredBatch
    from unisono.core.errors import Violation
    from unisono.core.limits import Limits
    from unisono.core.model import Item
    from unisono.core.passes import ForwardPass

# `progress` is written at most so often.
PROGRESS_INTERVAL_S = 1.0
# What stays of an item, and of a batch, beside the journal: ids, places, fingerprints, objects around them.
_BYTES_OF_AN_ITEM = 300
_BYTES_OF_A_BATCH = 8_192


class RunningBatch:
    """A batch, from its acceptance until it is forgotten."""

    def __init__(
        self,
        batch_id: str,
        config: BatchConfig,
        *,
        item_count: int,
        drivers: Mapping[str, BackendDriver],
        company: Company,
        resolver: Resolver,
        journal: Journal,
        clock: Clock,
        limits: Limits,
        watch: BatchWatch,
        on_end: Callable[[RunningBatch], None],
        report_defect: Callable[[str, BaseException], None],
        memory_limit_bytes: int | None = None,
        stored: StoredBatch | None = None,
        relay: Relay | None = None,
    ) -> None:
        """`stored`: the batch is kept, and is to be run, or to go on; its journal has it already.

        `relay`: it has one item, which is a forwarded request; where its answer goes.
        """
        self.batch_id = batch_id
        self.config = config
        self.state = BatchState.RUNNING
        self._clock = clock
        self._limits = limits
        self._gate = Gate(config, limits)
        self._watch = watch
        self._on_end = on_end
        self._relay = relay
        age_s = 0.0 if stored is None else max(0.0, (clock.time_ns() - stored.created_ns) / 1e9)
        self._accepted_s = clock.monotonic_s() - age_s
        # Items by index, until they end; and the names of all.
        self._runs: dict[int, ItemRun] = {}
        self._register = Register()
        # Items that have places and are still to be put; and that were put and not yet released.
        self._admitted = 0
        self._waiting: list[ItemRun] = []
        self._is_input_closed = False
        self._is_resting = False
        # Whether another run of it will tell what becomes of it.
        self.is_left = False
        # It is kept: nobody need be there for it.
        self.is_kept = stored is not None
        self._counts: Counter[ItemState] = Counter()
        # Why the batch ends before all its items have ended by themselves; None while it does not.
        self._cut_short: UnisonoError | None = None
        self._timers = Timers()
        max_bytes = limits.max_journal_bytes
        self.journal = BatchJournal(
            journal,
            batch_id,
            clock,
            max_bytes=max_bytes,
            on_full=self._pause,
            on_room=self._resume,
            on_lost=lambda _error: self.leave(),
        )
        self.callers = Callers(
            config,
            self.journal,
            self._timers,
            is_over=lambda: self.is_over,
            cancel=lambda error: self.cancel(error=error),
            on_abandoned=self.close_input if self.is_kept else None,
        )
        self._dispatch = Dispatch(
            config,
            drivers=drivers,
            company=company,
            resolver=resolver,
            journal=self.journal,
            clock=clock,
            watch=watch,
            runs=self._runs,
            on_result=self._end_item,
            report_defect=report_defect,
            memory_limit_bytes=memory_limit_bytes,
            relay=relay,
        )
        if stored is None:
            self.journal.write(Accepted(batch_id=batch_id, item_count=item_count))
        if config.deadline_s:
            self.expire_at(self._accepted_s + config.deadline_s)

    # -- What it is like -----------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether its summary is written."""
        return self.state is not BatchState.RUNNING

    @property
    def is_input_closed(self) -> bool:
        """Whether it takes no more items."""
        return self._is_input_closed

    @property
    def credit(self) -> int:
        """How many items may have been sent in all: what has ended, and `max_open_items` more."""
        ended = sum(self._counts.values())
        return min(self._limits.max_items, ended + self._limits.max_open_items)

    @property
    def accepted_count(self) -> int:
        """Items that were accepted so far."""
        return len(self._register)

    @property
    def size_bytes(self) -> int:
        """Bytes that it is charged for once it has ended: its journal, its pass maps, and names of items."""
        mapped = sum(group.counter.participations for group in self._dispatch.groups)
        return self.journal.size_bytes + 16 * mapped + _BYTES_OF_AN_ITEM * len(self._register) + _BYTES_OF_A_BATCH

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(
            accepted=len(self._register),
            queued=len(self._runs) - self.in_flight,
            in_flight=self.in_flight,
            completed=self._counts[ItemState.COMPLETED],
            failed=self._counts[ItemState.FAILED],
            cancelled=self._counts[ItemState.CANCELLED],
            expired=self._counts[ItemState.EXPIRED],
            completion_tokens=sum(group.spoken_tokens for group in self._dispatch.groups),
            passes=sum(group.counter.so_far for group in self._dispatch.groups),
        )

    @property
    def unplanned(self) -> int:
        """Items that were released and wait for their model to be found."""
        return self._dispatch.unplanned

    def running_items(self) -> Iterable[ItemRun]:
        """Items that have not ended, for those who want to hear them speak."""
        return self._runs.values()

    def run_of(self, index: int) -> ItemRun | None:
        """An item that has not ended."""
        return self._runs.get(index)

    def passes(self, start: int, limit: int) -> list[tuple[int, int, ForwardPass]]:
        """See Dispatch.passes."""
        return self._dispatch.passes(start, limit)

    @property
    def unmapped_passes(self) -> int:
        """Passes whose items are not known any more."""
        return sum(group.counter.unmapped for group in self._dispatch.groups)

    # -- What callers do -----------------------------------------------------------------------------------

    def run_whole(self, items: Iterable[Checked]) -> None:
        """Takes all items at once, and no more: for requests that were checked, and came in one message.

        Whatever is wrong with one becomes its result.
        """
        for one in items:
            self._put(self._register.add(one.item), one.item, one.wrong)
        self.close_input()

    def run_stored(
        self, items: Iterable[tuple[int, Item | BadItem]], ended: Iterable[EndedItem], *, is_whole: bool
    ) -> None:
        """Takes the items of a kept batch, each in its place, and what became of the others.

        `is_whole`: no more will come; else a stream may add some.
        """
        for one in ended:
            self._counts[one.state] += 1
            self._register.restore(one.index, one.item_id)
        for index, item in items:
            self._register.restore(index, item.item_id, item.variant_of)
            self._put(index, item, item.violations if isinstance(item, BadItem) else ())
        if is_whole:
            self.close_input()
        else:
            self.release()
            self.callers.notice_loss()

    def rest(self) -> None:
        """The service is being stopped: nothing more of it goes, and what is at a backend may be answered."""
        self._is_resting = True
        self._dispatch.pause()

    @property
    def in_flight(self) -> int:
        """Items at a backend."""
        return sum(1 for run in self._runs.values() if run.released_ns is not None)

    def leave(self) -> None:
        """Another process runs it, or will: what happens here counts no more, and backends are left alone."""
        self.is_left = True
        self.journal.close()
        _ = self.cancel(error=ShuttingDownError("the batch is left to another process"))

    def add(self, items: Sequence[Item | BadItem], *, is_reopened: bool = False) -> list[Ack]:
        """Takes items of a stream, or refuses them, one Ack each; one for each answer that an item taken will have.

        STRICT: if one is malformed, all of these are refused. PER_ITEM: it becomes part of the batch and fails.
        """
        acks, taken = self.admit(items, is_reopened=is_reopened)
        self.put(taken)
        return acks

    def admit(
        self, items: Sequence[Item | BadItem], *, is_reopened: bool = False
    ) -> tuple[list[Ack], list[tuple[int, Checked]]]:
        """Gives items of a stream their places, or refuses them; see `add`. Those taken are still to be put.

        The batch does not end before they are.
        """
        checked = [self._gate.check(item, place) for place, item in enumerate(items)]
        # What is wrong with an item is wrong with each of its answers.
        wrong = [several[0].wrong for several in checked]
        if self.config.is_strict and any(wrong):
            other = InvalidRequestError("another item of the same message is wrong, and validation is STRICT")
            refused = [
                Ack(item_id=item.item_id, place=place, refusal=intake.error_of(own) if own else other)
                for place, (item, own) in enumerate(zip(items, wrong, strict=True))
            ]
            return refused, []
        acks: list[Ack] = []
        taken: list[tuple[int, Checked]] = []
        for several in checked:
            acks += self._take(several, taken, is_reopened=is_reopened)
        self._admitted += len(taken)
        return acks, taken

    def put(self, taken: Sequence[tuple[int, Checked]]) -> None:
        """Items that were admitted go, or wait for their release."""
        self._admitted -= len(taken)
        for index, one in taken:
            self._put(index, one.item, one.wrong)
            if len(self._waiting) >= self.config.release_size:
                self.release()
        if self._cut_short is not None:
            # That happened meanwhile.
            state = ItemState.EXPIRED if isinstance(self._cut_short, BatchDeadlineError) else ItemState.CANCELLED
            self._dispatch.end([index for index, _ in taken], state, self._cut_short)
        elif self._is_input_closed:
            self.release()
        elif self._waiting and self.config.release_interval_s and "release" not in self._timers:
            self._timers.start("release", self.config.release_interval_s, self.release)
        self._maybe_end()

    def release(self) -> None:
        """What was added goes now."""
        self._timers.stop("release")
        waiting, self._waiting = self._waiting, []
        self._dispatch.release(waiting)

    def close_input(self) -> None:
        """No more items will come; what was added goes now."""
        self._is_input_closed = True
        self.release()
        self._maybe_end()

    def cancel(
        self, item_ids: Sequence[str] = (), *, error: UnisonoError | None = None, ignores_unknown: bool = False
    ) -> tuple[int, int]:
        """Cancels items, or all of them and closes the input; answers with how many, and how many had ended.

        The id of an item with several answers stands for all of them.
        `error` says why; None: the caller wanted it. Raises ItemNotFoundError, unless such items are ignored.
        """
        is_all = not item_ids
        found = {item_id: self._register.indexes(item_id) for item_id in item_ids}
        unknown = [item_id for item_id, indexes in found.items() if not indexes]
        if unknown and not ignores_unknown:
            raise ItemNotFoundError(f"batch {self.batch_id} has no item {unknown[0]!r}")
        named = dict.fromkeys(index for indexes in found.values() for index in indexes)
        indexes = self._register.all() if is_all else list(named)
        running = [index for index in indexes if index in self._runs]
        if is_all:
            self._cut_short = self._cut_short or error or CancelledItemError("the batch was cancelled")
        self._dispatch.end(running, ItemState.CANCELLED, error or CancelledItemError("was cancelled"))
        if is_all:
            self.close_input()
        return len(running), len(indexes) - len(running)

    def expire_at(self, moment_s: float) -> None:
        """What has not ended by then expires, and the input closes. Only ever brings the end nearer."""
        if self._dispatch.deadline_s is None or moment_s < self._dispatch.deadline_s:
            self._dispatch.deadline_s = moment_s
            self._timers.start("deadline", max(0.0, moment_s - self._clock.monotonic_s()), self._expire)

    def let_go(self) -> None:
        """It is forgotten: it and its parts, which know each other, wait for no search for such circles."""
        self._register.clear()
        self.callers.let_go()
        self._dispatch.let_go()
        self.journal.let_go()

    # -- Taking items --------------------------------------------------------------------------------------

    def _take(self, several: Sequence[Checked], taken: list[tuple[int, Checked]], *, is_reopened: bool) -> list[Ack]:
        """Takes an item, as the items that its answers are; or refuses it as one."""
        place, first = several[0].place, several[0].item
        register = self._register
        fresh = [one for one in several if one.item.item_id not in register]
        refusal = None if not fresh else self._refusal(len(fresh))
        for one in several:
            if one.item.item_id in register and not (is_reopened and register.is_same(one.item)):
                refusal = DuplicateItemError(f"the batch already has an item {one.item.item_id!r}")
        if refusal is not None:
            return [Ack(item_id=first.variant_of or first.item_id, place=place, refusal=refusal)]
        taken += [(register.add(one.item), one) for one in fresh]
        item_ids = [one.item.item_id for one in several]
        return [Ack(item_id=item_id, place=place, index=register.index(item_id)) for item_id in item_ids]

    def _put(self, index: int, item: Item | BadItem, wrong: Sequence[Violation]) -> None:
        """The item has this place."""
        if isinstance(item, BadItem) or wrong:
            error = intake.error_of(wrong)
            self._end_item(
                Result(
                    item_id=item.item_id,
                    index=index,
                    state=ItemState.FAILED,
                    error=error,
                    variant_of=item.variant_of,
                )
            )
            return
        item = replace(item, index=index)
        run = self._runs[index] = ItemRun(item, accepted_ns=self._clock.time_ns())
        self._waiting.append(run)
        if "progress" not in self._timers:
            self._timers.start("progress", PROGRESS_INTERVAL_S, self._tell_progress)
        if self.config.queue_timeout_s and "queue" not in self._timers:
            self._timers.start("queue", self.config.queue_timeout_s, self._expire_queued)

    def _refusal(self, count: int) -> UnisonoError | None:
        """Why so many more items are not taken at this moment."""
        if self._is_input_closed or self.is_over:
            return InputClosedError(f"batch {self.batch_id} takes no more items")
        count_so_far = len(self._register)
        if count_so_far + count > self._limits.max_items:
            return BatchFullError(f"a batch has at most {self._limits.max_items:,} items; open another one")
        if count_so_far + count > self.credit:
            return CreditExceededError(
                f"{len(self._runs):,} items have not ended; wait for credit before sending more", retry_after_s=1.0
            )
        return None

    # -- Ends ----------------------------------------------------------------------------------------------

    def _end_item(self, result: Result) -> None:
        """An item has its result: the one thing that every item comes to."""
        _ = self._runs.pop(result.index, None)
        self._counts[result.state] += 1
        if isinstance(result.error, BatchDeadlineError):
            # The driver keeps to the deadline too, and may be the first to notice.
            self._cut_short = self._cut_short or result.error
        self._watch.item_ended(result=result, at_ns=self._clock.time_ns())
        if self._relay is not None:
            self._relay.over(result.error)
        parts, rest = paging.split(result)
        for part in parts:
            self.journal.write(part)
        self.journal.write(rest)
        self._maybe_end()

    def _expire(self) -> None:
        if not self.is_over:
            self._cut_short = error = BatchDeadlineError("the batch's deadline has passed")
            self._dispatch.end(list(self._runs), ItemState.EXPIRED, error)
            self.close_input()

    def _expire_queued(self) -> None:
        """Keeps the queue_timeout of items that no driver has yet: not released, or their model not found."""
        now_ns, timeout_s = self._clock.time_ns(), self.config.queue_timeout_s or 0.0
        queued = [run for run in self._runs.values() if run.ticket is None]
        late = [run.item.index for run in queued if (now_ns - run.accepted_ns) / 1e9 >= timeout_s]
        error = QueueTimeoutError("had not been answered anything in time (queue_timeout)")
        self._dispatch.end(late, ItemState.EXPIRED, error)
        if len(late) < len(queued) and not self.is_over:
            oldest_s = (now_ns - queued[len(late)].accepted_ns) / 1e9
            self._timers.start("queue", max(0.0, timeout_s - oldest_s), self._expire_queued)

    def _maybe_end(self) -> None:
        if self._runs or self._admitted or not self._is_input_closed or self.is_over:
            return
        match self._cut_short:
            case None:
                self.state = BatchState.COMPLETED
            case BatchDeadlineError():
                self.state = BatchState.EXPIRED
            case _:
                self.state = BatchState.CANCELLED
        self._timers.stop_all()
        self._dispatch.stop()
        summary = Summary(state=self.state, report=self._report(), error=self._cut_short)
        self._watch.ended(summary=summary, at_ns=self._clock.time_ns())
        self.journal.write(summary)
        self._on_end(self)

    def _report(self) -> Report:
        groups = tuple(group.report() for group in self._dispatch.groups)
        told = [group.cached_prompt_tokens for group in self._dispatch.groups]
        cached = [tokens for tokens in told if tokens is not None]
        return Report(
            batch_id=self.batch_id,
            duration_s=self._clock.monotonic_s() - self._accepted_s,
            counts=self.progress,
            groups=groups,
            prompt_tokens=sum(group.prompt_tokens for group in groups),
            cached_prompt_tokens=sum(cached) if cached else None,
            completion_tokens=sum(group.completion_tokens for group in groups),
            retries=sum(group.retries for group in self._dispatch.groups),
            journal_bytes=self.journal.size_bytes,
        )

    # -- Small things --------------------------------------------------------------------------------------

    def _pause(self) -> None:
        """The journal is full."""
        self._dispatch.pause()

    def _resume(self) -> None:
        """There is room in it again."""
        if not self._is_resting:
            self._dispatch.resume()

    def _tell_progress(self) -> None:
        self.journal.write(self.progress)
        if self._runs:
            self._timers.start("progress", PROGRESS_INTERVAL_S, self._tell_progress)
