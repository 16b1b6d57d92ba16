"""OpenAI's Files and Batches: parse, ask the application, convert, answer. No decisions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, BinaryIO, Final
from urllib.parse import quote

from starlette.responses import Response

from unisono.edge.rest import objects, requests
from unisono.edge.rest.errors import RefusedError, error_body
from unisono.edge.rest.routes import TRACE_HEADERS, Table, json_answer, no_route, whole_body
from unisono.edge.rest.upload import receive

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from unisono.app.file_batches import FileBatches
    from unisono.core.files import StoredFile
    from unisono.edge.rest.views import BatchViews

_FILES_PAGE: Final = 10_000
_BATCHES_PAGE, _MAX_BATCHES_PAGE = 20, 100
# Bytes of a file that are sent at one time.
_SENT_BYTES: Final = 256 * 1024


class OpenAIRoutes:
    """What is answered to which request."""

    def __init__(self, views: BatchViews) -> None:
        self._views = views

    def table(self) -> Table:
        """The paths, and what is done there."""
        return Table(
            prefix="/v1/",
            error_body=error_body,
            no_route=no_route,
            routes=(
                ("/v1/files", "POST", self._upload),
                ("/v1/files", "GET", self._list_files),
                ("/v1/files/{file_id}", "GET", self._get_file),
                ("/v1/files/{file_id}", "DELETE", self._delete_file),
                ("/v1/files/{file_id}/content", "GET", self._get_content),
                ("/v1/batches", "POST", self._create_batch),
                ("/v1/batches", "GET", self._list_batches),
                ("/v1/batches/{batch_id}", "GET", self._get_batch),
                ("/v1/batches/{batch_id}/cancel", "POST", self._cancel_batch),
            ),
        )

    # -- Files -------------------------------------------------------------------------------------------------

    async def _upload(self, request: Request) -> Response:
        kept = self._kept
        upload = await receive(request.headers.get("content-type", ""), request.stream(), kept.files)
        try:
            purpose = requests.purpose(upload.fields)
            keep_s = requests.keep_s(upload.fields)
            file = await kept.keep(upload.draft, purpose=purpose, filename=upload.filename, keep_s=keep_s)
        finally:
            await upload.draft.discard()
        return json_answer(objects.file_object(file))

    async def _list_files(self, request: Request) -> Response:
        query = request.query_params
        limit = requests.whole_limit(query, default=_FILES_PAGE, most=_FILES_PAGE)
        found = await self._kept.files.page(
            after=requests.single(query, "after"),
            # One more than asked for tells whether there is another page.
            limit=limit + 1,
            purpose=requests.single(query, "purpose"),
            is_oldest_first=requests.is_oldest_first(query),
        )
        if found is None:
            raise _no_cursor("File")
        data = [objects.file_object(file) for file in found[:limit]]
        return json_answer(objects.list_object(data, has_more=len(found) > limit))

    async def _get_file(self, request: Request) -> Response:
        return json_answer(objects.file_object(await self._file(request)))

    async def _delete_file(self, request: Request) -> Response:
        file = await self._file(request)
        _ = await self._kept.files.delete(file.file_id)
        return json_answer({"id": file.file_id, "object": "file", "deleted": True})

    async def _get_content(self, request: Request) -> Response:
        file = await self._file(request)
        stream = await self._kept.files.open(file.file_id)
        if stream is None:
            raise _no_file(file.file_id)
        return _Content(stream, file)

    async def _file(self, request: Request) -> StoredFile:
        file_id: str = request.path_params["file_id"]
        file = await self._kept.files.find(file_id)
        if file is None:
            raise _no_file(file_id)
        return file

    # -- Batches -----------------------------------------------------------------------------------------------

    async def _create_batch(self, request: Request) -> Response:
        asked = requests.read_batch(await whole_body(request, requests.MAX_BODY_BYTES))
        file = await self._kept.files.find(asked.input_file_id)
        if file is None:
            what = f"No such File object: {asked.input_file_id[:80]}"
            raise RefusedError(400, what, param="input_file_id", code="invalid_value")
        if file.purpose != "batch":
            what = f"The file {file.file_id} has the purpose {file.purpose}; a batch is made of one with batch."
            raise RefusedError(400, what, param="input_file_id", code="invalid_value")
        batch = await self._kept.create(
            input_file_id=file.file_id,
            endpoint=asked.endpoint,
            window=asked.window,
            window_s=asked.window_s,
            metadata=asked.metadata,
            output_keep_s=asked.output_keep_s,
            # No more of the headers is kept: they hold the caller's key.
            carrier={name: request.headers[name] for name in TRACE_HEADERS if name in request.headers},
        )
        return json_answer(objects.batch_object(batch, None))

    async def _list_batches(self, request: Request) -> Response:
        query = request.query_params
        limit = requests.whole_limit(query, default=_BATCHES_PAGE, most=_MAX_BATCHES_PAGE)
        found = await self._kept.files.page_batches(after=requests.single(query, "after"), limit=limit + 1)
        if found is None:
            raise _no_cursor("Batch")
        kept = self._kept
        data = [
            objects.batch_object(batch, await kept.standing(batch), model=await kept.model(batch))
            for batch in found[:limit]
        ]
        return json_answer(objects.list_object(data, has_more=len(found) > limit))

    async def _get_batch(self, request: Request) -> Response:
        return json_answer(self._views.object_of(*await self._views.get(request.path_params["batch_id"])))

    async def _cancel_batch(self, request: Request) -> Response:
        batch, _ = await self._views.get(request.path_params["batch_id"])
        if batch.is_over:
            raise RefusedError(409, f"Cannot cancel a batch with status '{batch.state.value}'.")
        await self._views.cancel(batch)
        return json_answer(self._views.object_of(*await self._views.get(batch.batch_id)))

    @property
    def _kept(self) -> FileBatches:
        return self._views.files


def _no_file(file_id: str) -> RefusedError:
    return RefusedError(404, f"No such File object: {file_id[:80]}", param="id")


def _no_cursor(kind: str) -> RefusedError:
    return RefusedError(400, f"No such {kind} object: after names none that is kept.", param="after")


class _Content(Response):
    """A file's bytes, a piece at a time."""

    def __init__(self, stream: BinaryIO, file: StoredFile) -> None:
        self._stream = stream
        self.status_code = 200
        self.background = None
        name = quote(file.filename, safe="", errors="replace")
        self.init_headers(
            {
                "content-type": "application/octet-stream",
                "content-length": str(file.size_bytes),
                "content-disposition": f"attachment; filename*=utf-8''{name}",
                # Whatever it holds, a browser must not take it for a page.
                "x-content-type-options": "nosniff",
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            headers: Any = self.raw_headers
            await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
            is_head = scope["method"] == "HEAD"
            while not is_head and (piece := await asyncio.to_thread(self._stream.read, _SENT_BYTES)):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await asyncio.to_thread(self._stream.close)
