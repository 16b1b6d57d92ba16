"""Batches that outlive their caller, the connection and the process: kept first, then run, and kept on.

Theory of operation. A batch is in the store before its caller is told that it was accepted. It waits there for its
turn: so many run at one time, by priority, and in the order in which they came. A running one is a `RunningBatch`
like any other, whose journal is the store. At a start, all that has not ended is taken over, and goes on with the
items that have no result: what was at a backend when the process ended is run again, and what has a result never is.

At the end of the process nothing more goes, and what is at a backend may be answered for a while. Then batches are
left as they stand.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from unisono.app.batches import new_id
from unisono.app.follow import AGAIN_S, HEARTBEAT_S, follow
from unisono.app.intake import as_kept
from unisono.app.kept_input import KeptInput
from unisono.app.kept_runs import STUCK_S, KeptRuns, Stuck
from unisono.core.batch import BadItem
from unisono.core.durable import NewBatch
from unisono.core.errors import (
    BatchRunningError,
    InvalidRequestError,
    ItemNotFoundError,
    LimitExceededError,
    ShuttingDownError,
    UnisonoError,
    Violation,
)
from unisono.core.events import Heartbeat
from unisono.core.model import ItemState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence

    from unisono.app.batches import Batches
    from unisono.app.intake import Checked
    from unisono.app.ports import Clock
    from unisono.app.run_batch import RunningBatch
    from unisono.app.stores import BatchStore
    from unisono.core.batch import Ack, BatchConfig, DeltaSettings
    from unisono.core.durable import StoredBatch
    from unisono.core.events import BatchState, Deltas, Journalled
    from unisono.core.model import Item

# Events of a batch that is not running which are read at one time; and items that are to be tried again.
_EVENTS = 64
_RETRIED = 500
# What is old is deleted so often.
_TIDY_S = 60.0
# How often it is seen whether nothing can be written.
_LOOK_S = 0.05
# States of items that are worth another try.
RETRIED = (ItemState.FAILED, ItemState.CANCELLED, ItemState.EXPIRED)


@dataclass(frozen=True, slots=True, kw_only=True)
class DurableSettings:
    """Limits of kept batches."""

    # That run at one time; the others wait for their turn.
    most_running: int = 8
    # That have not ended.
    most_open: int = 1_000


class DurableBatches:
    """The kept batches of this process."""

    def __init__(
        self,
        store: BatchStore,
        batches: Batches,
        clock: Clock,
        *,
        report_defect: Callable[[str, BaseException], None],
        settings: DurableSettings | None = None,
    ) -> None:
        self._store = store
        self._batches = batches
        self._clock = clock
        self._report_defect = report_defect
        self._settings = settings or DurableSettings()
        self._runs = KeptRuns(
            store, batches, clock, most_running=self._settings.most_running, report_defect=report_defect
        )
        self._input = KeptInput(store, self._runs)

    async def start(self) -> int:
        """Takes over what has not ended, and goes on with it; answers with how many batches."""
        for stored in await self._store.take_over():
            self._runs.waiting[stored.batch_id] = stored
        found = len(self._runs.waiting)
        _ = self._runs.keep(self._tidy())
        self._runs.go_on()
        return found

    async def close(self, *, drain_s: float) -> None:
        """Nothing more goes; what is at a backend may be answered for so long. Then all is left as it stands."""
        await self._runs.close(drain_s=drain_s)

    @property
    def is_closing(self) -> bool:
        """Whether nothing more goes."""
        return self._runs.is_closing

    # -- What callers do ---------------------------------------------------------------------------------------

    async def submit(
        self,
        checked: Sequence[Checked],
        config: BatchConfig,
        *,
        method: str,
        carrier: Mapping[str, str],
        metadata: Mapping[str, str],
        fingerprint: bytes = b"",
    ) -> tuple[StoredBatch, bool]:
        """Keeps a batch whose items were checked; answers with it, and whether it is new.

        Raises RequestIdReusedError, LimitExceededError (too many batches, or no room to keep them),
        ShuttingDownError.
        """
        items = [as_kept(one) for one in checked]
        new = await self._new(config, method=method, carrier=carrier, metadata=metadata, fingerprint=fingerprint)
        stored, is_new = await self._store.submit(new, items, is_whole=True)
        self._enter(stored)
        return stored, is_new

    async def submit_in_pages(
        self,
        pages: AsyncIterator[Sequence[Item | BadItem]],
        config: BatchConfig,
        *,
        method: str,
        carrier: Mapping[str, str],
        metadata: Mapping[str, str],
        fingerprint: bytes = b"",
        parent_id: str = "",
        batch_id: str = "",
    ) -> tuple[StoredBatch, bool]:
        """As `submit`, of items that are too many to be in memory; raises what `pages` raises, too.

        `parent_id`: the batch whose items they were. `batch_id`: what it is called, where it has a name already.
        """
        new = await self._new(config, method=method, carrier=carrier, metadata=metadata, fingerprint=fingerprint)
        new = replace(new, parent_id=parent_id, batch_id=batch_id or new.batch_id)
        stored, is_new = await self._store.submit_in_pages(new, pages)
        self._enter(stored)
        return stored, is_new

    def _enter(self, stored: StoredBatch) -> None:
        """It waits for its turn, and may have it at once."""
        self._runs.enter(stored)
        self._runs.go_on()

    async def open_stream(
        self,
        config: BatchConfig,
        *,
        method: str,
        carrier: Mapping[str, str],
        metadata: Mapping[str, str],
        fingerprint: bytes = b"",
    ) -> tuple[str, RunningBatch | None, bool]:
        """Keeps a batch whose items are added by a stream, or finds that of the same request.

        Answers with its id, the batch (None: it has ended), and whether it is new. It waits for no turn. Raises as
        `submit`.
        """
        new = await self._new(config, method=method, carrier=carrier, metadata=metadata, fingerprint=fingerprint)
        stored, is_new = await self._store.submit(new, [], is_whole=False)
        self._runs.enter(stored)
        # One of the same request may have ended, while the answers to whoever asks again were lost.
        return stored.batch_id, await self._runs.run_now(stored.batch_id), is_new

    async def reopen(self, batch_id: str) -> RunningBatch | None:
        """A kept batch for a stream that goes on with it; None: it has ended. Raises BatchNotFoundError."""
        stored = await self._store.get(batch_id)
        return None if stored.is_over else await self._runs.run_now(batch_id)

    async def add(self, batch: RunningBatch, items: Sequence[Item | BadItem], *, is_reopened: bool) -> list[Ack]:
        """Takes items of a stream, or refuses them; answers when those taken are kept. See KeptInput.add."""
        return await self._input.add(batch, items, is_reopened=is_reopened)

    async def close_input(self, batch: RunningBatch) -> None:
        """No more items will come; that is kept too, where there is room."""
        with suppress(LimitExceededError):
            await self._store.set(batch.batch_id, is_input_closed=True)
        batch.close_input()

    async def _new(
        self,
        config: BatchConfig,
        *,
        method: str,
        carrier: Mapping[str, str],
        metadata: Mapping[str, str],
        fingerprint: bytes,
    ) -> NewBatch:
        """A batch that is to be kept; raises LimitExceededError, ShuttingDownError, RequestIdReusedError."""
        if self._runs.is_closing:
            raise ShuttingDownError("the service is being stopped; send this again to its successor")
        now_ns = self._clock.time_ns()
        new = NewBatch(
            batch_id=new_id(),
            config=config,
            fingerprint=fingerprint,
            metadata=metadata,
            method=method,
            carrier=carrier,
            created_ns=now_ns,
            deadline_ns=now_ns + round(config.deadline_s * 1e9) if config.deadline_s else None,
        )
        # Where the same request made one before, there will be no more of them.
        if self.open_count >= self._settings.most_open and not await self._store.knows(new):
            self.refuse_too_many()
        return new

    @property
    def open_count(self) -> int:
        """Batches that have not ended."""
        return len(self._runs.waiting) + len(self._runs.running)

    def refuse_too_many(self) -> None:
        """Raises LimitExceededError where as many batches are open as may be."""
        if self.open_count >= self._settings.most_open:
            raise LimitExceededError(
                f"{self.open_count:,} kept batches have not ended; at most {self._settings.most_open:,} may be open",
                metadata={"limit": "max_kept_batches"},
                retry_after_s=30.0,
            )

    async def retry(
        self,
        batch_id: str,
        *,
        request_id: str,
        method: str,
        carrier: Mapping[str, str],
    ) -> tuple[StoredBatch, bool]:
        """Keeps a batch of the items of another one that failed, expired, or were cancelled, with its metadata.

        See `submit`.

        Raises BatchNotFoundError, BatchRunningError, and InvalidRequestError where nothing can be tried again.
        """
        parent = await self._store.get(batch_id)
        if not parent.is_over:
            raise BatchRunningError(
                f"batch {batch_id} has not ended: its failed items are tried again when it has",
                metadata={"batch_id": batch_id},
            )
        return await self.submit_in_pages(
            self._retried(batch_id),
            replace(parent.config, request_id=request_id),
            method=method,
            carrier=carrier,
            metadata=parent.metadata,
            fingerprint=batch_id.encode(),
            parent_id=batch_id,
        )

    async def _retried(self, batch_id: str) -> AsyncGenerator[Sequence[Item | BadItem], None]:
        """What is to be tried again of a batch, some at a time; raises InvalidRequestError for nothing."""
        after, count = -1, 0
        while page := await self._store.items(batch_id, after=after, limit=_RETRIED, states=RETRIED):
            after = page[-1][0]
            # What could not be run as it came cannot be run now.
            again = [item for _, item in page if not isinstance(item, BadItem)]
            count += len(again)
            yield again
        if not count:
            raise InvalidRequestError(
                f"batch {batch_id} has no item that failed and can be tried again",
                violations=[Violation(field="batch_id", description="names a batch with nothing to try again")],
            )

    def runs(self, batch_id: str) -> bool:
        """Whether a kept batch of that id runs, or waits for its turn."""
        return self._runs.has(batch_id)

    async def get(self, batch_id: str) -> StoredBatch:
        """See the port."""
        return await self._store.get(batch_id)

    def require(self, batch_id: str, sequence: int) -> None:
        """Raises BatchNotFoundError; SequenceOutOfRangeError where the batch has no event of that number yet."""
        _ = self._store.read(batch_id, sequence, 1)

    async def until_over(self, batch_id: str) -> StoredBatch:
        """The batch, once it has ended; raises BatchNotFoundError."""
        while True:
            turned = self._runs.turned
            stored = await self._store.get(batch_id)
            if stored.is_over:
                return stored
            _ = await turned.wait()

    async def page(
        self, *, after: int, limit: int, states: Sequence[BatchState] = ()
    ) -> list[tuple[int, StoredBatch]]:
        """See the port."""
        return await self._store.page(after=after, limit=limit, states=states)

    async def results(
        self, batch_id: str, *, after: int, limit: int, states: Sequence[ItemState] = ()
    ) -> list[Journalled]:
        """See the port."""
        return await self._store.results(batch_id, after=after, limit=limit, states=states)

    async def cancel(self, batch_id: str, item_ids: Sequence[str] = ()) -> tuple[int, int]:
        """Cancels items, or all of them; answers when that is kept: with how many, and how many had ended.

        Raises BatchNotFoundError, ItemNotFoundError. Of all items it is enough that the wish is kept, where there is
        no room for their results; else raises LimitExceededError where nothing can be written.
        """
        stored = await self._store.get(batch_id)
        if stored.is_over:
            return 0, await self._named(stored, item_ids)
        try:
            if not item_ids:
                self._runs.cancelling.add(batch_id)
                await self._store.set(batch_id, is_cancelling=True)
            batch = await self._runs.run_now(batch_id)
            if batch is None:
                return 0, await self._named(await self._store.get(batch_id), item_ids)
            found = batch.cancel(item_ids)
        finally:
            self._runs.cancelling.discard(batch_id)
        if not await self._settled(batch_id) and item_ids:
            raise LimitExceededError(
                f"the items of batch {batch_id} were cancelled, but that is not kept yet, because the journal's file "
                f"{self._store.trouble or 'could not be written to'}: until it is, they may run again after a "
                "restart; or cancel all of the batch",
                metadata={"limit": "journal", "batch_id": batch_id},
                retry_after_s=STUCK_S,
            )
        return found

    async def _named(self, stored: StoredBatch, item_ids: Sequence[str]) -> int:
        """How many items of a batch are meant: all, for none; raises ItemNotFoundError."""
        if not item_ids:
            return stored.tally.items
        unknown = set(wanted := set(item_ids))
        count = 0
        for one in await self._store.names(stored.batch_id):
            # The id of an item with several answers stands for all of them.
            if one.item_id in wanted or (one.variant_of and one.variant_of in wanted):
                count += 1
                unknown -= {one.item_id, one.variant_of}
        if unknown:
            first = next(item_id for item_id in item_ids if item_id in unknown)
            raise ItemNotFoundError(f"batch {stored.batch_id} has no item {first!r}")
        return count

    async def _settled(self, batch_id: str) -> bool:
        """Whether all is kept that has happened to a batch; False: it is not, since nothing can be written."""
        settling = self._runs.keep(self._store.settle(batch_id))
        stuck = Stuck(self._store, self._clock)
        while not settling.done():
            if stuck.look():
                _ = settling.cancel()
                return False
            _ = await asyncio.wait({settling}, timeout=_LOOK_S)
        return True

    async def delete(self, batch_id: str) -> None:
        """Forgets a batch that has ended; or that was cancelled, and for whose end there is no room."""
        stored = await self._store.get(batch_id)
        if stored.is_cancelling and not stored.is_over and self._store.trouble:
            await self._store.delete(batch_id)
            self._runs.drop(batch_id)
            return
        if not stored.is_over or batch_id in self._runs.running:
            raise BatchRunningError(
                f"batch {batch_id} has not ended: cancel it first", metadata={"batch_id": batch_id}
            )
        if (batch := self._batches.find(batch_id)) is not None:
            self._runs.let_go(batch)
        await self._store.delete(batch_id)

    async def follow(
        self, batch_id: str, *, after: int, deltas: DeltaSettings | None = None, heartbeat_s: float = HEARTBEAT_S
    ) -> AsyncGenerator[Journalled | Deltas | Heartbeat, None]:
        """See `follow.follow`: of a batch that waits, runs or has ended; raises BatchNotFoundError too."""
        stored = await self._store.get(batch_id)
        _ = self._store.read(batch_id, after, 1)  # raises for a number that was never reached
        while True:
            turned = self._runs.turned
            running = self._runs.running.get(batch_id)
            if running is not None:
                async with aclosing(
                    follow(running, self._clock, after=after, deltas=deltas, heartbeat_s=heartbeat_s)
                ) as events:
                    async for event in events:
                        yield event
                return
            for entry in self._store.read(batch_id, after, _EVENTS):
                yield entry
                after = entry.sequence
            if self._store.last_sequence(batch_id) > after:
                continue
            if not stored.is_over:
                stored = await self._store.get(batch_id)
            if stored.is_over:
                if after >= stored.last_sequence:
                    return
                continue
            if self._runs.is_closing:
                raise ShuttingDownError(
                    f"the service is being stopped; its successor goes on with batch {batch_id}: follow it there",
                    metadata={"batch_id": batch_id},
                    retry_after_s=AGAIN_S,
                )
            try:
                async with asyncio.timeout(heartbeat_s):
                    _ = await turned.wait()
            except TimeoutError:
                yield Heartbeat()

    # -- Small things ------------------------------------------------------------------------------------------

    async def _tidy(self) -> None:
        """Deletes what was kept for long enough, now and then."""
        while True:
            try:
                # Where there is no room to write, it is tried again.
                with suppress(LimitExceededError):
                    _ = await self._store.delete_old(self._clock.time_ns())
            except UnisonoError as error:
                self._report_defect("deleting old batches", error)
            await asyncio.sleep(_TIDY_S)
