"""`unisono results`: what has come of a kept batch so far, or all of it as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
import grpc.aio

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import event_pb2, kept_pb2
from unisono.edge.batchfile.line import Form
from unisono.edge.cli.collector import Collector
from unisono.edge.cli.connect import Connection, Wish, connect_to_running
from unisono.edge.cli.errors import ExitCode
from unisono.edge.cli.follower import GIVE_UP_AFTER_S, Follower, stop_for_lost
from unisono.edge.cli.forms import FORMS_KEY, Forms
from unisono.edge.cli.kept import PATIENCE_S, UNANSWERED, ask, get_batch, stop_for_kept
from unisono.edge.cli.kept_lines import ran_for_s
from unisono.edge.cli.lines_in import LineReader
from unisono.edge.cli.output import empty_output, open_output
from unisono.edge.cli.progress import Display
from unisono.edge.cli.session import LostError
from unisono.edge.cli.terminal import Terminal

_RESULTS_A_PAGE = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsOptions:
    """What `unisono results` was asked for."""

    wish: Wish
    batch_id: str
    # A path, or "-" for lines on standard output; None: lines there too, or answers where it is a terminal.
    output: str | None = None
    # Only items without an answer.
    only_failed: bool = False
    # To the end of the batch, as results come.
    follows: bool = False


async def results(options: ResultsOptions, terminal: Terminal) -> int:
    """Writes the results; returns the exit code. Raises StopError."""
    with ExitStack() as stack:
        async with connect_to_running(options.wish) as connection:
            batch = await get_batch(connection, options.batch_id)
            form_of = await _forms(connection, batch)
            outlet, display, meter = open_output(options.output, terminal, stack)
            collector = Collector(
                reader=LineReader(),
                outlet=outlet,
                meter=meter,
                display=display,
                batch_id=options.batch_id,
                form_of=form_of,
            )
            if options.follows:
                meter.total = batch.counts.accepted
                ran_s = ran_for_s(batch, datetime.now(UTC))
                if ran_s is not None:
                    meter.began(ran_s)
                await _follow(options, connection, collector, display, terminal)
            else:
                states = UNANSWERED if options.only_failed else ()
                async for event in _listed(connection, options.batch_id, states):
                    collector.on_event(event)
            outlet.close()
    tally = collector.tally
    if not tally.total:
        empty_output(options.output)
    if batch.counts.queued and not options.follows:
        ended = batch.counts.accepted - batch.counts.queued
        told = f"{ended:,} of {batch.counts.accepted:,} items have ended so far; --follow waits for the others"
        terminal.say(f"unisono: {told}", "dim")
    return ExitCode.ITEMS_FAILED if tally.failed else ExitCode.DONE


async def _follow(
    options: ResultsOptions,
    connection: Connection,
    collector: Collector,
    display: Display,
    terminal: Terminal,
) -> None:
    """Hands on each result as it comes. Raises StopError."""
    follower = Follower(
        connection.stub,
        options.batch_id,
        after=0,
        on_connection=collector.on_connection,
        give_up_after_s=GIVE_UP_AFTER_S,
    )
    command = f"unisono results {options.batch_id} --follow"
    display.start()
    try:
        async with aclosing(follower.events()) as events:
            async for event in events:
                if not options.only_failed or not _is_of_answer(event):
                    collector.on_event(event)
                elif event.HasField("result"):
                    collector.pass_over(event.result)
    except grpc.aio.AioRpcError as error:
        raise stop_for_kept(error, connection.target) from None
    except LostError as error:
        raise stop_for_lost(error, connection.target, command) from None
    except asyncio.CancelledError:
        terminal.say(f"unisono: batch {options.batch_id} goes on; {command} begins again")
        raise
    finally:
        display.stop()


def _is_of_answer(event: event_pb2.BatchEvent) -> bool:
    return event.HasField("result_part") or (
        event.HasField("result") and event.result.state == event_pb2.ITEM_STATE_COMPLETED
    )


async def _listed(
    connection: Connection, batch_id: str, states: tuple[event_pb2.ItemState.ValueType, ...]
) -> AsyncGenerator[event_pb2.BatchEvent, None]:
    """Results so far, each behind its parts. Raises StopError."""
    token = ""
    while True:
        request = rpc.ListResultsRequest(
            batch_id=batch_id, page_size=_RESULTS_A_PAGE, page_token=token, states=states
        )
        page = await ask(connection, connection.stub.ListResults(request, timeout=PATIENCE_S))
        for event in page.events:
            yield event
        token = page.next_page_token
        if not token:
            return


async def _forms(connection: Connection, batch: kept_pb2.KeptBatch) -> Callable[[event_pb2.Result], Form]:
    """How the line of each item was written. Raises StopError.

    A batch that tries again what failed of another has its words, but its items in other places: they are found by
    their ids among the failed ones of the other. Where that one is deleted, their results are plain.
    """
    forms = Forms.read(batch.metadata.get(FORMS_KEY, ""))
    if forms.is_one or not batch.parent_batch_id:
        return lambda result: forms.at(result.index)
    request = rpc.GetBatchRequest(batch_id=batch.parent_batch_id)
    try:
        parent = (await connection.stub.GetBatch(request, timeout=PATIENCE_S)).batch
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise stop_for_kept(error, connection.target) from None
        return lambda _: Form.PLAIN
    form_there = await _forms(connection, parent)
    found = {
        event.result.item_id: form_there(event.result)
        async for event in _listed(connection, parent.batch_id, UNANSWERED)
    }
    return lambda result: found.get(result.item_id, Form.PLAIN)
