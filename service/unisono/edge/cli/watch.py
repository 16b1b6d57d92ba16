"""`unisono watch`: how far a kept batch is, its pass map while it runs, and its report at the end."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
import grpc.aio
from rich.text import Text

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import event_pb2, kept_pb2
from unisono.edge.cli.collector import Collector
from unisono.edge.cli.connect import Connection, Wish, connect_to_running
from unisono.edge.cli.errors import ExitCode, problem_of_call, problem_of_status
from unisono.edge.cli.follower import GIVE_UP_AFTER_S, Follower, stop_for_lost
from unisono.edge.cli.kept import PATIENCE_S, UNANSWERED, ask, get_batch, stop_for_kept
from unisono.edge.cli.kept_lines import failed_of, ran_for_s, state_of
from unisono.edge.cli.lines_in import LineReader
from unisono.edge.cli.lines_out import Ended
from unisono.edge.cli.passes import Passes, ask_passes, draw_passes
from unisono.edge.cli.passmap import DEFAULT_ROWS
from unisono.edge.cli.progress import Bar, Display, Lines, Meter
from unisono.edge.cli.report import FAILURES_TOLD, draw_report, headings
from unisono.edge.cli.session import LostError
from unisono.edge.cli.terminal import Terminal, is_animated, paint, painted

# Of a batch with more events than this, what has happened so far is not read again.
_REPLAYED_EVENTS = 5_000
# The map is drawn anew this often, and at most for this share of the time.
_MAP_INTERVAL_S = 1.0
_MAP_SHARE = 0.05
# Lines of a terminal that are not the map's rows: headings, the sums below, the bar.
_OTHER_LINES = 12
_LEAST_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """What `unisono watch` was asked for."""

    wish: Wish
    batch_id: str
    draw_map: bool = True
    # Rows of the map in each group; None: all.
    map_rows: int | None = DEFAULT_ROWS


async def watch(options: WatchOptions, terminal: Terminal) -> int:
    """Follows the batch to its end; returns the exit code. Raises StopError where there is no more to tell."""
    async with connect_to_running(options.wish) as connection:
        return await watch_batch(options, connection, terminal)


async def watch_batch(options: WatchOptions, connection: Connection, terminal: Terminal) -> int:
    """As `watch`, over a connection that is there. Cancelled, it says how to join the batch again."""
    watching = _Watching(options, connection, terminal)
    try:
        await watching.start(await get_batch(connection, options.batch_id))
        await watching.follow()
        return await watching.conclude()
    except grpc.aio.AioRpcError as error:
        raise stop_for_kept(error, connection.target) from None
    except LostError as error:
        raise stop_for_lost(error, connection.target, f"unisono watch {options.batch_id}") from None
    except asyncio.CancelledError:
        terminal.say(f"unisono: batch {options.batch_id} goes on; unisono watch {options.batch_id} joins it again")
        raise


class _Watching:
    """One batch, looked at."""

    def __init__(self, options: WatchOptions, connection: Connection, terminal: Terminal) -> None:
        self._options = options
        self._connection = connection
        self._terminal = terminal
        self._meter = Meter()
        self._is_moving = is_animated(terminal.err)
        self._display: Display = Lines(self._meter, terminal.err)
        if self._is_moving:
            self._display = Bar(self._meter, terminal.err, above=self._map)
        self._collector = Collector(
            reader=LineReader(),
            outlet=_Nowhere(),
            meter=self._meter,
            display=self._display,
            batch_id=options.batch_id,
        )
        # Events after this one are read; progress is shown from the last one on that there was at the beginning.
        self._after = 0
        self._shown_from = 0
        # Names of groups, by their number.
        self._headings: dict[int, str] = {}
        # The map as it was drawn last.
        self._drawn: Text | None = None

    async def start(self, batch: kept_pb2.KeptBatch) -> None:
        """Takes over how the batch stands, and where its events are read from."""
        counts, meter = batch.counts, self._meter
        meter.total = counts.accepted
        ran_s = ran_for_s(batch, datetime.now(UTC))
        if ran_s is not None:
            meter.began(ran_s)
        elif state_of(batch) == "waiting":
            meter.phase = "waiting for its turn"
        self._shown_from = batch.last_sequence
        if batch.last_sequence > _REPLAYED_EVENTS:
            # An ended batch's last event is its summary, which is not to be missed.
            self._after = batch.last_sequence - batch.HasField("ended_at")
            meter.completed, meter.failed = counts.completed, failed_of(counts)

    async def follow(self) -> None:
        """Shows how it goes on, up to its end. Raises LostError, and grpc.aio.AioRpcError."""
        follower = Follower(
            self._connection.stub,
            self._options.batch_id,
            after=self._after,
            on_connection=self._collector.on_connection,
            give_up_after_s=GIVE_UP_AFTER_S,
        )
        is_shown = self._after >= self._shown_from
        if is_shown:
            self._display.start()
        drawing = asyncio.create_task(self._draw()) if self._is_moving and self._options.draw_map else None
        try:
            async with aclosing(follower.events()) as events:
                async for event in events:
                    if not is_shown and event.sequence >= self._shown_from:
                        is_shown = True
                        self._display.start()
                    if event.HasField("group_planned"):
                        group = event.group_planned
                        self._headings[group.group] = f"{group.model or 'the default model'} on {group.backend}"
                    self._collector.on_event(event)
        finally:
            if drawing is not None:
                _ = drawing.cancel()
                with suppress(asyncio.CancelledError):
                    await drawing
            self._drawn = None
            self._display.stop()

    def _map(self) -> Text | None:
        return self._drawn

    async def _draw(self) -> None:
        """Draws the map anew, again and again."""
        console = self._terminal.err
        while True:
            began = time.monotonic()
            # Nobody has the passes while it waits for its turn, or while the connection is lost.
            with suppress(grpc.aio.AioRpcError):
                found = await ask_passes(self._connection.stub, self._options.batch_id)
                groups = len({each.group for each in found.passes}) or 1
                fitting = max(_LEAST_ROWS, (console.height - _OTHER_LINES) // groups)
                rows = min(fitting, self._options.map_rows or fitting)
                lines = self._lines(found, rows)
                self._drawn = Text("\n", no_wrap=True, overflow="crop").join(map(painted, lines)) if lines else None
            took_s = time.monotonic() - began
            await asyncio.sleep(max(_MAP_INTERVAL_S, took_s / _MAP_SHARE))

    def _lines(self, found: Passes, rows: int | None) -> list[str]:
        names, console = self._collector.names, self._terminal.err
        return draw_passes(found, names, console, headings=self._headings, rows=rows)

    async def conclude(self) -> int:
        """Draws the map and the report; returns the exit code."""
        terminal, summary = self._terminal, self._collector.summary
        report = summary.report if summary is not None else event_pb2.Report()
        counts = report.counts
        self._headings.update(headings(report.groups))
        terminal.say("")
        if self._options.draw_map:
            await self._show_map()
        tally = self._collector.tally
        if failed_of(counts) and not tally.failures:
            await self._look_up_failures()
        # Of all items, also of those whose results were not read again.
        tally.states = {
            "completed": counts.completed,
            "failed": counts.failed,
            "expired": counts.expired,
            "cancelled": counts.cancelled,
        }
        paint(terminal.err, draw_report(tally, report))
        if summary is not None and summary.HasField("error"):
            terminal.say(f"The batch was cut short: {problem_of_status(summary.error).text}", "red")
        return ExitCode.ITEMS_FAILED if failed_of(counts) else ExitCode.DONE

    async def _look_up_failures(self) -> None:
        """The first of them, where their results were not read again."""
        request = rpc.ListResultsRequest(batch_id=self._options.batch_id, page_size=FAILURES_TOLD, states=UNANSWERED)
        stub = self._connection.stub
        page = await ask(self._connection, stub.ListResults(request, timeout=PATIENCE_S))
        for event in page.events:
            self._collector.on_event(event)

    async def _show_map(self) -> None:
        try:
            found = await ask_passes(self._connection.stub, self._options.batch_id)
        except grpc.aio.AioRpcError as error:
            problem = problem_of_call(error)
            why = problem.text
            if problem.reason == "BATCH_NOT_FOUND":
                why = "the service keeps it while the batch runs, and a moment longer"
            self._terminal.say(f"There is no pass map: {why}.", "yellow")
            return
        paint(self._terminal.err, self._lines(found, self._options.map_rows))


class _Nowhere:
    """Results are not shown here: `unisono results` has them."""

    def put(self, ended: Ended) -> None:
        """Leaves it."""

    def close(self) -> None:
        """Nothing is held back."""
