"""Runs one batch: takes its items, releases them, gives each its result, and ends with the summary.

Theory of operation. A batch goes through three stages: its input is open (items may be added), its input is closed,
it has ended. Items wait in `_waiting` until they are released; then `dispatch.py` finds their models, plans them into
groups and submits them. From there on the drivers tell the groups what happens (`group_run.py`), and each event goes
into the journal. When the input is closed and the last item has its result, the summary is written, and nothing
follows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from unisono.app import intake
from unisono.app.admission import Admission
from unisono.app.backlog import Backlog
from unisono.app.batch_journal import BatchJournal
from unisono.app.callers import Callers
from unisono.app.dispatch import Dispatch
from unisono.app.ending import Ending
from unisono.app.expiry import Expiry
from unisono.app.figures import Figures
from unisono.app.item_run import ItemRun
from unisono.app.register import Register
from unisono.app.timers import Timers
from unisono.core import paging
from unisono.core.batch import BadItem
from unisono.core.durable import KeptItem
from unisono.core.errors import (
    BatchDeadlineError,
    InputClosedError,
    ShuttingDownError,
    UnisonoError,
)
from unisono.core.events import Accepted, BatchState, Result, Summary
from unisono.core.model import ItemState
from unisono.core.report import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from unisono.app.coalesce import Company
    from unisono.app.driver import BackendDriver
    from unisono.app.intake import Checked
    from unisono.app.ports import BatchWatch, Clock, Journal, Relay
    from unisono.app.resolve import Resolver
    from unisono.core.batch import Ack, BatchConfig
    from unisono.core.durable import Spent, StoredBatch
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
        self._watch = watch
        self._on_end = on_end
        self._relay = relay
        age_s = 0.0 if stored is None else max(0.0, (clock.time_ns() - stored.created_ns) / 1e9)
        self._accepted_s = clock.monotonic_s() - age_s
        # Items by index, until they end; and the names of all.
        self._runs: dict[int, ItemRun] = {}
        self._register = Register()
        # Of a kept batch: what is in the store alone.
        self.backlog = Backlog(most_items=limits.max_open_items)
        self._admission = Admission(config, limits, self._register, closed=self._closed, credit=lambda: self.credit)
        # Items that have places and are still to be put; and that were put and not yet released.
        self._admitted = 0
        self._waiting: list[ItemRun] = []
        self._is_input_closed = False
        self._is_resting = False
        # Whether another run of it will tell what becomes of it.
        self.is_left = False
        # It is kept: nobody need be there for it.
        self.is_kept = stored is not None
        # Whether its items are known, without which it cannot end: those of a kept one are still to be told.
        self._is_known = stored is None
        self._timers = Timers()
        self.journal = BatchJournal(
            journal,
            batch_id,
            clock,
            max_bytes=limits.max_journal_bytes,
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
        self._ending = Ending(
            batch_id,
            register=self._register,
            runs=self._runs,
            backlog=self.backlog,
            dispatch=self._dispatch,
            clock=clock,
            on_result=self._end_item,
        )
        self._figures = Figures(self._dispatch.groups)
        self._expiry = Expiry(
            self._timers,
            clock,
            queue_timeout_s=config.queue_timeout_s or 0.0,
            queued=self._ending.queued,
            expire=lambda indexes, error: self._ending.end(indexes, ItemState.EXPIRED, error),
            on_deadline=self._expire,
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
        """How many items may have been sent in all: what has ended, and `max_open_items` more.

        Of a kept batch as many as any has: what is too much for memory waits in the store.
        """
        if self.is_kept:
            return self._limits.max_items
        return min(self._limits.max_items, self._figures.ended + self._limits.max_open_items)

    @property
    def accepted_count(self) -> int:
        """Items that were accepted so far."""
        return len(self._register)

    @property
    def size_bytes(self) -> int:
        """Bytes that it is charged for once it has ended: its journal, its pass maps, and names of items."""
        mapped = 16 * self._figures.participations
        return self.journal.size_bytes + mapped + _BYTES_OF_AN_ITEM * len(self._register) + _BYTES_OF_A_BATCH

    @property
    def progress(self) -> Progress:
        """How far it is."""
        queued = len(self._runs) + len(self.backlog) - self.in_flight
        return self._figures.progress(accepted=len(self._register), queued=queued, in_flight=self.in_flight)

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
        return self._figures.unmapped_passes

    # -- What callers do -----------------------------------------------------------------------------------

    def run_whole(self, items: Iterable[Checked]) -> None:
        """Takes all items at once, and no more: for requests that were checked, and came in one message.

        Whatever is wrong with one becomes its result.
        """
        for one in items:
            self._put(self._register.add(one.item), one.item, one.wrong)
        self.close_input()

    def run_stored(self, items: Iterable[KeptItem], *, is_whole: bool, spent: Spent | None = None) -> None:
        """Knows of the items of a kept batch, each in its place: those without a result wait in its backlog.

        `is_whole`: no more will come; else a stream may add some. `spent`: by processes that had it before.
        """
        self._figures.spent = spent
        now_ns = self._clock.time_ns()
        for one in items:
            self._register.restore(one.index, one.item_id, one.variant_of)
            if one.state is None:
                self.backlog.wait(one, now_ns)
            else:
                self._figures.count(one.state)
        self._is_known = True
        if len(self.backlog):
            self._expiry.watch_queue()
        self._ending.cut()
        if is_whole:
            self.close_input()
        else:
            self.callers.notice_loss()

    def feed(self, items: Iterable[tuple[int, Item | BadItem]]) -> None:
        """Items of the backlog were fetched, and go now; those that have ended meanwhile are left out."""
        for index, item in items:
            accepted_ns = self.backlog.fetched(index)
            if accepted_ns is not None:
                wrong = item.violations if isinstance(item, BadItem) else ()
                self._put(index, item, wrong, accepted_ns=accepted_ns)
        self.release()

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
        # Also where its items were not even told.
        self.is_left = self._is_known = True
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
        acks, taken = self._admission.admit(items, is_reopened=is_reopened)
        self._admitted += len(taken)
        return acks, taken

    def put(self, taken: Sequence[tuple[int, Checked]]) -> None:
        """Items that were admitted go, or wait for their release."""
        self._admitted -= len(taken)
        for index, one in taken:
            if self.is_kept and not self.backlog.has_room_for(index, one.item, self._clock.time_ns()):
                self._expiry.watch_queue()
                continue
            self._put(index, one.item, one.wrong)
            if len(self._waiting) >= self.config.release_size:
                self.release()
        if self._ending.cut_short is not None:
            # That happened meanwhile.
            self._ending.cut([index for index, _ in taken])
        elif self._is_input_closed:
            self.release()
        elif self._waiting and self.config.release_interval_s and "release" not in self._timers:
            self._timers.start("release", self.config.release_interval_s, self.release)
        self._maybe_end()

    def withdraw(self, taken: Sequence[tuple[int, Checked]]) -> None:
        """Items that were admitted never come: the batch was left before they were kept."""
        self._admitted -= len(taken)
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
        found = self._ending.cancel(item_ids, error=error, ignores_unknown=ignores_unknown)
        if not item_ids:
            self.close_input()
        return found

    def expire_at(self, moment_s: float) -> None:
        """What has not ended by then expires, and the input closes. Only ever brings the end nearer."""
        if self._dispatch.deadline_s is None or moment_s < self._dispatch.deadline_s:
            self._dispatch.deadline_s = moment_s
            self._expiry.set_deadline(moment_s)

    def let_go(self) -> None:
        """It is forgotten: it and its parts, which know each other, wait for no search for such circles."""
        self._register.clear()
        self.callers.let_go()
        self._admission.let_go()
        self._expiry.let_go()
        self._ending.let_go()
        self._dispatch.let_go()
        self.journal.let_go()

    # -- Taking items --------------------------------------------------------------------------------------

    def _put(
        self, index: int, item: Item | BadItem, wrong: Sequence[Violation], *, accepted_ns: int | None = None
    ) -> None:
        """The item has this place. `accepted_ns`: since when, where that is not now."""
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
        accepted_ns = self._clock.time_ns() if accepted_ns is None else accepted_ns
        run = self._runs[index] = ItemRun(item, accepted_ns=accepted_ns)
        self._waiting.append(run)
        if "progress" not in self._timers:
            self._timers.start("progress", PROGRESS_INTERVAL_S, self._tell_progress)
        self._expiry.watch_queue()

    def _closed(self) -> UnisonoError | None:
        is_closed = self._is_input_closed or self.is_over
        return InputClosedError(f"batch {self.batch_id} takes no more items") if is_closed else None

    # -- Ends ----------------------------------------------------------------------------------------------

    def _end_item(self, result: Result) -> None:
        """An item has its result: the one thing that every item comes to."""
        _ = self._runs.pop(result.index, None)
        self.backlog.ended(result.index)
        self._figures.count(result.state)
        if isinstance(result.error, BatchDeadlineError):
            # The driver keeps to the deadline too, and may be the first to notice.
            self._ending.cut_short = self._ending.cut_short or result.error
        self._watch.item_ended(result=result, at_ns=self._clock.time_ns())
        if self._relay is not None:
            self._relay.over(result.error)
        parts, rest = paging.split(result)
        for part in parts:
            self.journal.write(part)
        self.journal.write(rest)
        self._maybe_end()

    def _expire(self, error: UnisonoError) -> None:
        if not self.is_over:
            self._ending.cut_short = error
            self._ending.cut()
            self.close_input()

    def _maybe_end(self) -> None:
        is_waiting = self._runs or len(self.backlog) or self._admitted or not self._is_known
        if is_waiting or not self._is_input_closed or self.is_over:
            return
        self.state = self._ending.state
        self._timers.stop_all()
        self._dispatch.stop()
        self.backlog.close()
        report = self._figures.report(
            self.batch_id,
            self.progress,
            duration_s=self._clock.monotonic_s() - self._accepted_s,
            journal_bytes=self.journal.size_bytes,
        )
        summary = Summary(state=self.state, report=report, error=self._ending.cut_short)
        self._watch.ended(summary=summary, at_ns=self._clock.time_ns())
        self.journal.write(summary)
        self._on_end(self)

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
        if self._runs or len(self.backlog):
            self._timers.start("progress", PROGRESS_INTERVAL_S, self._tell_progress)
