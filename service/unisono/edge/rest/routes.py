"""What every door of the HTTP port is made of: paths with their handlers, and the shape of its errors."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.responses import Response

from unisono.edge.rest.errors import RefusedError, error_body

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from starlette.requests import Request

    from unisono.edge.rest.errors import ErrorBody

    Handler = Callable[[Request], Awaitable[Response]]

# Of a request's headers, what a batch keeps: no more, for they hold the caller's key.
TRACE_HEADERS: Final = ("traceparent", "tracestate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The requests that one API answers."""

    # Paths that begin like this are its own, those too that it does not have; the longest that fits counts.
    prefix: str
    # (path, method, handler); HEAD is answered where GET is.
    routes: Sequence[tuple[str, str, Handler]]
    error_body: ErrorBody
    # The answer for a path (404) or a method (405) that is none.
    no_route: Callable[[Request, int], Response]


def json_answer(value: Mapping[str, object], *, status: int = 200) -> Response:
    """An answer that is one JSON object."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def no_route(request: Request, status: int) -> Response:
    """A path or a method that is none, in OpenAI's words."""
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        what, code = f"Not allowed to {request.method} on {request.url.path[:200]}.", "method_not_supported"
    else:
        what, code = f"Invalid URL ({request.method} {request.url.path[:200]})", "unknown_url"
    return json_answer(error_body(status, what, code=code), status=status)


async def whole_body(request: Request, most_bytes: int) -> bytes:
    """The whole body of a request. Raises RefusedError where it is longer."""
    body = bytearray()
    stream: AsyncGenerator[bytes, None] = request.stream()
    async for chunk in stream:
        body += chunk
        if len(body) > most_bytes:
            raise RefusedError(413, f"The body is larger than {most_bytes:,} bytes.")
    return bytes(body)
