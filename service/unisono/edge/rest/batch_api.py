"""Ollama's requests by the batch: `/api/batch/chat`, `/api/batch/generate`, `/api/batch/status`.

Inside, one ordinary batch, as RunBatch runs it: what is wrong with a request costs that one alone, and the batch ends
when its caller goes away.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from unisono.app.file_lines import joined
from unisono.app.follow import follow
from unisono.core.errors import InternalError, LimitExceededError
from unisono.core.events import Journalled, Result, ResultPart, Summary
from unisono.edge.batchfile.body import Kind
from unisono.edge.rest import batch_requests
from unisono.edge.rest.ollama_answers import (
    chat_answer,
    error_body,
    generate_answer,
    moment,
    nanoseconds,
    no_route,
)
from unisono.edge.rest.routes import TRACE_HEADERS, Table, json_answer, whole_body
from unisono.edge.rest.streamed import StreamedResponse, while_there
from unisono.edge.status import utf8

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from starlette.requests import Request
    from starlette.responses import Response

    from unisono.app.batches import Batches
    from unisono.app.ports import Clock
    from unisono.app.run_batch import RunningBatch
    from unisono.core.report import Report
    from unisono.edge.rest.batch_requests import BatchRequest

_ANSWERS: Final = {Kind.CHAT: chat_answer, Kind.GENERATE: generate_answer}
_IDS: Final = "x-batch-id"
# Larger bodies are read on a thread.
_SMALL_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowFacts:
    """What is set for requests of single callers."""

    is_enabled: bool
    # None: as many as the runner has slots.
    size: int | None
    window_s: float


class BatchRoutes:
    """What is answered to which request."""

    def __init__(
        self,
        batches: Batches,
        clock: Clock,
        *,
        window: WindowFacts,
        pending: Callable[[], int],
        report_defect: Callable[[str, BaseException], None],
    ) -> None:
        """`pending`: batches of all kinds that have not ended."""
        self._batches = batches
        self._clock = clock
        self._window = window
        self._pending = pending
        self._report_defect = report_defect

    def table(self) -> Table:
        """The paths, and what is done there."""
        return Table(
            prefix="/api/",
            error_body=error_body,
            no_route=no_route,
            routes=(
                ("/api/batch/chat", "POST", partial(self._run, Kind.CHAT)),
                ("/api/batch/generate", "POST", partial(self._run, Kind.GENERATE)),
                ("/api/batch/status", "GET", self._status),
            ),
        )

    async def _status(self, request: Request) -> Response:
        window = self._window
        return json_answer(
            {
                "batch_enabled": window.is_enabled,
                "max_batch_size": window.size,
                "batch_timeout": f"{window.window_s * 1e3:g}ms",
                "pending_batches": self._pending(),
                "processed_batches": self._batches.processed,
            }
        )

    async def _run(self, kind: Kind, request: Request) -> Response:
        body = await whole_body(request, batch_requests.MAX_BODY_BYTES)
        read = partial(batch_requests.read, body, kind, self._batches.limits)
        asked = read() if len(body) <= _SMALL_BYTES else await asyncio.to_thread(read)
        del body, read
        checked = await self._batches.check(asked.items, asked.config, path="requests[{}]")
        asked.items.clear()
        batch, _ = self._batches.open(
            asked.config,
            method=f"{request.method} {request.url.path}",
            carrier={name: request.headers[name] for name in TRACE_HEADERS if name in request.headers},
            item_count=len(checked),
        )
        batch.callers.join()
        batch.run_whole(checked)
        del checked
        answers = _Answers(kind, asked, self._clock)
        if asked.is_streamed:
            return StreamedResponse(
                _streamed(batch, answers),
                media_type="application/x-ndjson",
                report_defect=self._report_defect,
                on_end=batch.callers.lose,
                headers={_IDS: batch.batch_id},
            )
        most_bytes = self._batches.limits.max_journal_bytes
        try:
            whole = await while_there(_whole(batch, answers, most_bytes), request.receive)
        finally:
            batch.callers.lose()
        response = json_answer(whole)
        response.headers[_IDS] = batch.batch_id
        return response


class _Answers:
    """The batch's events as answers."""

    def __init__(self, kind: Kind, asked: BatchRequest, clock: Clock) -> None:
        self.clock = clock
        self._write = _ANSWERS[kind]
        self._names = asked.names
        self._parts: list[ResultPart] = []

    def of(self, entry: Journalled) -> tuple[int, bytes] | None:
        """The answer to a request, and its place; None: the event is none."""
        if isinstance(entry.event, ResultPart):
            self._parts.append(entry.event)
        if not isinstance(entry.event, Result):
            return None
        result = joined(self._parts, entry.event)
        self._parts = []
        value: dict[str, object] = {"index": result.index}
        if (name := self._names[result.index]) is not None:
            value["id"] = name
        if result.completion is not None:
            value |= self._write(result, result.completion, entry.at_ns)
        else:
            error = result.error or InternalError("the request ended without an answer")
            value |= {"error": utf8(error.message), "reason": error.reason}
        return result.index, msgspec.json.encode(value)

    def end(self, batch: RunningBatch, report: Report, at_ns: int) -> dict[str, object]:
        """What is said of the whole."""
        return {"batch_id": batch.batch_id, "processed_at": moment(at_ns), "stats": stats(report, len(self._names))}


def stats(report: Report, size: int) -> Mapping[str, object]:
    """A batch's figures: each was measured, or is absent.

    `processing_time`: nanoseconds, like all of Ollama's durations. `memory_efficiency`: the largest share of the
    context that is reserved for all slots which was in use at one time. `throughput_gain`: how long the answers would
    have taken one at a time ÷ how long they took, where the speed of one alone was measured.
    """
    value: dict[str, object] = {"batch_size": size, "processing_time": nanoseconds(report.duration_s)}
    used = [group.context_used for group in report.groups if group.context_used is not None]
    if used:
        value["memory_efficiency"] = round(max(used), 6)
    gain = _gain(report)
    if gain is not None:
        value["throughput_gain"] = round(gain, 6)
    return value


def _gain(report: Report) -> float | None:
    if len(report.groups) == 1:
        return report.groups[0].gain
    # Groups may have run side by side, or after each other.
    alone = [group.one_at_a_time_s for group in report.groups]
    known = [seconds for seconds in alone if seconds is not None]
    if not known or len(known) < len(alone) or not report.duration_s:
        return None
    return sum(known) / report.duration_s


async def _events(batch: RunningBatch, clock: Clock) -> AsyncGenerator[Journalled]:
    async with aclosing(follow(batch, clock)) as events:
        async for event in events:
            if isinstance(event, Journalled):
                yield event


async def _streamed(batch: RunningBatch, answers: _Answers) -> AsyncGenerator[bytes]:
    """A line for each answer, as it is there; and one for the whole."""
    async with aclosing(_events(batch, answers.clock)) as events:
        async for entry in events:
            if (found := answers.of(entry)) is not None:
                yield found[1] + b"\n"
            elif isinstance(entry.event, Summary):
                yield msgspec.json.encode(answers.end(batch, entry.event.report, entry.at_ns)) + b"\n"


async def _whole(batch: RunningBatch, answers: _Answers, most_bytes: int) -> Mapping[str, object]:
    """All answers, in the order of their requests. Raises LimitExceededError where they are too many to be kept."""
    written: dict[int, bytes] = {}
    size = 0
    async with aclosing(_events(batch, answers.clock)) as events:
        async for entry in events:
            if (found := answers.of(entry)) is not None:
                written[found[0]] = found[1]
                size += len(found[1])
                if size > most_bytes:
                    raise LimitExceededError(
                        f"the answers have more than {most_bytes:,} bytes together: ask with stream: true",
                        metadata={"limit": "max_journal_bytes"},
                    )
            elif isinstance(entry.event, Summary):
                end = answers.end(batch, entry.event.report, entry.at_ns)
                return end | {"responses": [msgspec.Raw(written[index]) for index in sorted(written)]}
    raise InternalError("the batch ended without a summary")
