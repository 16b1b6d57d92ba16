"""One event loop in a thread of its own, for code that has none: shared by all clients of this process."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from unisono_client.forks import connecting, is_forked

_T = TypeVar("_T")
# How long the end of the process may take, for goodbyes that are said to services.
_END_S: Final = 3.0


class Portal:
    """Runs coroutines in its thread; they see the context variables of whoever calls."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="unisono-client", daemon=True)
        self._thread.start()
        # The interpreter ends with no loop in the middle of things.
        _ = atexit.register(self._stop)

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begins a coroutine."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine to its end, and gives what it gives; an interrupt cancels it."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("the sync client was called from within its own thread; use the async one there")
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            _ = future.cancel()
            raise

    def each(self, values: AsyncGenerator[_T, None]) -> Generator[_T, None, None]:
        """What an asynchronous generator gives, one by one; it is closed with this one."""
        try:
            while True:
                try:
                    value = self.call(_next(values))
                except StopAsyncIteration:
                    return
                yield value
        finally:
            self.leave(values.aclose())

    def leave(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs what ends something. Waits for it, but in the portal's own thread, where garbage may be collected."""
        if threading.current_thread() is self._thread:
            _ = self.submit(work)
        else:
            self.call(work)

    def post(self, what: Callable[[], object]) -> None:
        """Calls something in the portal's thread, and does not wait for it; nothing where the thread has ended."""
        with contextlib.suppress(RuntimeError):
            _ = self._loop.call_soon_threadsafe(what)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _stop(self) -> None:
        if self._thread.is_alive() and not self._loop.is_closed():
            _ = self.submit(self._end())
            self._thread.join(timeout=_END_S)

    async def _end(self) -> None:
        """Ends as `asyncio.run` does: what is under way is cancelled, and says goodbye."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            _ = task.cancel()
        _ = await asyncio.gather(*tasks, return_exceptions=True)
        self._loop.stop()


async def _next(values: AsyncGenerator[_T, None]) -> _T:
    return await anext(values)


# Reentrant: garbage may be collected, and a run in it be left, in the middle of what it guards.
_lock = threading.RLock()
# The one, once it is there.
_portals: list[Portal] = []


def portal() -> Portal:
    """This process's. Raises ClosedError in a process that was forked from one that used it."""
    connecting()
    with _lock:
        if not _portals:
            _portals.append(Portal())
        return _portals[0]


def leave(work: Coroutine[Any, Any, None]) -> None:
    """Runs what ends something in the portal; in a process that was forked, there is nothing that could be ended."""
    if is_forked():
        work.close()
    else:
        portal().leave(work)
