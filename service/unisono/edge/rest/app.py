"""The routes of the REST edge: parse, ask the application, convert, answer. No decisions.

Every error leaves through `_answered`, in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import secrets
from functools import wraps
from typing import TYPE_CHECKING, Any, BinaryIO, Final
from urllib.parse import quote

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from unisono.core.errors import InternalError, NothingKeptError, UnisonoError
from unisono.edge.rest import objects, requests
from unisono.edge.rest.errors import RefusedError, error_body, headers_of, of_house
from unisono.edge.rest.upload import receive

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

    from starlette.types import Receive, Scope, Send

    from unisono.app.file_batches import FileBatches
    from unisono.core.durable import StoredBatch
    from unisono.core.files import FileBatch, StoredFile

    _Handler = Callable[[Request], Awaitable[Response]]

_FILES_PAGE: Final = 10_000
_BATCHES_PAGE, _MAX_BATCHES_PAGE = 20, 100
# Bytes of a file that are sent at one time.
_SENT_BYTES: Final = 256 * 1024
_JSON: Final = "application/json"
_TRACE_HEADERS: Final = ("traceparent", "tracestate")


class RestRoutes:
    """What is answered to which request."""

    def __init__(
        self,
        kept: FileBatches | None,
        *,
        trouble: Callable[[], str],
        report_defect: Callable[[str, BaseException], None],
    ) -> None:
        """`kept`: None where the service keeps no batches. `trouble`: why no work can be taken; empty: it can."""
        self._given = kept
        self._trouble = trouble
        self._report_defect = report_defect

    def app(self) -> Starlette:
        """The application."""
        routes = [
            ("/v1/files", "POST", self._upload),
            ("/v1/files", "GET", self._list_files),
            ("/v1/files/{file_id}", "GET", self._get_file),
            ("/v1/files/{file_id}", "DELETE", self._delete_file),
            ("/v1/files/{file_id}/content", "GET", self._get_content),
            ("/v1/batches", "POST", self._create_batch),
            ("/v1/batches", "GET", self._list_batches),
            ("/v1/batches/{batch_id}", "GET", self._get_batch),
            ("/v1/batches/{batch_id}/cancel", "POST", self._cancel_batch),
            ("/health", "GET", self._health),
            ("/ready", "GET", self._ready),
        ]
        # One route a path, so that a method that it does not have is told apart from a path that is none.
        paths: dict[str, dict[str, _Handler]] = {}
        for path, method, handler in routes:
            paths.setdefault(path, {})[method] = handler
        app = Starlette(
            routes=[
                Route(path, self._answered(handlers), methods=list(handlers)) for path, handlers in paths.items()
            ],
            exception_handlers={HTTPException: _no_route},
        )
        # A path with a slash too many is another path, for OpenAI too.
        app.router.redirect_slashes = False
        return app

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
        return _json(objects.file_object(file))

    async def _list_files(self, request: Request) -> Response:
        query = request.query_params
        limit = requests.whole_limit(query, default=_FILES_PAGE, most=_FILES_PAGE)
        found = await self._kept.files.page(
            after=query.get("after", ""),
            # One more than asked for tells whether there is another page.
            limit=limit + 1,
            purpose=query.get("purpose", ""),
            is_oldest_first=requests.is_oldest_first(query),
        )
        if found is None:
            raise _no_cursor("File")
        data = [objects.file_object(file) for file in found[:limit]]
        return _json(objects.list_object(data, has_more=len(found) > limit))

    async def _get_file(self, request: Request) -> Response:
        return _json(objects.file_object(await self._file(request)))

    async def _delete_file(self, request: Request) -> Response:
        file = await self._file(request)
        _ = await self._kept.files.delete(file.file_id)
        return _json({"id": file.file_id, "object": "file", "deleted": True})

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
        asked = requests.read_batch(await _body(request))
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
            carrier={name: request.headers[name] for name in _TRACE_HEADERS if name in request.headers},
        )
        return _json(objects.batch_object(batch, None))

    async def _list_batches(self, request: Request) -> Response:
        query = request.query_params
        limit = requests.whole_limit(query, default=_BATCHES_PAGE, most=_MAX_BATCHES_PAGE)
        found = await self._kept.files.page_batches(after=query.get("after", ""), limit=limit + 1)
        if found is None:
            raise _no_cursor("Batch")
        data = [objects.batch_object(batch, await self._kept.standing(batch)) for batch in found[:limit]]
        return _json(objects.list_object(data, has_more=len(found) > limit))

    async def _get_batch(self, request: Request) -> Response:
        batch, stored = await self._batch(request)
        return _json(objects.batch_object(batch, stored))

    async def _cancel_batch(self, request: Request) -> Response:
        batch, _ = await self._batch(request)
        if batch.is_over:
            raise RefusedError(409, f"Cannot cancel a batch with status '{batch.state.value}'.")
        await self._kept.cancel(batch)
        batch, stored = await self._batch(request)
        return _json(objects.batch_object(batch, stored))

    async def _batch(self, request: Request) -> tuple[FileBatch, StoredBatch | None]:
        batch_id: str = request.path_params["batch_id"]
        found = await self._kept.get(batch_id)
        if found is None:
            raise RefusedError(404, f"No batch found with id '{batch_id[:80]}'.")
        return found

    # -- How the service is ------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        trouble = self._trouble()
        if trouble:
            return _json(error_body(503, f"The service takes no work: {trouble}."), status=503)
        return _json({"status": "ready"})

    # -- What all requests share -------------------------------------------------------------------------------

    @property
    def _kept(self) -> FileBatches:
        if self._given is None:
            raise NothingKeptError("this service keeps no batches: start it with UNISONO_DATA_DIR not `none`")
        return self._given

    def _answered(self, handlers: Mapping[str, _Handler]) -> _Handler:
        """The handler of a request's method, whose errors become answers."""

        @wraps(next(iter(handlers.values())))
        async def answer(request: Request) -> Response:
            handler = handlers["GET" if request.method == "HEAD" else request.method]
            try:
                response = await handler(request)
            except RefusedError as error:
                response = _json(error.body, status=error.status)
            except UnisonoError as error:
                status, body = of_house(error)
                response = _json(body, status=status)
                response.headers.update(headers_of(error))
            except ClientDisconnect:
                # Nobody reads this.
                response = Response(status_code=400)
            except Exception as defect:  # noqa: BLE001 - a defect here costs a request, not the service
                self._report_defect(f"{request.method} {request.url.path}", defect)
                status, body = of_house(InternalError("the service failed; its log says how"))
                response = _json(body, status=status)
            response.headers["x-request-id"] = f"req_{secrets.token_hex(16)}"
            return response

        return answer


async def _no_route(request: Request, error: Exception) -> Response:
    """A path or a method that is none, in OpenAI's words."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        what, code = f"Not allowed to {request.method} on {request.url.path[:200]}.", "method_not_supported"
        return _json(error_body(status, what, code=code), status=status)
    what, code = f"Invalid URL ({request.method} {request.url.path[:200]})", "unknown_url"
    return _json(error_body(status, what, code=code), status=status)


def _no_file(file_id: str) -> RefusedError:
    return RefusedError(404, f"No such File object: {file_id[:80]}", param="id")


def _no_cursor(kind: str) -> RefusedError:
    return RefusedError(400, f"No such {kind} object: after names none that is kept.", param="after")


def _json(value: Mapping[str, object], *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type=_JSON)


async def _body(request: Request) -> bytes:
    """The whole body of a request that is not a file; raises RefusedError."""
    body = bytearray()
    stream: AsyncGenerator[bytes, None] = request.stream()
    async for chunk in stream:
        body += chunk
        if len(body) > requests.MAX_BODY_BYTES:
            raise RefusedError(413, f"The body is larger than {requests.MAX_BODY_BYTES:,} bytes.")
    return bytes(body)


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
