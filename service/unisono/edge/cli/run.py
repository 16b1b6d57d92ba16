"""`unisono run`: a file of items in, results out, then the pass map and the report."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import grpc.aio

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import item_pb2
from unisono.edge.cli.collector import Collector
from unisono.edge.cli.connect import Connection, Wish, connect
from unisono.edge.cli.errors import ExitCode, StopError, problem_of_call, problem_of_status, stop_for_call
from unisono.edge.cli.feed import LineFeed, open_checked
from unisono.edge.cli.lines_in import LineReader
from unisono.edge.cli.outlets import Answers, InOrder, JsonLines, Outlet
from unisono.edge.cli.passmap import DEFAULT_ROWS, MapPass, draw_pass_map
from unisono.edge.cli.patience import DETACH_GRACE_S, GIVE_UP_AFTER_S
from unisono.edge.cli.ports import StartServer
from unisono.edge.cli.progress import Bar, Display, Lines, Meter
from unisono.edge.cli.report import draw_report, headings
from unisono.edge.cli.session import BatchSession, LostError
from unisono.edge.cli.source import LineSource
from unisono.edge.cli.terminal import Terminal, can_write, is_animated, paint, printable

# Items wait this long for others before they go: longer than it takes to read on, shorter than a person notices.
# A file that is read whole, or to the end of the credit, goes at once: by an explicit release.
_RELEASE_INTERVAL_MS = 250
_RELEASE_SIZE = 50_000
_PASSES_A_PAGE = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What `unisono run` was asked for."""

    # A path, or "-" for standard input.
    file: str
    wish: Wish
    # The model of items that name none; None: the service's.
    model: str | None = None
    # A path, or "-" for lines on standard output; None: lines there too, or answers where it is a terminal.
    output: str | None = None
    num_predict: int | None = None
    temperature: float | None = None
    seed: int | None = None
    # For the whole batch, and for the silence of an item that has begun to speak.
    timeout_s: float | None = None
    item_timeout_s: float | None = None
    # How the batch is run: names of the contract's enums without their beginnings, in small letters; None: as usual.
    co_scheduling: str | None = None
    priority: str | None = None
    # At the backends at one time, released in a second, and the share beside other batches.
    max_concurrency: int | None = None
    items_per_second: float | None = None
    weight: int | None = None
    # Results in the order of the file instead of as they finish.
    is_in_order: bool = False
    draw_map: bool = True
    # Rows of the map in each group; None: all.
    map_rows: int | None = DEFAULT_ROWS
    # A bad line keeps all others from being run.
    is_strict: bool = False


async def run(options: RunOptions, start: StartServer, terminal: Terminal) -> int:
    """Runs the file; returns the exit code. Raises StopError where there is no more to tell."""
    code: int = ExitCode.ITEMS_FAILED
    with ExitStack() as stack:
        source = await _open_source(options)
        stack.callback(source.close)
        outlet, display, meter = _open_output(options, terminal, stack)
        reader = LineReader()
        collector = Collector(reader=reader, outlet=outlet, meter=meter, display=display)
        feed = LineFeed(source, reader, on_bad_line=collector.on_bad_line, on_lines=collector.on_lines)
        try:
            has_items = await feed.look_ahead()
        except OSError as error:
            raise StopError(f"{options.file} cannot be read: {error.strerror}", code=ExitCode.USAGE) from error
        if not feed.count:
            raise StopError(f"{options.file} holds no items.", code=ExitCode.USAGE)
        if not has_items:
            # Nothing to ask a service for; what there is to tell is known.
            outlet.close()
            terminal.say("")
            paint(terminal.err, draw_report(collector.tally, None))
            return ExitCode.ITEMS_FAILED
        async with connect(options.wish, start, display.say) as connection:
            job = Job(options, connection, feed=feed, collector=collector, display=display)
            await job.run()
            outlet.close()
            await job.conclude(terminal)
            code = job.exit_code
    return code


class Job:
    """One batch, from the first message to the last line of its report."""

    def __init__(
        self, options: RunOptions, connection: Connection, *, feed: LineFeed, collector: Collector, display: Display
    ) -> None:
        self._options = options
        self._connection = connection
        self._feed = feed
        self._collector = collector
        self._display = display
        self._session = BatchSession(
            connection.stub,
            config=_config(options),
            feed=feed,
            listener=collector,
            give_up_after_s=GIVE_UP_AFTER_S,
        )
        # The signal that ended it, if one did.
        self._signal: int | None = None
        self._stop: StopError | None = None

    async def run(self) -> None:
        """Runs the batch; what goes wrong is kept for `conclude`."""
        started_at = time.monotonic()
        self._display.start()
        try:
            with self._signals():
                await self._session.run()
        except grpc.aio.AioRpcError as error:
            self._stop = stop_for_call(error, self._connection.target)
        except LostError as error:
            self._stop = self._stop_for_lost(error)
        except StopError as error:
            self._stop = error
        except OSError as error:
            what = f"{self._options.file} cannot be read any further: {error.strerror}"
            self._stop = StopError(what, code=ExitCode.USAGE)
        finally:
            self._display.stop()
        tally = self._collector.tally
        tally.duration_s = time.monotonic() - started_at
        tally.unanswered = self._session.sent - self._collector.answered
        tally.is_cut_short = not self._feed.is_ended

    def _stop_for_lost(self, error: LostError) -> StopError:
        target, batch_id = self._connection.target, self._session.batch_id
        lines = [f"The service at {target}: the connection was lost: {printable(str(error), one_line=True)}"]
        if batch_id:
            after = str(self._session.last_sequence)
            words = ["unisono-batch", "--target", target, "--resume", batch_id, "--after", after, self._options.file]
            kept = f"The service keeps batch {batch_id} for {DETACH_GRACE_S / 60:g} minutes"
            lines.append(f"It was tried again for {GIVE_UP_AFTER_S:g} s. {kept}.")
            lines += ["To go on where it ended, with a program of clients/:", f"  {shlex.join(words)}"]
        return StopError(*lines, code=ExitCode.UNREACHABLE)

    async def conclude(self, terminal: Terminal) -> None:
        """Draws the map and the report, and tells what went wrong."""
        summary = self._collector.summary
        terminal.say("")
        if self._options.draw_map and summary is not None and self._stop is None:
            await self._draw_map(terminal)
        paint(terminal.err, draw_report(self._collector.tally, summary.report if summary else None))
        if summary is not None and summary.HasField("error"):
            terminal.say(f"The batch was cut short: {problem_of_status(summary.error).text}", "red")
        if self._stop is not None:
            terminal.say(["", *self._stop.lines], "red")

    @property
    def exit_code(self) -> int:
        """How the command ends."""
        if self._signal is not None:
            return 128 + self._signal
        if self._stop is not None:
            return self._stop.code
        tally = self._collector.tally
        return ExitCode.ITEMS_FAILED if tally.failed or tally.unanswered else ExitCode.DONE

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Meanwhile, an interrupt cancels the batch, and a second one gives it up."""
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup makes it
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._interrupt, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _interrupt(self, number: int) -> None:
        if self._signal is None:
            self._signal = number
            self._display.say("cancelling the batch; once more to leave at once")
            self._session.stop()
        else:
            self._session.give_up()

    async def _draw_map(self, terminal: Terminal) -> None:
        passes: list[MapPass] = []
        unmapped, token = 0, ""
        try:
            while True:
                request = rpc.ListPassesRequest(
                    batch_id=self._session.batch_id, page_size=_PASSES_A_PAGE, page_token=token
                )
                page = await self._connection.stub.ListPasses(request, timeout=30)
                # Arrays of numbers: a long batch has millions of participations.
                passes += [MapPass(group=each.group, items=array("L", each.item_indexes)) for each in page.passes]
                unmapped, token = page.unmapped_passes, page.next_page_token
                if not token:
                    break
        except grpc.aio.AioRpcError as error:
            terminal.say(f"There is no pass map: {problem_of_call(error).text}", "yellow")
            return
        console, summary = terminal.err, self._collector.summary
        lines = draw_pass_map(
            passes,
            self._collector.names,
            console.width,
            unicode=can_write(console, "█▓▒░·│└─…¾½¼"),
            headings=headings(summary.report.groups) if summary else None,
            rows=self._options.map_rows,
        )
        if unmapped:
            lines.append(f"{unmapped:,} more passes were counted, but are too many to be drawn.")
        if lines:
            paint(console, ["Forward passes", *lines, ""])


def _config(options: RunOptions) -> rpc.BatchConfig:
    config = rpc.BatchConfig(model=options.model or "", validation=rpc.VALIDATION_MODE_PER_ITEM)
    config.release.size = _RELEASE_SIZE
    config.release.interval.FromMilliseconds(_RELEASE_INTERVAL_MS)
    defaults = item_pb2.Options(num_predict=options.num_predict, temperature=options.temperature, seed=options.seed)
    if defaults.ByteSize():
        config.options.CopyFrom(defaults)
    if options.co_scheduling is not None:
        config.co_scheduling = rpc.CoScheduling.Value(f"CO_SCHEDULING_{options.co_scheduling.upper()}")
    if options.priority is not None:
        config.priority = rpc.Priority.Value(f"PRIORITY_{options.priority.upper()}")
    for name in ("max_concurrency", "items_per_second", "weight"):
        if (value := getattr(options, name)) is not None:
            setattr(config, name, value)
    if options.timeout_s is not None:
        config.batch_deadline.FromNanoseconds(round(options.timeout_s * 1e9))
    if options.item_timeout_s is not None:
        config.item_timeout.FromNanoseconds(round(options.item_timeout_s * 1e9))
    return config


async def _open_source(options: RunOptions) -> LineSource:
    try:
        return await open_checked(options.file) if options.is_strict else LineSource.open(options.file)
    except OSError as error:
        raise StopError(f"{options.file} cannot be read: {error.strerror or error}", code=ExitCode.USAGE) from error


def _open_output(options: RunOptions, terminal: Terminal, stack: ExitStack) -> tuple[Outlet, Display, Meter]:
    """Where results go, and where progress is shown so that the two do not meet.

    1. Answers on a terminal: the bar moves below them, on the same console, which keeps them apart.
    2. Lines that go to a terminal: nothing may move among them, so progress is lines too.
    3. Lines that go elsewhere: the bar has standard error for itself.
    """
    meter = Meter()
    shows_answers = options.output is None and terminal.out.is_terminal
    outlet: Outlet
    if shows_answers:
        outlet = Answers(terminal.out)
    elif options.output in (None, "-"):
        outlet = JsonLines(sys.stdout.buffer)
        stack.callback(_drop_output)
    else:
        outlet = JsonLines(stack.enter_context(_create(options)), replaces=True)
    console = terminal.out if shows_answers else terminal.err
    is_still = options.output == "-" and terminal.out.is_terminal
    display: Display = Lines(meter, terminal.err)
    if terminal.err.is_terminal and is_animated(console) and not is_still:
        display = Bar(meter, console)
    return (InOrder(outlet) if options.is_in_order else outlet), display, meter


def _create(options: RunOptions) -> BinaryIO:
    """The output file, as it is; never the input. It is emptied when there is a result to write, and not before."""
    path = Path(options.output or "")
    with suppress(OSError):
        if path.samefile(options.file):
            raise StopError(f"{path} is the file that is read; name another for the results.", code=ExitCode.USAGE)
    try:
        return path.open("ab")
    except OSError as error:
        raise StopError(f"{path} cannot be written: {error.strerror}", code=ExitCode.USAGE) from error


def _drop_output() -> None:
    """Writes what standard output still holds; where its reader is gone, keeps Python from complaining at its end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
