"""The kept batches that run in this process, or wait for their turn; and how one begins, ends, and makes room.

Theory of operation. So many run at one time, by priority, and in the order in which they came. One begins when the
first of its items have been read from the store, and is fed with the others while it runs (`backlog.py`); when it has
ended, its summary is kept before the next one begins.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

from unisono.core.errors import BatchNotFoundError, LimitExceededError, ShuttingDownError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from unisono.app.batches import Batches
    from unisono.app.ports import Clock
    from unisono.app.run_batch import RunningBatch
    from unisono.app.stores import BatchStore
    from unisono.core.batch import BadItem
    from unisono.core.durable import StoredBatch
    from unisono.core.model import Item

# A batch whose items could not be read is tried again after so long.
_AGAIN_S = 60.0
# Ended batches whose names are remembered: who sends one of them again must not run it again.
_MOST_ENDED = 10_000
# How often it is seen whether all is answered, while the service is being stopped.
_LOOK_S = 0.02
# Where nothing can be written for so long, nobody waits for that any more.
STUCK_S = 2.0
# So long the passes of a batch that has ended, and that nobody reads, can be asked for.
_STAYS_S = 10.0


class Stuck:
    """Whether nothing could be written for a while, as far as somebody looks."""

    def __init__(self, store: BatchStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._since_s: float | None = None

    def look(self) -> bool:
        """Whether it is so by now; to be asked again and again."""
        if not self._store.trouble:
            self._since_s = None
            return False
        now_s = self._clock.monotonic_s()
        if self._since_s is None:
            self._since_s = now_s
        return now_s - self._since_s >= STUCK_S


class KeptRuns:
    """Runs kept batches in turn."""

    def __init__(
        self,
        store: BatchStore,
        batches: Batches,
        clock: Clock,
        *,
        most_running: int,
        report_defect: Callable[[str, BaseException], None],
    ) -> None:
        """`most_running`: batches that run at one time."""
        self._store = store
        self._batches = batches
        self._clock = clock
        self._most_running = most_running
        self._report_defect = report_defect
        # Those that wait for their turn, and those that run.
        self.waiting: dict[str, StoredBatch] = {}
        self.running: dict[str, RunningBatch] = {}
        # Those that somebody is about to cancel, and is to be told how many items that ended.
        self.cancelling: set[str] = set()
        # Set, and replaced, whenever a batch has begun to run, or ended.
        self.turned = asyncio.Event()
        # Nothing more goes.
        self.is_closing = False
        # Those that have ended here, the last ones.
        self._ended: OrderedDict[str, None] = OrderedDict()
        # Of those that run, which know of their items.
        self._began: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def has(self, batch_id: str) -> bool:
        """Whether a batch of that id runs, or waits for its turn."""
        return batch_id in self.running or batch_id in self.waiting

    def enter(self, stored: StoredBatch) -> None:
        """It waits for its turn from now on, unless it does, runs or has ended already.

        It may have ended since it was looked at; and one that was kept though its caller was told otherwise runs.
        """
        if not stored.is_over and not self.has(stored.batch_id) and stored.batch_id not in self._ended:
            self.waiting[stored.batch_id] = stored

    @property
    def _is_at_work(self) -> bool:
        """Whether an item is at a backend."""
        return any(batch.in_flight for batch in self.running.values())

    async def close(self, *, drain_s: float) -> None:
        """Nothing more goes; what is at a backend may be answered for so long. Then all is left as it stands."""
        self.is_closing = True
        # Who follows one that waits is told to look elsewhere.
        self._tell()
        for batch in self.running.values():
            batch.rest()
        until_s = self._clock.monotonic_s() + drain_s
        stuck = Stuck(self._store, self._clock)
        # What cannot be written happens again, in the next process: it is not waited for.
        while self._is_at_work and self._clock.monotonic_s() < until_s and not stuck.look():  # noqa: ASYNC110 - many end it
            await asyncio.sleep(_LOOK_S)
        for batch in list(self.running.values()):
            batch.leave()
        for task in self._tasks:
            _ = task.cancel()
        _ = await asyncio.gather(*self._tasks, return_exceptions=True)

    def go_on(self) -> None:
        """Runs those whose turn it is: the highest priority, then the first that came."""
        while self.waiting and len(self.running) < self._most_running and not self.is_closing:
            stored = max(self.waiting.values(), key=lambda one: one.config.priority)
            self._begin(stored)

    def _begin(self, stored: StoredBatch) -> None:
        """It is one of those that run from now on, though its items are still to be read."""
        del self.waiting[stored.batch_id]
        batch = self._batches.run_stored(stored, self._store, on_end=self._on_end)
        self.running[stored.batch_id] = batch
        self._began[stored.batch_id] = asyncio.Event()
        self._tell()
        _ = self.keep(self._run(stored, batch))

    async def _run(self, stored: StoredBatch, batch: RunningBatch) -> None:
        """Gives a batch its items. One that cannot be read makes room for others, and is tried again later."""
        began = self._began[stored.batch_id]
        try:
            await self._give_items(stored, batch)
            while await batch.backlog.wanted() and not self.is_closing:
                await self._feed(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is must cost this batch alone, and be seen
            self._report_defect(f"reading kept batch {stored.batch_id}", error)
            self.start_over(batch)
        finally:
            # Whoever waits for that sees what has become of it.
            began.set()

    def start_over(self, batch: RunningBatch) -> None:
        """Leaves a batch with which something is wrong; later, it runs again, with what is in the store."""
        batch.leave()
        _ = self.keep(self._enter_later(batch.batch_id))

    async def _enter_later(self, batch_id: str) -> None:
        await asyncio.sleep(_AGAIN_S)
        # It may have been deleted meanwhile.
        with suppress(BatchNotFoundError):
            self.enter(await self._store.get(batch_id))
        self.go_on()

    async def _give_items(self, stored: StoredBatch, batch: RunningBatch) -> None:
        batch_id = stored.batch_id
        spent = await self._store.spent(batch_id, self._clock.time_ns()) if stored.started_ns is not None else None
        if stored.started_ns is None:
            # Where there is no room to write it, it is not known; the batch runs all the same.
            with suppress(LimitExceededError):
                await self._store.set(batch_id, started_ns=self._clock.time_ns())
        known = await self._store.names(batch_id)
        if self.is_closing:
            return
        if stored.deadline_ns is not None:
            left_s = (stored.deadline_ns - self._clock.time_ns()) / 1e9
            batch.expire_at(self._clock.monotonic_s() + left_s)
        batch.run_stored(known, is_whole=stored.is_input_closed, spent=spent)
        del known
        self._began[batch_id].set()
        if not (await self._store.get(batch_id)).is_cancelling:
            await self._feed(batch)
        elif not batch.is_over and batch_id not in self.cancelling:
            _ = batch.cancel()

    async def _feed(self, batch: RunningBatch) -> None:
        """Gives a batch as many of its items as there is room for."""
        items: list[tuple[int, Item | BadItem]] = []
        pages = batch.backlog.pages()
        for limit, after in pages:
            items += await self._items(batch.batch_id, after, limit)
        if pages and (first := pages[0][1] + 1) in batch.backlog and all(index != first for index, _ in items):
            raise LookupError(f"item {first} is not in the store, and has no result")
        if not self.is_closing:
            batch.feed(items)

    async def _items(self, batch_id: str, after: int, limit: int) -> list[tuple[int, Item | BadItem]]:
        """So many items, if there are; the store gives fewer at one time where they are large."""
        items: list[tuple[int, Item | BadItem]] = []
        while len(items) < limit:
            page = await self._store.items(batch_id, after=after, limit=limit - len(items))
            if not page:
                break
            items += page
            after = page[-1][0]
        return items

    async def run_now(self, batch_id: str) -> RunningBatch | None:
        """The batch, which knows of all its items, whether it is its turn or not; None: it has ended.

        Raises BatchNotFoundError, and ShuttingDownError where it cannot be run here, or not yet again.
        """
        # One that was left goes first, which may take as long as nothing can be written.
        with suppress(TimeoutError):
            async with asyncio.timeout(STUCK_S):
                while (batch := self.running.get(batch_id)) is not None and batch.is_left:
                    _ = await self.turned.wait()
        if not self.has(batch_id):
            # It has ended, or something was wrong with it, and it was to run again later.
            self.enter(await self._store.get(batch_id))
        waiting = self.waiting.get(batch_id)
        if waiting is not None and not self.is_closing:
            self._begin(waiting)
        batch = self.running.get(batch_id)
        if batch is not None:
            _ = await self._began[batch_id].wait()
        if self.is_closing or (batch is not None and batch.is_left):
            raise ShuttingDownError(
                f"batch {batch_id} does not run at this moment: the service is being stopped, or the log says what "
                "is wrong with the batch. Ask again in a moment",
                metadata={"batch_id": batch_id},
                retry_after_s=STUCK_S,
            )
        return batch

    def _on_end(self, batch: RunningBatch) -> None:
        """Its summary is written, though not yet kept."""
        _ = self.keep(self._end(batch))

    async def _end(self, batch: RunningBatch) -> None:
        await self._store.settle(batch.batch_id)
        if not batch.is_left:
            self._ended[batch.batch_id] = None
            if len(self._ended) > _MOST_ENDED:
                _ = self._ended.popitem(last=False)
        _ = self.running.pop(batch.batch_id, None)
        _ = self._began.pop(batch.batch_id, None)
        self._tell()
        self.go_on()
        while batch.journal.has_readers:  # noqa: ASYNC110 - readers come and go
            await asyncio.sleep(_LOOK_S)
        if not batch.is_left:
            # Whoever has read its summary asks for its passes next, and they are not in the store.
            await asyncio.sleep(_STAYS_S)
        self.let_go(batch)

    def drop(self, batch_id: str) -> None:
        """It is not in the store any more: it runs no longer, and its place is free at once."""
        _ = self.waiting.pop(batch_id, None)
        if (batch := self.running.get(batch_id)) is not None:
            batch.leave()
        self._tell()

    def let_go(self, batch: RunningBatch) -> None:
        """What is in memory of a batch that has ended is not needed any more."""
        # One that was left may run again meanwhile, as another.
        if self._batches.find(batch.batch_id) is batch:
            self._batches.forget(batch)
            self._store.forget(batch.batch_id)

    def _tell(self) -> None:
        """Whoever waits for a batch to run, or to end, looks again."""
        turned, self.turned = self.turned, asyncio.Event()
        turned.set()

    def keep(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Does something meanwhile; a defect is reported."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._report_defect("a kept batch", error)

        task.add_done_callback(ended)
        return task
