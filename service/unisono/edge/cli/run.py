"""`unisono run`: a file of items in, results out, then the pass map and the report."""

from __future__ import annotations

import asyncio
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import grpc.aio

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import event_pb2
from unisono.edge.cli.collector import Collector
from unisono.edge.cli.connect import Connection, Wish, connect
from unisono.edge.cli.errors import ExitCode, StopError, problem_of_call, problem_of_status, stop_for_call
from unisono.edge.cli.feed import LineFeed, open_source
from unisono.edge.cli.lines_in import LineReader, Origin
from unisono.edge.cli.outlets import InOrder, Outlet
from unisono.edge.cli.output import open_output, refuse_source
from unisono.edge.cli.passes import ask_passes, draw_passes
from unisono.edge.cli.passmap import DEFAULT_ROWS
from unisono.edge.cli.patience import DETACH_GRACE_S, GIVE_UP_AFTER_S
from unisono.edge.cli.ports import StartServer
from unisono.edge.cli.progress import Display
from unisono.edge.cli.report import draw_report, headings
from unisono.edge.cli.resume import take_up
from unisono.edge.cli.session import BatchSession, LostError
from unisono.edge.cli.signals import ending_signals, exit_code_of
from unisono.edge.cli.terminal import Terminal, paint, printable
from unisono.edge.cli.terms import BatchTerms, config_of

# Items wait this long for others before they go: longer than it takes to read on, shorter than a person notices.
# A file that is read whole, or to the end of the credit, goes at once: by an explicit release.
_RELEASE_INTERVAL_MS = 250
_RELEASE_SIZE = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(BatchTerms):
    """What `unisono run` was asked for."""

    # A path, or "-" for standard input.
    file: str
    wish: Wish
    # A path, or "-" for lines on standard output; None: lines there too, or answers where it is a terminal.
    output: str | None = None
    # The output is that of a run that was broken off: what it has an answer of is not asked again, the rest appended.
    resumes: bool = False
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
        source = await open_source(options.file, is_strict=options.is_strict)
        stack.callback(source.close)
        answered = await _take_up(options, terminal)
        outlet, display, meter = open_output(
            options.output, terminal, stack, source=options.file, appends=options.resumes
        )
        ordered = InOrder(outlet) if options.is_in_order else None
        outlet = ordered or outlet
        reader = LineReader()
        collector = Collector(reader=reader, outlet=outlet, meter=meter, display=display)

        def passes_over(origin: Origin) -> bool:
            if origin.item_id not in answered:
                return False
            if ordered is not None:
                ordered.pass_over(origin.position)
            return True

        feed = LineFeed(
            source,
            reader,
            on_bad_line=collector.on_bad_line,
            on_lines=collector.on_lines,
            passes_over=passes_over if answered else None,
        )
        try:
            has_items = await feed.look_ahead()
        except OSError as error:
            raise StopError(f"{options.file} cannot be read: {error.strerror}", code=ExitCode.USAGE) from error
        if not feed.count:
            raise StopError(f"{options.file} holds no items.", code=ExitCode.USAGE)
        if not has_items:
            return _conclude_unasked(collector, outlet, feed, terminal)
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
        if self._options.output not in (None, "-"):
            lines.append("Or run the same command with --resume: it asks what has no answer in the output yet.")
        return StopError(*lines, code=ExitCode.UNREACHABLE)

    async def conclude(self, terminal: Terminal) -> None:
        """Draws the map and the report, and tells what went wrong."""
        summary = self._collector.summary
        terminal.say("")
        if self._options.draw_map and summary is not None and self._stop is None:
            await self._draw_map(terminal, summary.report)
        paint(terminal.err, draw_report(self._collector.tally, summary.report if summary else None))
        if summary is not None and summary.HasField("error"):
            terminal.say(f"The batch was cut short: {problem_of_status(summary.error).text}", "red")
        if self._stop is not None:
            terminal.say(["", *self._stop.lines], "red")

    @property
    def exit_code(self) -> int:
        """How the command ends."""
        if self._signal is not None:
            return exit_code_of(self._signal)
        if self._stop is not None:
            return self._stop.code
        tally = self._collector.tally
        return ExitCode.ITEMS_FAILED if tally.failed or tally.unanswered else ExitCode.DONE

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Meanwhile, an interrupt cancels the batch, and a second one gives it up."""
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, *ending_signals()]
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

    async def _draw_map(self, terminal: Terminal, report: event_pb2.Report) -> None:
        try:
            found = await ask_passes(self._connection.stub, self._session.batch_id)
        except grpc.aio.AioRpcError as error:
            terminal.say(f"There is no pass map: {problem_of_call(error).text}", "yellow")
            return
        names = self._collector.names
        groups, rows = headings(report.groups), self._options.map_rows
        paint(terminal.err, draw_passes(found, names, terminal.err, headings=groups, rows=rows))


def _config(options: RunOptions) -> rpc.BatchConfig:
    config = config_of(options)
    config.release.size = _RELEASE_SIZE
    config.release.interval.FromMilliseconds(_RELEASE_INTERVAL_MS)
    return config


def _conclude_unasked(collector: Collector, outlet: Outlet, feed: LineFeed, terminal: Terminal) -> int:
    """Nothing is to be asked of a service; what there is to tell is known."""
    outlet.close()
    if not collector.tally.total:
        terminal.say(f"unisono: nothing is left to do: {feed.passed_over:,} of {feed.count:,} items are answered")
        return ExitCode.DONE
    terminal.say("")
    paint(terminal.err, draw_report(collector.tally, None))
    return ExitCode.ITEMS_FAILED


async def _take_up(options: RunOptions, terminal: Terminal) -> frozenset[str]:
    """Ids of items that are not asked again. Raises StopError."""
    if not options.resumes:
        return frozenset()
    if options.output in (None, "-"):
        what = "--resume goes on with the output of a run that was broken off: name that file with --output."
        raise StopError(what, code=ExitCode.USAGE)
    refuse_source(options.output, options.file)
    former = await asyncio.to_thread(take_up, options.output)
    told = f"unisono: {len(former.answered):,} items are answered in {printable(options.output, one_line=True)}"
    terminal.say(told + ("; its last line, which was broken off, is left out" if former.was_torn else ""))
    return former.answered
