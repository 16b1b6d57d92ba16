"""Batches that are made of a file, and become files: OpenAI's Batch API, without its words.

Theory of operation. A batch is kept, by its own name, before its caller is told of it. Then its file is read twice:
to be checked line by line, in pieces, of which nothing stays but the ids; and, where nothing is wrong, to become the
items of a kept batch of the same id (`durable.py`), which from then on says how it stands. When that has ended, its
results are read page by page and written to two files; the files, and that the batch has ended, become known at one
time.

So whatever a process had done when it ended can be seen by the next one: no kept batch, and the file is checked once
more; one that runs, and its end is waited for; one that has ended, and its files are written anew.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO

from unisono.app.batches import new_id
from unisono.app.file_lines import LinePlaces, Lines, Output, check_some, joined
from unisono.app.intake import as_kept
from unisono.core.batch import BatchConfig
from unisono.core.errors import (
    BatchNotFoundError,
    InvalidRequestError,
    LimitExceededError,
    ShuttingDownError,
    UnisonoError,
)
from unisono.core.events import BatchState, Result, ResultPart
from unisono.core.files import FileBatch, FileBatchState, LineError, StoredFile
from unisono.core.model import Item

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence

    from unisono.app.batches import Batches
    from unisono.app.durable import DurableBatches
    from unisono.app.file_lines import LineForm
    from unisono.app.intake import Examination
    from unisono.app.ports import Clock
    from unisono.app.stores import FileDraft, FileStore
    from unisono.core.batch import BadItem
    from unisono.core.durable import StoredBatch

# Results that are read at one time.
_RESULTS = 32
# What cannot be written is tried again so much later; twice as much after each time, since all of a file may have to
# be read for it, but never more than the longest.
_AGAIN_S = 2.0
_LONGEST_S = 30.0
# What is old is deleted so often.
_TIDY_S = 60.0
# The least time that a batch has whose window is over before it is begun.
_LEAST_S = 0.001
OUTPUT_PURPOSE = "batch_output"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSettings:
    """Limits of files and their batches."""

    # How long batches and files are kept, in seconds.
    keep_s: float
    # Batches that have not ended.
    most_open: int = 1_000


class _UnwantedError(Exception):
    """Somebody has cancelled the batch before it was begun."""


class FileBatches:
    """The batches of this process that are made of files; and the files."""

    def __init__(
        self,
        files: FileStore,
        durable: DurableBatches,
        batches: Batches,
        form: LineForm,
        clock: Clock,
        *,
        settings: FileSettings,
        report_defect: Callable[[str, BaseException], None],
    ) -> None:
        self.files = files
        self._durable = durable
        self._batches = batches
        self._form = form
        self._clock = clock
        self._settings = settings
        self._report_defect = report_defect
        # Those that have not ended, and what drives each.
        self._open: dict[str, asyncio.Task[None]] = {}
        # Of these, those that somebody wants to end.
        self._cancelling: set[str] = set()
        # One file at a time is checked, and becomes items.
        self._turn = asyncio.Lock()
        self._tidying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Goes on with what has not ended."""
        await self.files.start()
        for batch in await self.files.open_batches():
            if batch.cancelling_ns is not None:
                self._cancelling.add(batch.batch_id)
            self._drive(batch, {})
        self._tidying = asyncio.get_running_loop().create_task(self._tidy())

    async def close(self) -> None:
        """Leaves all as it stands."""
        tasks = [*self._open.values(), *([self._tidying] if self._tidying else [])]
        for task in tasks:
            _ = task.cancel()
        _ = await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def keep_s(self) -> float:
        """How long files are kept that say nothing about it."""
        return self._settings.keep_s

    # -- What callers do ---------------------------------------------------------------------------------------

    async def keep(self, draft: FileDraft, *, purpose: str, filename: str, keep_s: float | None) -> StoredFile:
        """A file that was handed in whole. `keep_s`: for how long; None: as long as batches."""
        file = self._file(draft, purpose, filename, keep_s)
        await self.files.keep(draft, file)
        return file

    async def create(
        self,
        *,
        input_file_id: str,
        endpoint: str,
        window: str,
        window_s: float,
        metadata: Mapping[str, str],
        output_keep_s: int | None,
        carrier: Mapping[str, str],
    ) -> FileBatch:
        """Keeps a batch, whose file is still to be checked. Raises LimitExceededError for too many."""
        if len(self._open) >= self._settings.most_open:
            raise LimitExceededError(
                f"{len(self._open):,} batches of files have not ended; at most {self._settings.most_open:,} may be "
                "open: wait until one has ended, or cancel one",
                metadata={"limit": "max_kept_batches"},
                retry_after_s=30.0,
            )
        now_ns = self._clock.time_ns()
        batch = FileBatch(
            batch_id=new_id(),
            input_file_id=input_file_id,
            endpoint=endpoint,
            window=window,
            expires_ns=now_ns + round(window_s * 1e9),
            created_ns=now_ns,
            metadata=metadata,
            output_keep_s=output_keep_s,
        )
        try:
            await self.files.put_batch(batch)
        except LimitExceededError:
            # It may have been kept all the same.
            if await self.files.find_batch(batch.batch_id) is None:
                raise
        self._drive(batch, carrier)
        return batch

    async def get(self, batch_id: str) -> tuple[FileBatch, StoredBatch | None] | None:
        """A batch, and while it is open the kept batch that it became; None: none of that id was made of a file."""
        batch = await self.files.find_batch(batch_id)
        return None if batch is None else (batch, await self.standing(batch))

    async def standing(self, batch: FileBatch) -> StoredBatch | None:
        """The kept batch that an open one became; None: it did not yet, or the batch is over."""
        if batch.is_over:
            return None
        with suppress(BatchNotFoundError):
            return await self._durable.get(batch.batch_id)
        return None

    async def model(self, batch: FileBatch) -> str:
        """The model of all its lines; empty: they have several, or name none, or nobody knows yet, or any more."""
        with suppress(BatchNotFoundError):
            return (await self._durable.get(batch.batch_id)).config.model
        return ""

    async def cancel(self, batch: FileBatch) -> None:
        """Ends an open batch: what was not answered yet never will be. Raises LimitExceededError."""
        # What cannot be kept is not done either: the caller is told so.
        await self.files.set_cancelling(batch.batch_id, self._clock.time_ns())
        if batch.batch_id in self._open:
            self._cancelling.add(batch.batch_id)
        # While its file is checked there is none; whoever checks it looks afterwards.
        with suppress(BatchNotFoundError):
            _ = await self._durable.cancel(batch.batch_id)

    async def retry(self, parent: FileBatch, *, request_id: str, method: str, carrier: Mapping[str, str]) -> str:
        """A batch of the items of another that failed, expired, or were cancelled; its id. It becomes files too.

        See `DurableBatches.retry`. Where the process ends before it is known as one of a file, it is a kept batch.
        """
        stored, is_new = await self._durable.retry(
            parent.batch_id, request_id=request_id, method=method, carrier=carrier
        )
        if is_new:
            batch = FileBatch(
                batch_id=stored.batch_id,
                input_file_id=parent.input_file_id,
                endpoint=parent.endpoint,
                window=parent.window,
                expires_ns=stored.deadline_ns or stored.created_ns,
                created_ns=stored.created_ns,
                metadata=parent.metadata,
                output_keep_s=parent.output_keep_s,
            )
            await self.files.put_batch(batch)
            self._drive(batch, carrier)
        return stored.batch_id

    # -- From its file to its files ----------------------------------------------------------------------------

    def _drive(self, batch: FileBatch, carrier: Mapping[str, str]) -> None:
        task = asyncio.get_running_loop().create_task(self._see_through(batch, carrier))
        self._open[batch.batch_id] = task

        def ended(task: asyncio.Task[None]) -> None:
            del self._open[batch.batch_id]
            self._cancelling.discard(batch.batch_id)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._report_defect("the end of a batch of a file", error)

        task.add_done_callback(ended)

    async def _see_through(self, batch: FileBatch, carrier: Mapping[str, str]) -> None:
        """Takes a batch to its end; whatever is wrong is told by it."""
        try:
            await self._again(lambda: self._run(batch, carrier))
        except ShuttingDownError:
            # The next process goes on with it.
            return
        except Exception as defect:  # noqa: BLE001 - a defect costs a batch, and its caller must see that
            self._report_defect("a batch of a file", defect)
            wrong = LineError(code="server_error", message="The service failed; its log says how.")
            await self._again(lambda: self._end(batch, FileBatchState.FAILED, errors=(wrong,)))

    async def _again(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Does something; again and again, where there is no room for it."""
        pause_s = _AGAIN_S
        while True:
            began_s = self._clock.monotonic_s()
            try:
                return await work()
            except LimitExceededError:
                if self._clock.monotonic_s() - began_s > _LONGEST_S:
                    # It got on for a while.
                    pause_s = _AGAIN_S
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_S)

    async def _run(self, batch: FileBatch, carrier: Mapping[str, str]) -> None:
        batch_id = batch.batch_id
        stored = await self.standing(batch)
        if stored is None:
            async with self._turn:
                if not await self._submit(batch, carrier):
                    return
        if batch_id in self._cancelling:
            _ = await self._durable.cancel(batch_id)
        try:
            stored = await self._durable.until_over(batch_id)
            await self._finish(batch, stored)
        except BatchNotFoundError:
            wrong = LineError(code="batch_deleted", message="The batch was deleted before its files were written.")
            await self._end(batch, FileBatchState.FAILED, errors=(wrong,))

    async def _submit(self, batch: FileBatch, carrier: Mapping[str, str]) -> bool:
        """Makes a kept batch of the file; False: it is none, or is not wanted any more, and has ended so."""
        self._durable.refuse_too_many()
        stream = await self.files.open(batch.input_file_id)
        if stream is None:
            what = f"The file {batch.input_file_id} was deleted before the batch was begun."
            wrong = LineError(code="file_not_found", message=what, param="input_file_id")
            await self._end(batch, FileBatchState.FAILED, errors=(wrong,))
            return False
        try:
            check = self._form.check(batch.endpoint)
            lines = Lines(stream, self._form.max_line_bytes)
            while not self._is_left(batch) and await asyncio.to_thread(check_some, lines, check):
                pass
            if check.errors and not self._is_left(batch):
                await self._end(batch, FileBatchState.FAILED, errors=tuple(check.errors))
                return False
            left_s = (batch.expires_ns - self._clock.time_ns()) / 1e9
            config = BatchConfig(is_strict=False, deadline_s=max(_LEAST_S, left_s), model=check.model)
            _ = await self._durable.submit_in_pages(
                self._pages(batch, stream, self._batches.examination(config)),
                config,
                method="POST /v1/batches",
                carrier=carrier,
                metadata=batch.metadata,
                batch_id=batch.batch_id,
            )
        except _UnwantedError:
            await self._end(batch, FileBatchState.CANCELLED)
            return False
        except InvalidRequestError as error:
            wrong = LineError(code="invalid_request", message=error.message)
            await self._end(batch, FileBatchState.FAILED, errors=(wrong,))
            return False
        finally:
            await asyncio.to_thread(stream.close)
        return True

    def _is_left(self, batch: FileBatch) -> bool:
        return batch.batch_id in self._cancelling

    async def _pages(
        self, batch: FileBatch, stream: BinaryIO, examination: Examination
    ) -> AsyncGenerator[Sequence[Item | BadItem], None]:
        """The items of a file that was checked, some at a time; raises _UnwantedError, InvalidRequestError."""
        _ = await asyncio.to_thread(stream.seek, 0)
        lines = Lines(stream, self._form.max_line_bytes)
        while not self._is_left(batch) and (some := await asyncio.to_thread(lines.some)):
            yield [as_kept(one) for one in examination.take(await asyncio.to_thread(self._items, batch, some))]
        if self._is_left(batch):
            raise _UnwantedError

    def _items(self, batch: FileBatch, some: Sequence[tuple[int, bytes | None]]) -> list[Item | BadItem]:
        return [self._form.item(text, batch.endpoint) for _, text in some if text is not None]

    async def _finish(self, batch: FileBatch, stored: StoredBatch) -> None:
        """Writes the files of a kept batch that has ended."""
        answers, errors = Output(self.files), Output(self.files)
        asked = await self.lines(batch)
        try:
            after, cached, is_all = 0, 0, False
            parts: list[ResultPart] = []
            while not is_all:
                page = await self._durable.results(batch.batch_id, after=after, limit=_RESULTS)
                is_all = not page
                whole: list[tuple[Result, int]] = []
                for entry in page:
                    after = entry.sequence
                    if isinstance(entry.event, ResultPart):
                        parts.append(entry.event)
                    elif isinstance(entry.event, Result):
                        whole.append((joined(parts, entry.event), entry.at_ns))
                        parts = []
                cached += sum((one.usage.cached_prompt_tokens or 0) for one, _ in whole if one.usage is not None)
                for line, is_answer in await asyncio.to_thread(self._written, batch, whole, asked):
                    await (answers if is_answer else errors).add(line)
            kept: list[tuple[FileDraft, StoredFile]] = []
            ids: list[str | None] = []
            for output, kind in ((answers, "output"), (errors, "error")):
                draft = await output.end()
                ids.append(None if draft is None else draft.file_id)
                if draft is not None:
                    name = f"{batch.batch_id}_{kind}.jsonl"
                    kept.append((draft, self._file(draft, OUTPUT_PURPOSE, name, batch.output_keep_s)))
            state = {
                BatchState.EXPIRED: FileBatchState.EXPIRED,
                BatchState.CANCELLED: FileBatchState.CANCELLED,
            }.get(stored.state, FileBatchState.COMPLETED)
            await self._end(
                batch,
                state,
                stored=stored,
                kept=kept,
                output_file_id=ids[0],
                error_file_id=ids[1],
                cached_tokens=cached,
            )
        finally:
            for output in (answers, errors):
                await output.discard()
            if asked is not None:
                await asyncio.to_thread(asked.close)

    async def lines(self, batch: FileBatch) -> LinePlaces | None:
        """The lines of a batch's file, where its results are written with them, and nobody deleted it."""
        if not self._form.wants_lines(batch.endpoint):
            return None
        stream = await self.files.open(batch.input_file_id)
        return None if stream is None else await asyncio.to_thread(LinePlaces, stream)

    def _written(
        self, batch: FileBatch, whole: Sequence[tuple[Result, int]], asked: LinePlaces | None
    ) -> list[tuple[bytes, bool]]:
        return [
            self._form.result(batch, result, at_ns, None if asked is None else asked.line(result.index))
            for result, at_ns in whole
        ]

    async def _end(
        self,
        batch: FileBatch,
        state: FileBatchState,
        *,
        stored: StoredBatch | None = None,
        kept: Sequence[tuple[FileDraft, StoredFile]] = (),
        errors: tuple[LineError, ...] = (),
        output_file_id: str | None = None,
        error_file_id: str | None = None,
        cached_tokens: int = 0,
    ) -> None:
        now_ns = self._clock.time_ns()
        known = await self.files.find_batch(batch.batch_id) or batch
        if known.cancelling_ns is not None and state is FileBatchState.COMPLETED:
            # It was answered to its end while somebody asked for that.
            state = FileBatchState.CANCELLED
        ended = replace(
            known,
            state=state,
            in_progress_ns=stored.created_ns if stored is not None else None,
            finalizing_ns=stored.ended_ns if stored is not None else None,
            tally=stored.tally if stored is not None else None,
            ended_ns=now_ns,
            keep_until_ns=now_ns + round(self._settings.keep_s * 1e9),
            errors=errors,
            output_file_id=output_file_id,
            error_file_id=error_file_id,
            cached_tokens=cached_tokens,
        )
        await self.files.end_batch(ended, kept)

    def _file(self, draft: FileDraft, purpose: str, filename: str, keep_s: float | None) -> StoredFile:
        now_ns = self._clock.time_ns()
        return StoredFile(
            file_id=draft.file_id,
            purpose=purpose,
            filename=filename,
            size_bytes=draft.size_bytes,
            created_ns=now_ns,
            expires_ns=now_ns + round((self._settings.keep_s if keep_s is None else keep_s) * 1e9),
        )

    async def _tidy(self) -> None:
        """Deletes what was kept for long enough, now and then."""
        while True:
            try:
                await self.files.delete_old(self._clock.time_ns())
            except (UnisonoError, OSError) as error:
                # Where there is no room to write, it is tried again.
                if not isinstance(error, LimitExceededError):
                    self._report_defect("deleting old files", error)
            await asyncio.sleep(_TIDY_S)
