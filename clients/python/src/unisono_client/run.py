"""A batch whose items are known, or come from elsewhere: its results, one after the other, for one loop.

Who reads a `Run` and who runs it are apart: what feeds the batch and keeps its connection knows nothing of the `Run`.
So the `Run` is gone as soon as the last one who holds it is, which for a plain loop is when the loop is left; and
then the batch is cancelled at once, not when the garbage is collected.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sized
from types import TracebackType
from typing import Final, Self

from unisono_client.errors import ClosedError
from unisono_client.forks import is_forked
from unisono_client.items import Item, check_items
from unisono_client.order import InOrder
from unisono_client.results import Report, Result
from unisono_client.session import Leavable, Session

# Told of each result: how many there are, and how many there will be as far as is known.
OnProgress = Callable[[int, int], None]
# Items that `run` takes beforehand out of what it is given.
AHEAD: Final = 1_000
_AT_A_TIME: Final = 100


class Run:
    """A batch that runs, and its results; made by `Client.run`, and iterated over once.

    A loop that was left may be gone on with, by another loop over the same `Run`. The batch is cancelled when nobody
    holds the `Run` any more, by `async with`, `aclose` or `cancel`, or when the client is closed.
    """

    def __init__(
        self,
        session: Session,
        items: Iterable[Item] | AsyncIterable[Item],
        *,
        in_order: bool,
        on_progress: OnProgress | None,
        open_ones: set[Leavable],
    ) -> None:
        check_items(items)
        self._work = _Work(session, items, in_order=in_order, on_progress=on_progress, open_ones=open_ones)
        # At the interpreter's end there is no event loop any more in which something could be done.
        weakref.finalize(self, self._work.abandon).atexit = False

    def __aiter__(self) -> AsyncIterator[Result]:
        """Each result, once. Raises ClosedError where all were given before."""
        if self._work.has_ended:
            raise ClosedError("the run has ended, and its results were given; make another one with `client.run`")
        return self

    async def __anext__(self) -> Result:
        """The next result. Whoever is cancelled while waiting for it may ask again: nothing is lost."""
        return await self._work.next()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Leaves the batch: it is cancelled if it has not ended, unless `on_disconnect` is DETACH."""
        await self._work.aclose()

    @property
    def batch_id(self) -> str:
        """The service's name for the batch; "" until it was accepted."""
        return self._work.session.batch_id

    @property
    def report(self) -> Report | None:
        """The figures of the batch, once it has ended."""
        return self._work.session.report

    async def cancel(self, *item_ids: str) -> None:
        """Cancels items, or all of them; their results still come."""
        await self._work.session.cancel(*item_ids)


class _Work:
    """What is behind a run, and must not know it."""

    def __init__(
        self,
        session: Session,
        items: Iterable[Item] | AsyncIterable[Item],
        *,
        in_order: bool,
        on_progress: OnProgress | None,
        open_ones: set[Leavable],
    ) -> None:
        self.session = session
        self.has_ended = False
        self._items = items
        self._total = len(items) if isinstance(items, Sized) else 0
        self._on_progress = on_progress
        self._order = InOrder() if in_order else None
        # What the client leaves when it is closed.
        self._open_ones = open_ones
        self._feeder: asyncio.Task[None] | None = None
        # Results that came, in the order in which they came; and those whose turn it is.
        self._came: deque[Result] = deque()
        self._turn: deque[Result] = deque()
        self._done = 0

    async def next(self) -> Result:
        """The next result. Raises StopAsyncIteration at the end, and what the items or the session raise."""
        if self.has_ended:
            raise StopAsyncIteration
        try:
            while not self._turn:
                if not self._came:
                    self._came.extend(await self._take())
                result = self._came.popleft()
                self._done += 1
                if self._on_progress is not None:
                    self._on_progress(self._done, max(self._total, self.session.added, self._done))
                self._turn.extend((result,) if self._order is None else self._order.put(result))
            return self._turn.popleft()
        except StopAsyncIteration:
            self.has_ended = True
            await self.aclose()
            raise
        except Exception:
            await self.aclose()
            raise

    async def _take(self) -> list[Result]:
        """The results that are there. It waits for nothing that a caller who is cancelled meanwhile would lose."""
        if self._feeder is None:
            self._feeder = asyncio.get_running_loop().create_task(self._feed())
            self._open_ones.add(self)
        while True:
            if results := await self.session.take():
                return results
            if self._feeder.done() or not self._total:
                raise StopAsyncIteration
            # The batch ended before it had all; each of the others has a result, too.
            _ = await asyncio.wait({self._feeder})

    async def _feed(self) -> None:
        try:
            await self._add_all()
        except Exception as error:  # noqa: BLE001  # the caller hears of it where it waits for results
            self.session.fail(error)

    async def _add_all(self) -> None:
        """Adds the items, at the pace at which they can be sent."""
        session = self.session
        if isinstance(self._items, AsyncIterable):
            async for item in self._items:
                await session.add(item)
                await session.until_unsent_below(AHEAD)
                if session.is_over:
                    return
        else:
            given = iter(self._items)
            while chunk := list(itertools.islice(given, _AT_A_TIME)):
                await session.add(*chunk)
                await session.until_unsent_below(AHEAD)
                if session.is_over and not self._total:
                    return
        await session.close_input()

    async def aclose(self) -> None:
        """Ends it."""
        if self._feeder is not None:
            _ = self._feeder.cancel()
            _ = await asyncio.wait({self._feeder})
        await self.session.aclose()
        self._open_ones.discard(self)

    def abandon(self) -> None:
        """Nobody will read it any more: ends it, without waiting for that, from whichever thread."""
        if self._feeder is not None and not is_forked():
            # A loop that is closed has nothing left to end.
            with contextlib.suppress(RuntimeError):
                _ = self._feeder.get_loop().call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        if self._feeder is not None:
            _ = self._feeder.cancel()
        self.session.abandon()
        self._open_ones.discard(self)
