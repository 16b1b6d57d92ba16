"""Runs one batch: takes its items, plans them, hands them to their backends' drivers, and writes its journal.

Theory of operation. A batch goes through three stages: its input is open (items may be added), its input is closed,
it has ended. Items wait in `_waiting` until they are released; then a task of the batch finds their models, plans
them into groups and submits them. From there on the drivers tell the batch what happens (it is their `Sink`), and
each event goes into the journal. When the input is closed and the last item has its result, the summary is
written, and nothing follows.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from unisono.app import intake
from unisono.app.batch_journal import BatchJournal
from unisono.app.group_run import GroupRun
from unisono.app.item_run import ItemRun
from unisono.core import paging
from unisono.core.batch import Ack, BadItem
from unisono.core.commands import Work
from unisono.core.errors import (
    BatchDeadlineError,
    CancelledItemError,
    CreditExceededError,
    DuplicateItemError,
    InputClosedError,
    InternalError,
    InvalidRequestError,
    ItemNotFoundError,
    LimitExceededError,
    QueueTimeoutError,
    UnisonoError,
)
from unisono.core.events import Accepted, BatchState, Progress, Result, Summary
from unisono.core.model import ItemState
from unisono.core.plan import plan
from unisono.core.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from unisono.app.batch_journal import Reader
    from unisono.app.driver import BackendDriver
    from unisono.app.ports import BatchWatch, Clock, Journal
    from unisono.app.resolve import Resolver
    from unisono.core.batch import BatchConfig
    from unisono.core.errors import Violation
    from unisono.core.limits import Limits
    from unisono.core.model import Item, RunnerSpec
    from unisono.core.passes import ForwardPass
    from unisono.core.plan import Group

# `progress` is written at most so often.
PROGRESS_INTERVAL_S = 1.0
# Names items at the drivers; never used twice within a process.
_tickets = count(1)
_batches = count(1)


class RunningBatch:
    """A batch, from its acceptance until it is forgotten."""

    def __init__(
        self,
        batch_id: str,
        config: BatchConfig,
        *,
        item_count: int,
        drivers: Mapping[str, BackendDriver],
        resolver: Resolver,
        journal: Journal,
        clock: Clock,
        limits: Limits,
        watch: BatchWatch,
        on_end: Callable[[RunningBatch], None],
        report_defect: Callable[[str, BaseException], None],
    ) -> None:
        self.batch_id = batch_id
        self.config = config
        self.state = BatchState.RUNNING
        # Names it at the drivers, where batches take turns.
        self.key = next(_batches)
        self._drivers = drivers
        self._resolver = resolver
        self._clock = clock
        self._limits = limits
        self._watch = watch
        self._on_end = on_end
        self._report_defect = report_defect
        self._accepted_s = clock.monotonic_s()
        # Items by index, until they end; the ids of all, and by index the fingerprints of what was asked.
        self._runs: dict[int, ItemRun] = {}
        self._index_of: dict[str, int] = {}
        self._fingerprints: list[int] = []
        self._groups: list[GroupRun] = []
        self._group_of: dict[RunnerSpec, GroupRun] = {}
        # Items that were added and not yet released; then, releases that were not planned yet.
        self._waiting: list[ItemRun] = []
        self._to_plan: deque[list[ItemRun]] = deque()
        self._planner: asyncio.Task[None] | None = None
        self._is_input_closed = False
        self._counts: Counter[ItemState] = Counter()
        # Why the batch ends before all its items have ended by themselves; None while it does not.
        self._cut_short: UnisonoError | None = None
        self._deadline_s: float | None = None
        # Calls on which the batch lives, and how the stream that adds items is told that another took its place.
        self._callers = 0
        self._on_replaced: Callable[[], None] | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        max_bytes = limits.max_journal_bytes
        self.journal = BatchJournal(journal, batch_id, clock, max_bytes=max_bytes, on_pressure=self._feel_pressure)
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
        return len(self._fingerprints)

    @property
    def progress(self) -> Progress:
        """How far it is."""
        in_flight = sum(1 for run in self._runs.values() if run.released_ns is not None)
        return Progress(
            accepted=len(self._fingerprints),
            queued=len(self._runs) - in_flight,
            in_flight=in_flight,
            completed=self._counts[ItemState.COMPLETED],
            failed=self._counts[ItemState.FAILED],
            cancelled=self._counts[ItemState.CANCELLED],
            expired=self._counts[ItemState.EXPIRED],
            completion_tokens=sum(group.spoken_tokens for group in self._groups),
            passes=sum(group.counter.so_far for group in self._groups),
        )

    def running_items(self) -> Iterable[ItemRun]:
        """Items that have not ended, for those who want to hear them speak."""
        return self._runs.values()

    def run_of(self, index: int) -> ItemRun | None:
        """An item that has not ended."""
        return self._runs.get(index)

    def passes(self, start: int, limit: int) -> list[tuple[int, int, ForwardPass]]:
        """Up to `limit` mapped passes from the batch's pass `start` on: (its place in the batch, group, pass)."""
        found: list[tuple[int, int, ForwardPass]] = []
        before = 0
        for group in self._groups:
            page = group.counter.passes(max(0, start - before), limit - len(found))
            found += [(before + each.number, group.number, each) for each in page]
            before += group.counter.count.count
        return found

    @property
    def unmapped_passes(self) -> int:
        """Passes whose items are not known any more."""
        return sum(group.counter.unmapped for group in self._groups)

    # -- What callers do -----------------------------------------------------------------------------------

    def run_whole(self, items: Sequence[Item | BadItem]) -> None:
        """Takes all items at once, and no more: for requests that were checked, and came in one message.

        Whatever is wrong with one becomes its result.
        """
        for item in items:
            checked = intake.complete(item, self.config)
            wrong = list(intake.violations_of(checked, self._limits))
            if checked.item_id in self._index_of:
                wrong.append(intake.duplicate(checked.item_id))
            self._place(checked, wrong)
        self.close_input()

    def add(self, items: Sequence[Item | BadItem], *, is_reopened: bool = False) -> list[Ack]:
        """Takes items of a stream, or refuses them, one answer each.

        STRICT: if one is malformed, all of these are refused. PER_ITEM: it becomes part of the batch and fails.
        """
        checked = [intake.complete(item, self.config) for item in items]
        wrong = [intake.violations_of(item, self._limits) for item in checked]
        if self.config.is_strict and any(wrong):
            other = InvalidRequestError("another item of the same message is wrong, and validation is STRICT")
            return [
                Ack(item_id=item.item_id, refusal=intake.error_of(own) if own else other)
                for item, own in zip(checked, wrong, strict=True)
            ]
        return [self._take(item, own, is_reopened=is_reopened) for item, own in zip(checked, wrong, strict=True)]

    def release(self) -> None:
        """What was added goes now."""
        self._stop_timer("release")
        # Some may have been cancelled, or have expired, while they waited.
        waiting = [run for run in self._waiting if run.item.index in self._runs]
        self._waiting = []
        if waiting:
            self._to_plan.append(waiting)
            if self._planner is None or self._planner.done():
                self._planner = asyncio.get_running_loop().create_task(self._plan_all())

    def close_input(self) -> None:
        """No more items will come; what was added goes now."""
        self._is_input_closed = True
        self.release()
        self._maybe_end()

    def cancel(self, item_ids: Sequence[str] = (), *, error: UnisonoError | None = None) -> tuple[int, int]:
        """Cancels items, or all of them and closes the input; answers with how many, and how many had ended.

        `error` says why; None: the caller wanted it.
        """
        item_ids = list(dict.fromkeys(item_ids))
        unknown = [item_id for item_id in item_ids if item_id not in self._index_of]
        if unknown:
            raise ItemNotFoundError(f"batch {self.batch_id} has no item {unknown[0]!r}")
        indexes = [self._index_of[item_id] for item_id in item_ids] if item_ids else list(self._index_of.values())
        running = [index for index in indexes if index in self._runs]
        if not item_ids:
            self._cut_short = self._cut_short or error or CancelledItemError("the batch was cancelled")
        self._stop_items(running, ItemState.CANCELLED, error or CancelledItemError("was cancelled"))
        if not item_ids:
            self.close_input()
        return len(running), len(indexes) - len(running)

    def expire_at(self, moment_s: float) -> None:
        """What has not ended by then expires, and the input closes. Only ever brings the end nearer."""
        if self._deadline_s is None or moment_s < self._deadline_s:
            self._deadline_s = moment_s
            self._start_timer("deadline", max(0.0, moment_s - self._clock.monotonic_s()), self._expire)

    def attach(self, reader: Reader) -> None:
        """Somebody follows from now on."""
        self.journal.attach(reader)
        self._stop_timer("lost")

    def detach(self, reader: Reader) -> None:
        """That reader has gone."""
        self.journal.detach(reader)
        self._notice_loss()

    def join_caller(self, on_replaced: Callable[[], None] | None = None) -> None:
        """Somebody holds a call on which the batch lives: the one that opened it, or one that sent it again.

        With `on_replaced`, the caller is a stream that adds items. There is one at a time: the former is told.
        """
        self._callers += 1
        if on_replaced is not None:
            former, self._on_replaced = self._on_replaced, on_replaced
            if former is not None:
                former()

    def lose_caller(self) -> None:
        """A caller is gone. Was it the last, the batch is cancelled, or goes on without a reader for a while."""
        self._callers -= 1
        self._notice_loss()

    def _notice_loss(self) -> None:
        if self.is_over or self._callers > 0:
            return
        if not self.config.detaches:
            _ = self.cancel(error=CancelledItemError("the caller went away (on_disconnect: CANCEL)"))
        elif not self.journal.has_readers:
            grace_s = self.config.detach_grace_s or 0.0
            error = CancelledItemError(f"nobody has followed the batch for {grace_s:g} s (detach_grace)")
            self._start_timer("lost", grace_s, lambda: self.cancel(error=error))

    # -- Taking items --------------------------------------------------------------------------------------

    def _take(self, item: Item | BadItem, wrong: tuple[Violation, ...], *, is_reopened: bool) -> Ack:
        known = self._index_of.get(item.item_id)
        if known is not None:
            if is_reopened and self._fingerprints[known] == hash(item):
                return Ack(item_id=item.item_id, index=known)
            error = DuplicateItemError(f"the batch already has an item {item.item_id!r}")
            return Ack(item_id=item.item_id, refusal=error)
        refusal = self._refusal()
        if refusal is not None:
            return Ack(item_id=item.item_id, refusal=refusal)
        index = self._place(item, wrong)
        if len(self._waiting) >= self.config.release_size:
            self.release()
        elif self._waiting and self.config.release_interval_s and "release" not in self._timers:
            self._start_timer("release", self.config.release_interval_s, self.release)
        return Ack(item_id=item.item_id, index=index)

    def _place(self, item: Item | BadItem, wrong: Sequence[Violation]) -> int:
        """Makes an item part of the batch: waiting for its release, or failed at once."""
        index = len(self._fingerprints)
        self._fingerprints.append(hash(item))
        self._index_of.setdefault(item.item_id, index)
        if isinstance(item, BadItem) or wrong:
            error = intake.error_of(wrong)
            self._end_item(Result(item_id=item.item_id, index=index, state=ItemState.FAILED, error=error))
            return index
        item = replace(item, index=index)
        run = self._runs[index] = ItemRun(item, accepted_ns=self._clock.time_ns())
        self._waiting.append(run)
        if "progress" not in self._timers:
            self._start_timer("progress", PROGRESS_INTERVAL_S, self._tell_progress)
        if self.config.queue_timeout_s and "queue" not in self._timers:
            self._start_timer("queue", self.config.queue_timeout_s, self._expire_queued)
        return index

    def _refusal(self) -> UnisonoError | None:
        """Why no more items are taken at this moment."""
        if self._is_input_closed or self.is_over:
            return InputClosedError(f"batch {self.batch_id} takes no more items")
        count_so_far = len(self._fingerprints)
        if count_so_far >= self._limits.max_items:
            return LimitExceededError(f"a batch has at most {self._limits.max_items:,} items; open another one")
        if count_so_far >= self.credit:
            return CreditExceededError(
                f"{len(self._runs):,} items have not ended; wait for credit before sending more", retry_after_s=1.0
            )
        return None

    # -- Planning ------------------------------------------------------------------------------------------

    async def _plan_all(self) -> None:
        while self._to_plan:
            runs = self._to_plan.popleft()
            try:
                await self._plan(runs)
            except Exception as defect:  # noqa: BLE001 - a defect must cost these items, not leave them forever
                self._report_defect(f"planning items of batch {self.batch_id}", defect)
                error = InternalError(f"a defect of this service: {type(defect).__name__}: {defect}")
                self._stop_items([run.item.index for run in runs], ItemState.FAILED, error)

    async def _plan(self, runs: list[ItemRun]) -> None:
        """Finds the models of items, groups them, and submits the groups in order."""
        started_ns = self._clock.time_ns()
        models = await self._resolver.models(run.item.model for run in runs)
        backends = {model.backend for model in models.values() if not isinstance(model, UnisonoError)}
        loaded = {backend: await self._resolver.loaded(backend) for backend in backends}
        # Some may have been cancelled, or have expired, while the backends were asked.
        runs = [run for run in runs if run.item.index in self._runs]
        planned = plan((run.item for run in runs), models, loaded)
        for group in planned.groups:
            if group.told_slots is not None:
                self._drivers[group.runner.backend].tell_slots(group.runner, group.told_slots)
        chosen = [(self._join_group(group), group) for group in planned.groups]
        events = [run.planned for run, _ in chosen]
        self._watch.planned(started_ns=started_ns, ended_ns=self._clock.time_ns(), groups=events)
        for item, error in planned.refused:
            self._stop_items([item.index], ItemState.FAILED, error)
        for event in events:
            self.journal.write(event)
        for run, group in chosen:
            self._submit(run, group.items, is_loaded=group.is_loaded)

    def _join_group(self, group: Group) -> GroupRun:
        run = self._group_of.get(group.runner)
        if run is None:
            backend = group.runner.backend
            run = GroupRun(
                len(self._groups),
                group.runner,
                is_loaded=group.is_loaded,
                driver=self._drivers[backend],
                journal=self.journal,
                watch=self._watch,
                clock=self._clock,
                on_result=self._end_item,
                on_load=lambda: self._resolver.forget_loaded(backend),
            )
            self._groups.append(run)
            self._group_of[group.runner] = run
        run.item_count += len(group.items)
        return run

    def _submit(self, group: GroupRun, items: Iterable[Item], *, is_loaded: bool) -> None:
        works: list[tuple[Work, Item]] = []
        now_s, now_ns = self._clock.monotonic_s(), self._clock.time_ns()
        config = self.config
        for item in items:
            run = self._runs.get(item.index)
            if run is None:
                continue
            ticket = next(_tickets)
            group.take(ticket, run)
            accepted_s = now_s - (now_ns - run.accepted_ns) / 1e9
            work = Work(
                ticket=ticket,
                batch=self.key,
                speak_by_s=accepted_s + config.queue_timeout_s if config.queue_timeout_s else None,
                end_by_s=self._deadline_s,
                silence_s=config.item_timeout_s or None,
                max_attempts=config.max_attempts,
                num_predict=item.options.num_predict,
            )
            works.append((work, item))
        group.driver.submit(group.runner, works, group, is_loaded=is_loaded, keep_alive_s=config.keep_alive_s)
        if self.journal.is_full:
            group.driver.park(self.key)

    # -- Ends ----------------------------------------------------------------------------------------------

    def _stop_items(self, indexes: Iterable[int], state: ItemState, error: UnisonoError) -> None:
        """Ends items wherever they are: those at a driver by the driver, the others here."""
        at_drivers: dict[BackendDriver, list[int]] = {}
        for index in indexes:
            run = self._runs.get(index)
            if run is None:
                continue
            if run.group is not None and run.ticket is not None:
                at_drivers.setdefault(self._groups[run.group].driver, []).append(run.ticket)
            else:
                self._end_item(run.result(state, error=error, attempts=0, at_ns=self._clock.time_ns()))
        for driver, tickets in at_drivers.items():
            driver.end(tickets, state, error)

    def _end_item(self, result: Result) -> None:
        """An item has its result: the one thing that every item comes to."""
        _ = self._runs.pop(result.index, None)
        self._counts[result.state] += 1
        if isinstance(result.error, BatchDeadlineError):
            # The driver keeps to the deadline too, and may be the first to notice.
            self._cut_short = self._cut_short or result.error
        self._watch.item_ended(result=result, at_ns=self._clock.time_ns())
        parts, rest = paging.split(result)
        for part in parts:
            self.journal.write(part)
        self.journal.write(rest)
        self._maybe_end()

    def _expire(self) -> None:
        if not self.is_over:
            self._cut_short = error = BatchDeadlineError("the batch's deadline has passed")
            self._stop_items(list(self._runs), ItemState.EXPIRED, error)
            self.close_input()

    def _expire_queued(self) -> None:
        """Keeps the queue_timeout of items that no driver has yet: not released, or their model not found."""
        now_ns, timeout_s = self._clock.time_ns(), self.config.queue_timeout_s or 0.0
        queued = [run for run in self._runs.values() if run.ticket is None]
        late = [run.item.index for run in queued if (now_ns - run.accepted_ns) / 1e9 >= timeout_s]
        error = QueueTimeoutError("had not been answered anything in time (queue_timeout)")
        self._stop_items(late, ItemState.EXPIRED, error)
        if len(late) < len(queued) and not self.is_over:
            oldest_s = (now_ns - queued[len(late)].accepted_ns) / 1e9
            self._start_timer("queue", max(0.0, timeout_s - oldest_s), self._expire_queued)

    def _maybe_end(self) -> None:
        if self._runs or not self._is_input_closed or self.is_over:
            return
        match self._cut_short:
            case None:
                self.state = BatchState.COMPLETED
            case BatchDeadlineError():
                self.state = BatchState.EXPIRED
            case _:
                self.state = BatchState.CANCELLED
        for name in list(self._timers):
            self._stop_timer(name)
        if self._planner is not None:
            # It may be asking a backend that is away for the models of items that have ended.
            _ = self._planner.cancel()
        summary = Summary(state=self.state, report=self._report(), error=self._cut_short)
        self._watch.ended(summary=summary, at_ns=self._clock.time_ns())
        self.journal.write(summary)
        self._on_end(self)

    def _report(self) -> Report:
        groups = tuple(group.report() for group in self._groups)
        return Report(
            batch_id=self.batch_id,
            duration_s=self._clock.monotonic_s() - self._accepted_s,
            counts=self.progress,
            groups=groups,
            prompt_tokens=sum(group.prompt_tokens for group in groups),
            cached_prompt_tokens=sum(cached) if (cached := self._cached_tokens()) else None,
            completion_tokens=sum(group.completion_tokens for group in groups),
            retries=sum(group.retries for group in self._groups),
            journal_bytes=self.journal.size_bytes,
        )

    # -- Small things --------------------------------------------------------------------------------------

    def _feel_pressure(self, is_full: bool) -> None:  # noqa: FBT001 - the journal's callback
        """The journal is full, and the work pauses; or there is room again, and it goes on."""
        for driver in {group.driver for group in self._groups}:
            if is_full:
                driver.park(self.key)
            else:
                driver.unpark(self.key)

    def _tell_progress(self) -> None:
        self.journal.write(self.progress)
        if self._runs:
            self._start_timer("progress", PROGRESS_INTERVAL_S, self._tell_progress)

    def _cached_tokens(self) -> list[int]:
        return [group.cached_prompt_tokens for group in self._groups if group.cached_prompt_tokens is not None]

    def _start_timer(self, name: str, delay_s: float, action: Callable[[], object]) -> None:
        self._stop_timer(name)

        def ring() -> None:
            self._timers.pop(name, None)
            action()

        self._timers[name] = asyncio.get_running_loop().call_later(delay_s, ring)

    def _stop_timer(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
