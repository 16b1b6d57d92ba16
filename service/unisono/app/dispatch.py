"""Hands a batch's released items to the drivers: their models found, planned into groups, submitted in order."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from unisono.app.coalesce import Coalescer
from unisono.app.failover import Failover
from unisono.app.group_run import GroupRun
from unisono.core.advice import forced_one_slot
from unisono.core.batch import CoScheduling
from unisono.core.commands import Terms, Work
from unisono.core.errors import BackendUnavailableError, InternalError, UnisonoError
from unisono.core.limits import text_bytes
from unisono.core.model import ItemState
from unisono.core.plan import plan
from unisono.core.prefixes import lone_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from unisono.app.batch_journal import BatchJournal
    from unisono.app.coalesce import Company
    from unisono.app.driver import BackendDriver
    from unisono.app.item_run import ItemRun
    from unisono.app.ports import BatchWatch, Clock, Relay
    from unisono.app.resolve import Resolver
    from unisono.core.batch import BatchConfig
    from unisono.core.events import Result
    from unisono.core.model import Item, RunnerSpec
    from unisono.core.passes import ForwardPass
    from unisono.core.plan import Group

# Of a release of at most so many items, those that share nothing with each other are compared with earlier batches.
FEW_ITEMS = 64
# Names items, and batches, at the drivers; never used twice within a process.
_tickets = count(1)
_batches = count(1)


class Dispatch:
    """The groups of one batch, and the way into them."""

    def __init__(
        self,
        config: BatchConfig,
        *,
        drivers: Mapping[str, BackendDriver],
        company: Company,
        resolver: Resolver,
        journal: BatchJournal,
        clock: Clock,
        watch: BatchWatch,
        runs: Mapping[int, ItemRun],
        on_result: Callable[[Result], None],
        report_defect: Callable[[str, BaseException], None],
        memory_limit_bytes: int | None = None,
        relay: Relay | None = None,
    ) -> None:
        """`runs`: the batch's items that have not ended, by index. `on_result` is told of each that ends.

        `memory_limit_bytes`: what a runner may take, where that is known. `relay`: see RunningBatch.
        """
        self.groups: list[GroupRun] = []
        # When the batch must have ended, by the monotonic clock.
        self.deadline_s: float | None = None
        self._key = next(_batches)
        self._config = config
        # One for all its items, whichever runner they are on: what goes is counted in it.
        self._terms = Terms(
            priority=config.priority,
            weight=config.weight,
            max_concurrency=config.max_concurrency,
            items_per_second=config.items_per_second,
            is_together=config.co_scheduling is not CoScheduling.FASTEST,
        )
        self._drivers = drivers
        self._company = company
        self._resolver = resolver
        self._journal = journal
        self._clock = clock
        self._watch = watch
        self._runs = runs
        self._on_result = on_result
        self._report_defect = report_defect
        self._memory_limit_bytes = memory_limit_bytes
        self._relay = relay
        self._group_of: dict[RunnerSpec, GroupRun] = {}
        # For groups of embeddings, by their number: how their items get to the driver.
        self._coalescers: dict[int, Coalescer] = {}
        # Releases that were not planned yet.
        self._to_plan: deque[list[ItemRun]] = deque()
        # The one that is being planned: it may wait long for a backend that is away.
        self._in_plan: list[ItemRun] = []
        self._planner: asyncio.Task[None] | None = None
        self._is_paused = False
        # Elsewhere they might not all run at one time, as REQUIRED was promised.
        can_move = len(drivers) > 1 and config.co_scheduling is not CoScheduling.REQUIRED
        self._failover = (
            Failover(self.groups, resolver, clock, move=self._move, report_defect=report_defect) if can_move else None
        )

    def release(self, runs: Iterable[ItemRun]) -> None:
        """These items go now; those that have ended meanwhile are left out."""
        waiting = [run for run in runs if run.item.index in self._runs]
        if waiting:
            self._to_plan.append(waiting)
            if self._planner is None or self._planner.done():
                self._planner = asyncio.get_running_loop().create_task(self._plan_all())

    @property
    def unplanned(self) -> int:
        """Items that were released and are at no driver yet."""
        return sum(run.item.index in self._runs for runs in (self._in_plan, *self._to_plan) for run in runs)

    def end(self, indexes: Iterable[int], state: ItemState, error: UnisonoError) -> None:
        """Ends items wherever they are: those at a driver by the driver, the others here."""
        at_groups: dict[int, list[int]] = {}
        for index in indexes:
            run = self._runs.get(index)
            if run is None:
                continue
            if run.group is not None and run.ticket is not None:
                at_groups.setdefault(run.group, []).append(run.ticket)
            else:
                self._on_result(run.result(state, error=error, attempts=0, at_ns=self._clock.time_ns()))
        at_drivers: dict[BackendDriver, list[int]] = {}
        for number, tickets in at_groups.items():
            coalescer = self._coalescers.get(number)
            theirs = tickets if coalescer is None else coalescer.end(tickets, state, error)
            at_drivers.setdefault(self.groups[number].driver, []).extend(theirs)
        for driver, theirs in at_drivers.items():
            driver.end(theirs, state, error)

    def pause(self) -> None:
        """Nothing more of this batch goes."""
        self._is_paused = True
        for driver in {group.driver for group in self.groups}:
            driver.park(self._key)

    def resume(self) -> None:
        """It goes on."""
        self._is_paused = False
        for driver in {group.driver for group in self.groups}:
            driver.unpark(self._key)

    def stop(self) -> None:
        """All items have ended: the planner may still be asking a backend that is away for their models."""
        if self._planner is not None:
            _ = self._planner.cancel()
        if self._failover is not None:
            self._failover.stop()
        # Its last results may have filled the journal: drivers must not remember for ever that it was to wait.
        self.resume()

    def let_go(self) -> None:
        """The batch is forgotten: see RunningBatch."""
        self.groups.clear()
        self._group_of.clear()
        self._coalescers.clear()
        self._on_result = lambda _: None
        self._failover = None

    def passes(self, start: int, limit: int) -> list[tuple[int, int, ForwardPass]]:
        """Up to `limit` mapped passes from the batch's pass `start` on: (its place in the batch, group, pass)."""
        found: list[tuple[int, int, ForwardPass]] = []
        before = 0
        for group in self.groups:
            page = group.counter.passes(max(0, start - before), limit - len(found))
            found += [(before + each.number, group.number, each) for each in page]
            before += group.counter.count.count
        return found

    def _move(self, group: GroupRun, runs: Sequence[ItemRun]) -> None:
        """These items leave a group whose backend is away, and are released anew."""
        group.let_go(runs)
        error = BackendUnavailableError("the backend is away, and another has the model")
        self.end([run.item.index for run in runs], ItemState.CANCELLED, error)
        self._journal.write(group.planned)
        self.release(group.take_left())

    # -- Planning ------------------------------------------------------------------------------------------

    async def _plan_all(self) -> None:
        while self._to_plan:
            runs = self._in_plan = self._to_plan.popleft()
            try:
                await self._plan(runs)
            except Exception as defect:  # noqa: BLE001 - a defect must cost these items, not leave them forever
                self._report_defect("planning items of a batch", defect)
                error = InternalError(f"a defect of this service: {type(defect).__name__}: {defect}")
                self.end([run.item.index for run in runs], ItemState.FAILED, error)
            finally:
                self._in_plan = []

    async def _plan(self, runs: list[ItemRun]) -> None:
        """Finds the models of items, groups them, and submits the groups in order."""
        started_ns = self._clock.time_ns()
        found = await self._resolver.resolve(run.item.model for run in runs)
        # Some may have been cancelled, or have expired, while the backends were asked.
        runs = [run for run in runs if run.item.index in self._runs]
        planned = plan(
            (run.item for run in runs),
            found.models,
            found.loaded,
            policy=self._config.context_policy,
            memory_limit_bytes=self._memory_limit_bytes,
            standing={backend: self._drivers[backend].standing for backend in found.loaded},
            slots_of=lambda runner: self._drivers[runner.backend].slot_state(runner).fewest,
        )
        for group in planned.groups:
            driver = self._drivers[group.runner.backend]
            slots = group.told_slots
            if slots is None and forced_one_slot(driver.backend.kind, "", is_embedding=group.model.is_embedding):
                # Embeddings tell no durations from which it could be learned. A search begins with eight at once, and
                # whoever comes next would wait behind eight bundles. The price: an Ollama that gave these models more
                # slots would be used as if it had one.
                slots = 1
            if slots is not None:
                driver.tell_slots(group.runner, slots)
        chosen = [(self._join_group(group), group) for group in planned.groups]
        events = [run.planned for run, _ in chosen]
        families = sum(len({prefix.key for prefix in group.prefixes if prefix}) for group in planned.groups)
        ended_ns = self._clock.time_ns()
        self._watch.planned(started_ns=started_ns, ended_ns=ended_ns, groups=events, families=families)
        for item, error in planned.refused:
            self.end([item.index], ItemState.FAILED, error)
        for event in events:
            self._journal.write(event)
        for run, group in chosen:
            self._submit(run, group)

    def _join_group(self, group: Group) -> GroupRun:
        run = self._group_of.get(group.runner)
        if run is None:
            backend = group.runner.backend
            run = GroupRun(
                len(self.groups),
                group,
                driver=self._drivers[backend],
                journal=self._journal,
                watch=self._watch,
                clock=self._clock,
                on_result=self._on_result,
                on_load=lambda: self._resolver.forget_loaded(backend),
                relay=self._relay,
            )
            self.groups.append(run)
            self._group_of[group.runner] = run
            # What goes as it came goes by itself.
            if group.runner.is_embedding and self._relay is None:
                self._coalescers[run.number] = self._coalescer(run)
        run.join(group)
        return run

    def _coalescer(self, run: GroupRun) -> Coalescer:
        """The batch's own; or, of single callers who ask for nothing special, the one of all who are alike."""
        make = partial(
            Coalescer,
            driver=run.driver,
            runner=run.runner,
            clock=self._clock,
            tickets=_tickets,
            report_defect=self._report_defect,
        )
        config, terms = self._config, self._terms
        if not config.is_single or terms.is_together or terms.items_per_second is not None:
            return make()
        limits = (config.keep_alive_s, config.item_timeout_s, config.max_attempts)
        return self._company.of((run.runner, terms.priority, terms.weight, limits), make)

    def _submit(self, group: GroupRun, planned: Group) -> None:
        works: list[tuple[Work, Item]] = []
        now_s, now_ns = self._clock.monotonic_s(), self._clock.time_ns()
        config = self._config
        # Of a few, each may begin like what a slot holds from an earlier batch: calls with one system prompt, say.
        is_small = len(planned.items) <= FEW_ITEMS
        for item, shared in zip(planned.items, planned.prefixes, strict=True):
            run = self._runs.get(item.index)
            if run is None:
                continue
            ticket = next(_tickets)
            prefix = lone_prefix(item) if shared is None and is_small else shared
            group.take(ticket, run, prefix)
            accepted_s = now_s - (now_ns - run.accepted_ns) / 1e9
            work = Work(
                ticket=ticket,
                batch=self._key,
                speak_by_s=accepted_s + config.queue_timeout_s if config.queue_timeout_s else None,
                end_by_s=self.deadline_s,
                silence_s=config.item_timeout_s or None,
                max_attempts=max(1, config.max_attempts - run.earlier_attempts),
                num_predict=item.options.num_predict,
                terms=self._terms,
                prefix=prefix,
                prompt_bytes=text_bytes(item),
                is_single=config.is_single,
                is_patient=self._relay is not None,
            )
            works.append((work, item))
        if not works:
            # All have ended meanwhile. A driver remembers who has items until these end.
            return
        coalescer = self._coalescers.get(group.number)
        submit = partial(coalescer.submit, group) if coalescer is not None else group.submit
        submit(
            works,
            is_loaded=planned.is_loaded,
            keep_alive_s=config.keep_alive_s,
            context_tokens=planned.context_tokens,
        )
        if self._failover is not None:
            self._failover.start()
        if self._is_paused:
            group.driver.park(self._key)
