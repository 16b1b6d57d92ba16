"""Work without an end: one batch after the other behind one session, for services that live for hours.

    async with client.rolling_session(model="llama3.2") as session:
        feeding = asyncio.create_task(feed(session))  # adds items as they come, and closes the input in the end
        async for result in session:
            print(result.item_id, result.content)

A batch has an end: it takes 50,000 items at most, its report and its trace are there once it has ended, and until
then the service keeps something for each of its items. So the next one is opened after `items_per_batch` items, or
when the current one is `batch_age_s` old. That one takes no more, and its results come beside its successor's.

Each item that was added has its result once, whatever becomes of batches and connections:

- A lost connection is the business of `Session`: the batch goes on.
- A lost batch (the service was started anew, or does not have its events any more), or one that the service ended
  because it stops: items without a result go into the next batch. One that was in `MAX_BATCHES_AN_ITEM` lost batches
  is given up, as a result of the state FAILED: it may be what ends the service.
- A batch that is full before it was thought to be, or was ended by somebody else: what it refused goes into the next.

Memory is bounded: an item is kept until its result was read, and `add` waits while there are `max_pending` of them.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from google.rpc import status_pb2

from unisono_client._generated.unisono.v1 import event_pb2, item_pb2
from unisono_client.errors import BatchLostError, ClosedError
from unisono_client.items import Item, to_message
from unisono_client.ledger import refusal, result_ids
from unisono_client.results import Report, Result, State
from unisono_client.session import Session

# Items that have no result, or one that was not read.
MAX_PENDING: Final = 1_000
# A batch is followed by the next after so many items, or so long.
ITEMS_PER_BATCH: Final = 10_000
BATCH_AGE_S: Final = 3_600.0
# An item whose batch was lost goes into another; so many in all.
MAX_BATCHES_AN_ITEM: Final = 10
# What ends an item, but not its work: the batch takes no more, or the service ends.
_NOT_ITS_OWN: Final = frozenset({"BATCH_FULL", "INPUT_CLOSED", "SHUTTING_DOWN"})


@dataclass(slots=True, eq=False)
class _Pending:
    """An item without a result, or not all of its answers."""

    item: item_pb2.Item
    # Its place among all that were added.
    place: int
    # The ids of results that are still to come.
    left: set[str]
    # Batches that it was in.
    batches: int = 0


@dataclass(slots=True, eq=False)
class _Leg:
    """One of the batches."""

    session: Session
    opened_s: float
    # Answers that it was asked for, which is what a batch counts.
    answers: int = 0
    # Items that it has, by their ids, until their results come.
    pending: dict[str, _Pending] = field(default_factory=dict)
    # Whether it takes no more.
    is_retired: bool = False


class RollingSession:
    """Items in, results out, over as many batches as it takes; made by `Client.rolling_session`."""

    def __init__(
        self,
        open_session: Callable[[], Session],
        most_items: Callable[[], Awaitable[int]],
        *,
        items_per_batch: int = ITEMS_PER_BATCH,
        batch_age_s: float = BATCH_AGE_S,
        max_pending: int = MAX_PENDING,
        on_report: Callable[[Report], None] | None = None,
    ) -> None:
        """`most_items` asks the service how many items a batch may have; `on_report` is told of each batch's end."""
        self._open_session = open_session
        # Batches are children of the span in which the session was made, and not of whoever adds the first item.
        self._context = contextvars.copy_context()
        self._most_items = most_items
        self._items_per_batch = items_per_batch
        self._limit: int | None = None
        self._batch_age_s = batch_age_s
        self._max_pending = max_pending
        self._on_report = on_report
        # Items without a result, by id; how many results are to come; those that nobody has read.
        self._pending: dict[str, _Pending] = {}
        self._due = 0
        self._unread: deque[Result] = deque()
        self._current: _Leg | None = None
        # What reads the results of each batch.
        self._legs: dict[_Leg, asyncio.Task[None]] = {}
        self._added = 0
        self._opened = 0
        self._is_closed = False
        self._failure: BaseException | None = None
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()

    # -- What the caller does ------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def add(self, *items: Item) -> None:
        """More items; waits while `max_pending` have no result, or one that was not read: so read in another task.

        An item without an id is named by its place among all that were added. An id that is in use, or that its batch
        has had, is refused as a result (DUPLICATE_ITEM). Raises RefusedError (INVALID_REQUEST) for what cannot be put
        into a message, ClosedError after `close_input`, and what `take` raises.
        """
        for asked in items:
            self._check_open()
            while self._due + len(self._unread) >= self._max_pending:
                self._has_room.clear()
                _ = await self._has_room.wait()
                self._check_open()
            if self._limit is None:
                self._limit = min(self._items_per_batch, await self._most_items())
                self._check_open()
            item = to_message(asked, self._added)
            pending = _Pending(item, self._added, set(result_ids(item)))
            self._added += 1
            if item.item_id in self._pending:
                self._tell(pending, refusal("DUPLICATE_ITEM", f"{item.item_id!r} was added, and has no result yet"))
                continue
            self._pending[item.item_id] = pending
            self._due += len(pending.left)
            await self._put(pending)

    async def close_input(self) -> None:
        """No more items will be added: the results end when those that were added have theirs."""
        self._is_closed = True
        if self._current is not None:
            await self._retire(self._current)
        self._has_room.set()
        self._has_news.set()

    async def cancel(self, *item_ids: str) -> None:
        """Cancels items, whose results still come; without ids all that were added so far."""
        for leg in list(self._legs):
            theirs = [each for each in item_ids if each in leg.pending] if item_ids else list(leg.pending)
            if theirs:
                await leg.session.cancel(*theirs)

    async def __aiter__(self) -> AsyncGenerator[Result, None]:
        """The results, as items finish; they end when the input was closed and all are there."""
        while results := await self.take():
            for result in results:
                yield result

    async def take(self) -> list[Result]:
        """All results that are there and were not read; waits for one. Empty: the input was closed, and all are read.

        Raises UnreachableError where the service stayed away for as long as the client tries, and RefusedError where
        it does not take a batch.
        """
        while not self._unread:
            if self._failure is not None:
                raise self._failure
            if self._is_closed and not self._legs:
                return []
            self._has_news.clear()
            _ = await self._has_news.wait()
        results = list(self._unread)
        self._unread.clear()
        self._has_room.set()
        return results

    @property
    def batch_id(self) -> str:
        """The service's name for the batch that takes items; "" where there is none, or it was not accepted yet."""
        return "" if self._current is None else self._current.session.batch_id

    @property
    def batches(self) -> int:
        """Batches that were opened so far."""
        return self._opened

    @property
    def added(self) -> int:
        """Items that were added."""
        return self._added

    @property
    def pending(self) -> int:
        """Results that are still to come, and those that were not read."""
        return self._due + len(self._unread)

    async def aclose(self) -> None:
        """Leaves: what has no result is cancelled."""
        self._fail(ClosedError("the session was left"))
        tasks = list(self._legs.values())
        for task in tasks:
            _ = task.cancel()
        if tasks:
            _ = await asyncio.wait(tasks)

    # -- Batches -------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_closed:
            raise ClosedError("the session takes no more items: its input was closed")

    async def _put(self, pending: _Pending) -> None:
        """Puts an item into the batch that takes some, or into a new one."""
        answers, limit = len(result_ids(pending.item)), self._limit or 1
        leg, now_s = self._current, asyncio.get_running_loop().time()
        if leg is not None and (leg.answers + answers > limit or now_s - leg.opened_s >= self._batch_age_s):
            await self._retire(leg)
            leg = None
        if leg is None:
            self._current = leg = _Leg(self._context.run(self._open_session), now_s)
            self._opened += 1
            self._legs[leg] = asyncio.get_running_loop().create_task(self._follow(leg))
        pending.batches += 1
        leg.answers += answers
        leg.pending[pending.item.item_id] = pending
        # Of a single item, this does not wait for anything.
        await leg.session.add(pending.item)

    async def _retire(self, leg: _Leg) -> None:
        """It takes no more."""
        if leg is self._current:
            self._current = None
        if not leg.is_retired:
            leg.is_retired = True
            await leg.session.close_input()

    async def _follow(self, leg: _Leg) -> None:
        """Reads the results of one batch, until it has ended or is lost."""
        try:
            while results := await leg.session.take():
                for result in results:
                    await self._hear(leg, result)
                await self._close_if_closed()
            if leg.session.report is not None and self._on_report is not None:
                self._on_report(leg.session.report)
            # All have a result, unless somebody ended the batch just when they were added.
            await self._go_on_without(leg, refusal("INPUT_CLOSED", "the batch ended before it took the item"))
        except BatchLostError as lost:
            await self._go_on_without(leg, refusal(lost.reason, lost.message))
        except Exception as error:  # noqa: BLE001  # the caller hears of it where it waits for results
            self._fail(error)
        finally:
            del self._legs[leg]
            self._has_news.set()
            await leg.session.aclose()

    async def _go_on_without(self, leg: _Leg, why: status_pb2.Status) -> None:
        """The batch is over: what has no result goes into the next."""
        await self._retire(leg)
        for pending in list(leg.pending.values()):
            await self._again(leg, pending, why)
        await self._close_if_closed()

    async def _close_if_closed(self) -> None:
        """A batch that was opened for what another left takes no more, where no more will be added."""
        if self._is_closed and self._current is not None:
            await self._retire(self._current)

    async def _hear(self, leg: _Leg, result: Result) -> None:
        pending = leg.pending.get(result.variant_of or result.item_id)
        if pending is None:
            return
        error = result.error
        if error is not None and error.reason in _NOT_ITS_OWN:
            await self._retire(leg)
            await self._again(leg, pending, result.proto.error)
            return
        if result.state is State.REFUSED or result.item_id not in pending.left:
            # One result for all of its answers; or an answer that came before, from a batch that was lost.
            is_whole = result.item_id == pending.item.item_id
            if not is_whole:
                return
            self._end(leg, pending)
        else:
            pending.left.discard(result.item_id)
            self._due -= 1
            if not pending.left:
                self._end(leg, pending)
        self._give(Result(result.proto, pending.place, result.answers))

    async def _again(self, leg: _Leg, pending: _Pending, why: status_pb2.Status) -> None:
        """Puts an item into the next batch; gives it up after so many."""
        if leg.pending.pop(pending.item.item_id, None) is None:
            # Another of its answers has moved it.
            return
        if pending.batches < MAX_BATCHES_AN_ITEM:
            await self._put(pending)
            return
        self._end(leg, pending)
        told = status_pb2.Status()
        told.CopyFrom(why)
        told.message = f"was in {pending.batches} batches that were lost; of the last: {why.message}"
        self._tell(pending, told)

    def _end(self, leg: _Leg, pending: _Pending) -> None:
        self._due -= len(pending.left)
        _ = leg.pending.pop(pending.item.item_id, None)
        _ = self._pending.pop(pending.item.item_id, None)

    # -- Results -------------------------------------------------------------------------------------------

    def _tell(self, pending: _Pending, why: status_pb2.Status) -> None:
        """A result of this session's own."""
        state = event_pb2.ITEM_STATE_FAILED if pending.batches else event_pb2.ITEM_STATE_UNSPECIFIED
        self._give(Result(event_pb2.Result(item_id=pending.item.item_id, state=state, error=why), pending.place))

    def _give(self, result: Result) -> None:
        self._unread.append(result)
        self._has_news.set()

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._has_news.set()
        self._has_room.set()
