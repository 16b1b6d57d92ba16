"""`unisono submit`: a file of items to a service that keeps and runs them; and `retry`: what failed of a batch."""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, TypeVar

import grpc
import grpc.aio

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import kept_pb2
from unisono.edge.batchfile.line import Form
from unisono.edge.cli.connect import Connection, Wish, connect_to_running
from unisono.edge.cli.errors import ExitCode, StopError, problem_of_call
from unisono.edge.cli.feed import BAD_LINES_TOLD, LineFeed, open_source
from unisono.edge.cli.forms import FORMS_KEY, TooMixedError, write_forms
from unisono.edge.cli.kept import get_batch, stop_for_kept
from unisono.edge.cli.lines_in import LineReader
from unisono.edge.cli.passmap import DEFAULT_ROWS
from unisono.edge.cli.patience import GIVE_UP_AFTER_S, Patience, is_lost
from unisono.edge.cli.source import CopyingSource, LineSource
from unisono.edge.cli.terminal import OutputError, Terminal, write
from unisono.edge.cli.terms import BatchTerms, config_of
from unisono.edge.cli.upload import Upload
from unisono.edge.cli.watch import WatchOptions, watch_batch

T = TypeVar("T")

# What the service receives in one message; of that, an item has so many bytes beside its own, and the forms of lines.
MAX_MESSAGE_BYTES = 32 * 1024 * 1024
_FRAME_BYTES = 6
_FORMS_BYTES = 1024
_SAY_EVERY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOptions(BatchTerms):
    """What `unisono submit` was asked for."""

    # A path, or "-" for standard input.
    file: str
    wish: Wish
    # The caller's name for the request: the same file under it is the same batch. None: one is made up.
    request_id: str | None = None
    # The caller's own words.
    metadata: Mapping[str, str] = field(default_factory=dict)
    # The batch is followed to its end.
    waits: bool = False
    draw_map: bool = True
    # Rows of the map in each group; None: all.
    map_rows: int | None = DEFAULT_ROWS
    # A bad line keeps all others from being submitted.
    is_strict: bool = False


async def submit(options: SubmitOptions, terminal: Terminal) -> int:
    """Submits the file, and prints the batch's id; returns the exit code. Raises StopError."""
    with tempfile.TemporaryFile() as copy:
        found = await _read(options, terminal, copy)
        bad = found.bad
        for message in bad[:BAD_LINES_TOLD]:
            terminal.say(message, "red")
        if len(bad) > BAD_LINES_TOLD:
            terminal.say(f"… and {len(bad) - BAD_LINES_TOLD:,} more bad lines", "red")
        if not found.count:
            what = f"{options.file} holds no items" + (" that can be read: nothing was submitted." if bad else ".")
            raise StopError(what, code=ExitCode.ITEMS_FAILED if bad else ExitCode.USAGE)
        async with connect_to_running(options.wish) as connection:
            batch = await _keep(found, options, connection, terminal)
            if bad:
                lines = "1 line is" if len(bad) == 1 else f"{len(bad):,} lines are"
                terminal.say(f"unisono: {lines} not among the items of the batch, as told above", "yellow")
            watching = WatchOptions(
                wish=options.wish,
                batch_id=batch.batch_id,
                draw_map=options.draw_map,
                map_rows=options.map_rows,
            )
            code = await _go_on(batch, connection, terminal, watching if options.waits else None)
    return ExitCode.ITEMS_FAILED if bad and code == ExitCode.DONE else code


async def _keep(
    found: _Found, options: SubmitOptions, connection: Connection, terminal: Terminal
) -> kept_pb2.KeptBatch:
    """The batch, once the service keeps all of it: sent in one message, or over a stream where it is too large."""
    if found.again is None:
        again = found.request.config.request_id
        answer = await _until_answered(connection, lambda: connection.stub.SubmitBatch(found.request), again)
        return answer.batch
    slow = Slow(terminal)
    upload = Upload(
        connection,
        found.request,
        LineFeed(found.again, LineReader(), on_bad_line=lambda _: None, on_lines=lambda _: None),
        is_ours=options.request_id is None,
        on_kept=lambda kept: slow.say(f"unisono: {kept:,} of {found.count:,} items are kept so far"),
        on_connection=lambda text: terminal.say(f"unisono: {text}", "yellow"),
    )
    try:
        batch_id = await upload.run()
    except OSError as error:
        raise StopError(f"{options.file} cannot be read: {error.strerror}", code=ExitCode.USAGE) from error
    return await get_batch(connection, batch_id)


class Slow:
    """Says how far something is that takes its time: once every two seconds."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._said_s = time.monotonic()

    def say(self, text: str) -> None:
        """It is so far."""
        if time.monotonic() - self._said_s >= _SAY_EVERY_S:
            self._said_s = time.monotonic()
            self._terminal.say(text, "dim")


async def retry(options: WatchOptions, terminal: Terminal, *, waits: bool, request_id: str | None = None) -> int:
    """Submits what failed of a batch, and prints the new batch's id; returns the exit code. Raises StopError.

    `request_id`: as for `submit`.
    """
    request = rpc.RetryBatchRequest(batch_id=options.batch_id, request_id=request_id or _new_id())
    async with connect_to_running(options.wish) as connection:
        answer = await _until_answered(connection, lambda: connection.stub.RetryBatch(request), request.request_id)
        watching = WatchOptions(
            wish=options.wish,
            batch_id=answer.batch.batch_id,
            draw_map=options.draw_map,
            map_rows=options.map_rows,
        )
        return await _go_on(answer.batch, connection, terminal, watching if waits else None)


async def _go_on(
    batch: kept_pb2.KeptBatch, connection: Connection, terminal: Terminal, watching: WatchOptions | None
) -> int:
    """Prints the id of a batch that is kept, and follows it where that is asked for."""
    try:
        write(terminal.out, batch.batch_id)
    except OutputError as error:
        raise OutputError(f"{error}; batch {batch.batch_id} is kept") from error
    items = "1 item" if batch.counts.accepted == 1 else f"{batch.counts.accepted:,} items"
    terminal.say(f"unisono: {items} kept by the service at {connection.target}")
    if watching is None:
        return ExitCode.DONE
    return await watch_batch(watching, connection, terminal)


@dataclass(slots=True)
class _Found:
    """What a file holds."""

    # The request, without items where they are too many for one message.
    request: rpc.SubmitBatchRequest
    # Items, and what is wrong with lines that are none.
    count: int = 0
    bad: list[str] = field(default_factory=list)
    # Where the items are too many: the file once more, from its beginning.
    again: LineSource | None = None


async def _read(options: SubmitOptions, terminal: Terminal, copy: IO[bytes]) -> _Found:
    """The whole file as one request, or where it can be read again; `copy` takes what cannot. Raises StopError."""
    source = await open_source(options.file, is_strict=options.is_strict)
    start = source.tell()
    if start is None:
        source = CopyingSource(source, copy)
    found = _Found(rpc.SubmitBatchRequest(config=config_of(options), metadata=options.metadata))
    found.request.config.request_id = options.request_id or _new_id()
    reader = LineReader()
    feed = LineFeed(source, reader, on_bad_line=lambda line: found.bad.append(line.message), on_lines=lambda _: None)
    forms: list[Form] = []
    slow = Slow(terminal)
    size = found.request.ByteSize() + _FORMS_BYTES
    try:
        while (items := await feed.next_items()) is not None:
            found.count += len(items)
            forms += [reader.origins[item.item_id].form for item in items]
            size += sum(item.ByteSize() + _FRAME_BYTES for item in items)
            if size <= MAX_MESSAGE_BYTES:
                found.request.items.extend(items)
            else:
                found.request.ClearField("items")
            slow.say(f"unisono: {found.count:,} items of {options.file} are read so far")
        if size > MAX_MESSAGE_BYTES:
            found.again = LineSource.copied(copy) if start is None else source.again(start)
    except OSError as error:
        raise StopError(f"{options.file} cannot be read: {error.strerror}", code=ExitCode.USAGE) from error
    finally:
        feed.close()
    try:
        kept = write_forms(forms)
    except TooMixedError:
        raise StopError(
            f"{options.file} changes too often between OpenAI's form of line and the plain one, or between OpenAI's "
            "urls: a kept batch remembers a hundred changes or so, to write its results in the same forms.",
            "Sort its lines by form, or write them all in one.",
            code=ExitCode.USAGE,
        ) from None
    if kept:
        found.request.metadata[FORMS_KEY] = kept
    return found


async def _until_answered(connection: Connection, call: Callable[[], Awaitable[T]], request_id: str) -> T:
    """What a request is answered that is safe to send again; over a new connection where one is lost.

    Raises StopError, which tells the request's name where it may have been kept.
    """
    patience = Patience(GIVE_UP_AFTER_S)
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            # What is being stopped has a successor.
            is_away = is_lost(error) or problem_of_call(error).reason == "SHUTTING_DOWN"
            pause_s = patience.lost() if is_away else None
            if pause_s is None:
                stop = stop_for_kept(error, connection.target)
                if is_away:
                    again = f"It may be kept all the same: the same command with --request-id {request_id} finds it."
                    raise StopError(*stop.lines, again, code=stop.code) from None
                raise stop from None
        await asyncio.sleep(pause_s)


def _new_id() -> str:
    """A name for a request, which makes it safe to send again."""
    return f"cli-{uuid.uuid4()}"
