"""One thread, one connection: everything that is written to the journal's file.

Theory of operation. Events gather while a transaction is under way, and the next one takes all of them: a *group
commit*, whose one wait for the disk is shared. So there is no timer, and the busier the service, the larger the
groups. Each batch's events stand behind a savepoint of their own, so that what is wrong with one costs no other.

What cannot be written now (the disk is full) is kept and tried again, in the same order, until it can: after a pause,
and after each call that succeeds, since it may have made room. A commit that failed may have succeeded: the file
itself is asked before anything is written again. Events have numbers, so that what is there already is never written
twice.

Other changes (`call`) are transactions of their own, and their callers wait for them. They are not tried again: the
caller is told, and decides.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlalchemy import bindparam, insert, select, update

from unisono.adapters.journal import tables
from unisono.adapters.journal.errors import LeaseLostError, is_of_the_file, translated, words
from unisono.core.errors import ShuttingDownError, UnisonoError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Connection, Engine

T = TypeVar("T")

# Pauses between two tries, in seconds; the last one is repeated. The first try is for what succeeded unnoticed.
_PAUSES_S = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
# How long the end of the service waits for what is not written yet; and for how much of that, where it cannot be.
CLOSE_S = 10.0
_LAST_TRIES_S = 2.0


@dataclass(slots=True)
class Pending:
    """What one batch has to write: events in a row, and what they change in its own row."""

    # The number of the event before these.
    after: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    # Columns of the batch that grow, by so much; and columns that get a value.
    grows: dict[str, int] = field(default_factory=dict)
    sets: dict[str, Any] = field(default_factory=dict)
    size_bytes: int = 0

    @property
    def last(self) -> int:
        """The number of the last of these events."""
        return self.after + len(self.rows)


@dataclass(slots=True)
class _Call(Generic[T]):
    work: Callable[[Connection], T]
    future: Future[T]


class Writer:
    """Writes on a thread of its own, from `start` to `close`."""

    def __init__(
        self,
        engine: Engine,
        *,
        on_written: Callable[[Mapping[int, Pending]], None],
        on_lost: Callable[[int, Exception], None],
        on_trouble: Callable[[str], None],
        failpoint: Callable[[str], None],
    ) -> None:
        """`on_written` and `on_lost` are called in the event loop that started the writer: which batches' events are
        in the file now, and which batch cannot be written to any more. `on_trouble` is called on the thread: see
        SqliteJournal.
        """
        self._engine = engine
        self._on_written = on_written
        self._on_lost = on_lost
        self._on_trouble = on_trouble
        self._failpoint = failpoint
        self.lease = 0
        self._wake = threading.Condition()
        # What has come and not been taken up: guarded by `_wake`.
        self._calls: deque[_Call[Any]] = deque()
        self._pending: dict[int, Pending] = {}
        self._give_up_s: float | None = None
        # What is being written; why it could not be at the last try, and when the next one is.
        self._in_hand: dict[int, Pending] = {}
        self.trouble: str = ""
        self._tries = 0
        self._next_try_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="unisono-journal", daemon=True)

    # -- From the event loop -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins; to be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def append(
        self, batch: int, after: int, row: dict[str, Any], size_bytes: int, change: Callable[[Pending], None]
    ) -> None:
        """Adds an event of a batch that follows number `after`; `change` says what else changes with it."""
        with self._wake:
            if self._give_up_s is not None:
                return
            pending = self._pending.get(batch)
            if pending is None:
                pending = self._pending[batch] = Pending(after)
            pending.rows.append(row)
            pending.size_bytes += size_bytes
            change(pending)
            self._wake.notify()

    async def call(self, work: Callable[[Connection], T]) -> T:
        """Does something in a transaction of its own, and answers when it is in the file.

        Raises what the work raises, LimitExceededError where the file cannot be written to, and ShuttingDownError.
        """
        call = _Call(work, Future[T]())
        with self._wake:
            if self._give_up_s is not None:
                raise ShuttingDownError("the service is being stopped, and its journal is closed: send this again")
            self._calls.append(call)
            self._wake.notify()
        # Whoever asks goes away: the work is done all the same, since it may be half done.
        return await asyncio.shield(asyncio.wrap_future(call.future))

    async def close(self) -> None:
        """Writes what is left, for a while at most."""
        with self._wake:
            if self._give_up_s is None:
                self._give_up_s = time.monotonic() + _LAST_TRIES_S
                self._next_try_s = 0.0
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, CLOSE_S)

    # -- On the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        connection: Connection | None = None
        is_last = False
        while not is_last:
            with self._wake:
                self._wait()
                calls, self._calls = self._calls, deque()
                if not self._in_hand:
                    self._in_hand, self._pending = self._pending, {}
            for call in calls:
                connection = self._answer(call, connection)
            if self._in_hand and (calls or time.monotonic() >= self._next_try_s):
                connection = self._write(connection)
            with self._wake:
                is_last = self._is_done()
        if connection is not None:
            connection.close()

    def _wait(self) -> None:
        """Until there is something to do."""
        while not self._calls:
            if self._in_hand:
                left_s = self._next_try_s - time.monotonic()
                if left_s <= 0:
                    return
                _ = self._wake.wait(left_s)
            elif self._pending or self._give_up_s is not None:
                return
            else:
                _ = self._wake.wait()

    def _is_done(self) -> bool:
        if self._give_up_s is None or self._calls:
            return False
        is_all_written = not self._in_hand and not self._pending
        # What was not written was not seen either: it happens again, in the next process.
        return is_all_written or (self.trouble != "" and time.monotonic() >= self._give_up_s)

    def _answer(self, call: _Call[Any], connection: Connection | None) -> Connection | None:
        if not call.future.set_running_or_notify_cancel():
            return connection
        try:
            connection = connection or self._engine.connect()
            with connection.begin():
                found = call.work(connection)
                self._failpoint("call.before_commit")
            self._failpoint("call.after_commit")
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
            if not isinstance(error, UnisonoError):
                self._drop(connection)
                connection = None
            call.future.set_exception(translated(error))
        else:
            call.future.set_result(found)
        return connection

    def _write(self, connection: Connection | None) -> Connection | None:
        """Writes what is in hand; what could not be written stays in hand."""
        group = self._in_hand
        lost: dict[int, Exception] = {}
        try:
            connection = connection or self._engine.connect()
            with connection.begin():
                for batch, pending in group.items():
                    try:
                        with connection.begin_nested():
                            self._write_one(connection, batch, pending)
                    except Exception as error:
                        if is_of_the_file(error):
                            raise
                        # Whatever it is, it is wrong with what this batch wants to be written, and will be again.
                        lost[batch] = error
                self._failpoint("events.before_commit")
            self._failpoint("events.after_commit")
        except Exception as error:  # noqa: BLE001 - a thread that ended would leave everybody waiting
            pause_s = _PAUSES_S[min(self._tries, len(_PAUSES_S) - 1)]
            self._tries += 1
            self._next_try_s = time.monotonic() + pause_s
            self._stand(words(error))
            self._drop(connection)
            return None
        self._tries, self._next_try_s, self._in_hand = 0, 0.0, {}
        self._stand("")
        self._tell(group, lost)
        return connection

    def _stand(self, trouble: str) -> None:
        """Why the last write was none; told where that has changed between something and nothing."""
        has_changed = bool(trouble) is not bool(self.trouble)
        self.trouble = trouble
        if has_changed:
            self._on_trouble(trouble)

    def _write_one(self, connection: Connection, batch: int, pending: Pending) -> None:
        row = connection.execute(_STANDING, {"number": batch}).one_or_none()
        if row is None or row.lease != self.lease:
            raise LeaseLostError("another process has taken the batch over, or it was deleted")
        if row.last_sequence == pending.last:
            # An earlier try succeeded, though it seemed to have failed.
            return
        if row.last_sequence != pending.after:
            raise LeaseLostError(f"its last event in the file is {row.last_sequence}, not {pending.after}")
        _ = connection.execute(insert(tables.events), pending.rows)
        columns = tables.batches.c
        changes = {name: columns[name] + by for name, by in pending.grows.items()} | pending.sets
        _ = connection.execute(
            update(tables.batches).where(columns.number == batch).values(last_sequence=pending.last, **changes)
        )

    def _tell(self, group: dict[int, Pending], lost: Mapping[int, Exception]) -> None:
        written = {batch: pending for batch, pending in group.items() if batch not in lost}
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(self._on_written, written)
            for batch, error in lost.items():
                loop.call_soon_threadsafe(self._on_lost, batch, error)
        except RuntimeError:
            # The loop was closed just now: nobody is left who could be told.
            return

    def _drop(self, connection: Connection | None) -> None:
        """After an error, a connection is not trusted any more."""
        if connection is not None:
            connection.invalidate()
            connection.close()


_STANDING = select(tables.batches.c.lease, tables.batches.c.last_sequence).where(
    tables.batches.c.number == bindparam("number")
)
