"""What OpenAI's batches have here beyond OpenAI: results and events while they run, and another try.

Of every kept batch: those made of files, and those that came by gRPC. What is told is the journal's, in its numbers.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec
from google.protobuf.json_format import MessageToDict
from starlette.responses import Response

from unisono.app.file_lines import joined
from unisono.app.follow import HEARTBEAT_S
from unisono.core.errors import InvalidRequestError, SequenceOutOfRangeError
from unisono.core.events import Journalled, Result, ResultPart
from unisono.edge.contract import convert_out
from unisono.edge.rest import requests
from unisono.edge.rest.errors import error_body
from unisono.edge.rest.routes import TRACE_HEADERS, Table, json_answer, no_route, whole_body
from unisono.edge.rest.streamed import StreamedResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from starlette.requests import Request

    from unisono.app.file_lines import LinePlaces
    from unisono.core.durable import StoredBatch
    from unisono.core.files import FileBatch
    from unisono.edge.rest.lines import OpenAILines
    from unisono.edge.rest.views import BatchViews

_PAGE, _MAX_PAGE = 100, 1_000
# A page holds no more bytes of lines than about this; it ends with the line that goes beyond.
_PAGE_BYTES: Final = 4 * 1024 * 1024
# How often a batch is looked at whose file is being checked.
_LOOK_S: Final = 0.1
_HEARTBEAT: Final = b": still there\n\n"


class KeptRoutes:
    """What is answered to which request."""

    def __init__(
        self,
        views: BatchViews,
        lines: OpenAILines,
        *,
        report_defect: Callable[[str, BaseException], None],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._views = views
        self._lines = lines
        self._report_defect = report_defect
        self._heartbeat_s = heartbeat_s

    def table(self) -> Table:
        """The paths, and what is done there."""
        return Table(
            prefix="/v1/",
            error_body=error_body,
            no_route=no_route,
            routes=(
                ("/v1/batches/{batch_id}/results", "GET", self._results),
                ("/v1/batches/{batch_id}/events", "GET", self._events),
                ("/v1/batches/{batch_id}/retry", "POST", self._retry),
            ),
        )

    # -- Results ---------------------------------------------------------------------------------------------------

    async def _results(self, request: Request) -> Response:
        query = request.query_params
        limit = requests.whole_limit(query, default=_PAGE, most=_MAX_PAGE)
        after = requests.sequence(requests.single(query, "after"), "after")
        batch, stored = await self._views.get(request.path_params["batch_id"])
        data: list[msgspec.Raw] = []
        has_more = False
        if stored is None:
            _require_none_yet(batch, after)
        else:
            self._views.durable.require(stored.batch_id, after)
            data, after, has_more = await self._page(batch, after, limit)
        return json_answer({"object": "list", "data": data, "has_more": has_more, "last_sequence": after})

    async def _page(self, batch: FileBatch, after: int, limit: int) -> tuple[list[msgspec.Raw], int, bool]:
        """Up to so many lines, the number of the last result, and whether there are more."""
        data: list[msgspec.Raw] = []
        room = _PAGE_BYTES
        parts: list[ResultPart] = []
        place = after
        async with self._asked(batch) as asked:
            # A read may give fewer than were asked for, where they are large.
            while found := await self._views.durable.results(
                batch.batch_id, after=place, limit=limit - len(data) + 1
            ):
                for entry in found:
                    place = entry.sequence
                    if isinstance(entry.event, ResultPart):
                        parts.append(entry.event)
                    elif isinstance(entry.event, Result):
                        if len(data) == limit or room <= 0:
                            return data, after, True
                        line = await self._line(batch, entry, joined(parts, entry.event), asked)
                        written = msgspec.json.encode(line)
                        parts = []
                        data.append(msgspec.Raw(written))
                        room -= len(written)
                        after = entry.sequence
        return data, after, False

    @asynccontextmanager
    async def _asked(self, batch: FileBatch) -> AsyncGenerator[LinePlaces | None]:
        """The lines of a batch's file, where answers repeat something of them; None where not, or it is gone."""
        asked = await self._views.files.lines(batch) if batch.input_file_id else None
        try:
            yield asked
        finally:
            if asked is not None:
                await asyncio.to_thread(asked.close)

    async def _line(
        self, batch: FileBatch, entry: Journalled, result: Result, asked: LinePlaces | None
    ) -> Mapping[str, object]:
        """A result as a line of an output file, with its number and how the item ended."""
        line = None if asked is None else await asyncio.to_thread(asked.line, result.index)
        value = self._lines.line(batch, result, entry.at_ns, line)
        return value | {"sequence": entry.sequence, "state": result.state.value}

    # -- Events ----------------------------------------------------------------------------------------------------

    async def _events(self, request: Request) -> Response:
        # A browser that lost its connection asks the same address again, and says here what it has.
        last_id = request.headers.get("last-event-id", "")
        asked = requests.single(request.query_params, "after")
        after = requests.sequence(last_id, "Last-Event-ID") if last_id else requests.sequence(asked, "after")
        batch, stored = await self._views.get(request.path_params["batch_id"])
        if stored is None:
            _require_none_yet(batch, after)
        else:
            self._views.durable.require(stored.batch_id, after)
            if stored.is_over and after >= stored.last_sequence:
                # There is nothing, and never will be: a browser asks again after any answer but this one.
                return Response(status_code=204)
        return StreamedResponse(
            self._written(batch, stored, after),
            media_type="text/event-stream; charset=utf-8",
            report_defect=self._report_defect,
        )

    async def _written(self, batch: FileBatch, stored: StoredBatch | None, after: int) -> AsyncGenerator[bytes]:
        """All events after a number, each with its own for an id, to the batch's end."""
        waited_s = 0.0
        while stored is None:
            batch, stored = await self._views.get(batch.batch_id)
            if stored is None and batch.is_over:
                # Its file was no batch, or it was cancelled before: there are no events, and this has no number.
                yield _event("batch", self._views.object_of(batch, None), None)
                return
            if stored is None:
                await asyncio.sleep(_LOOK_S)
                waited_s += _LOOK_S
                if waited_s >= self._heartbeat_s:
                    yield _HEARTBEAT
                    waited_s = 0.0
        parts: list[ResultPart] = []
        durable = self._views.durable
        async with (
            self._asked(batch) as asked,
            aclosing(durable.follow(batch.batch_id, after=after, heartbeat_s=self._heartbeat_s)) as events,
        ):
            async for event in events:
                if not isinstance(event, Journalled):
                    yield _HEARTBEAT
                elif isinstance(event.event, ResultPart):
                    parts.append(event.event)
                elif isinstance(event.event, Result):
                    if len(parts) < event.event.parts:
                        parts = await self._parts(batch.batch_id, event.sequence, event.event)
                    line = await self._line(batch, event, joined(parts, event.event), asked)
                    parts = []
                    yield _event("result", line, event.sequence)
                else:
                    yield _of_contract(event)

    async def _parts(self, batch_id: str, sequence: int, result: Result) -> list[ResultPart]:
        """The parts of a result, the event of that number, of which a reader has asked for the last ones only."""
        before = sequence - result.parts - 1
        found = await self._views.durable.results(batch_id, after=before, limit=1)
        return [each.event for each in found if isinstance(each.event, ResultPart)]

    # -- Another try -----------------------------------------------------------------------------------------------

    async def _retry(self, request: Request) -> Response:
        request_id = requests.read_retry(await whole_body(request, requests.MAX_BODY_BYTES))
        batch, stored = await self._views.get(request.path_params["batch_id"])
        if stored is None and batch.is_over:
            raise InvalidRequestError(f"batch {batch.batch_id} ended before any item ran: nothing can be tried again")
        child = await self._views.retry(
            batch,
            request_id=request_id,
            method="POST /v1/batches/{batch_id}/retry",
            carrier={name: request.headers[name] for name in TRACE_HEADERS if name in request.headers},
        )
        return json_answer(self._views.object_of(*await self._views.get(child)))


def _require_none_yet(batch: FileBatch, after: int) -> None:
    """Raises SequenceOutOfRangeError where events are asked for of a batch that has none."""
    if after:
        raise SequenceOutOfRangeError(
            f"batch {batch.batch_id} has no event {after} yet", metadata={"batch_id": batch.batch_id, "last": "0"}
        )


def _of_contract(entry: Journalled) -> bytes:
    """An event that is no result, in the contract's own JSON."""
    message = convert_out.batch_event(entry, entry.at_ns)
    kind = message.WhichOneof("event") or ""
    value = MessageToDict(message, preserving_proto_field_name=True)
    value["sequence"] = entry.sequence
    return _event(kind, value, entry.sequence)


def _event(kind: str, value: Mapping[str, object], number: int | None) -> bytes:
    """One event as a stream of server-sent events has it; JSON is one line."""
    head = b"" if number is None else b"id: %d\n" % number
    return head + b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"
