"""The guard before the application: refusals in the shape of the path's API, and what browsers ask beforehand."""

from __future__ import annotations

import secrets
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from unisono.edge.rest.connections import MOST_HEAD_BYTES
from unisono.edge.rest.routes import json_answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from unisono.edge.rest.errors import ErrorBody
    from unisono.edge.rest.guard import Guard

# What a page may do, and see of an answer, beside what every page may.
_METHODS: Final = "GET, HEAD, POST, DELETE, OPTIONS"
_SEEN: Final = "x-request-id, x-batch-id, retry-after"
# How long a browser may remember what it was told, in seconds.
_REMEMBERED_S: Final = 600
_SHOWN: Final = 200
_TOO_LARGE: Final = 431


class Guarded:
    """An application that only those may ask who may."""

    def __init__(self, app: ASGIApp, guard: Guard, error_body_of: Callable[[str], ErrorBody]) -> None:
        """`error_body_of`: how the API of a path writes errors."""
        self._app = app
        self._guard = guard
        self._error_body_of = error_body_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or refuses."""
        headers = Headers(scope=scope)
        # More than one is what a request is made of that wants to be two things at once.
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host = hosts[0] if hosts else ""
        if _head_bytes(scope) > MOST_HEAD_BYTES:
            # Only what comes in pieces is refused by the parser.
            what = f"The request's line and headers have more than {MOST_HEAD_BYTES:,} bytes."
            await self._refused(scope, what, "head_too_large", _TOO_LARGE)(scope, receive, send)
        elif len(hosts) > 1 or not self._guard.takes_host(host):
            what = (
                f"This service is not asked by the name {host[:_SHOWN]!r}. Use localhost or an address, or set "
                "UNISONO_HTTP_HOSTS to the names that it has."
            )
            await self._refused(scope, what, "host_not_allowed")(scope, receive, send)
        elif not origins:
            await self._app(scope, receive, send)
        elif len(origins) > 1 or not self._guard.takes_origin(origins[0], host):
            what = (
                f"Pages of {origins[0][:_SHOWN]!r} may not ask this service. Set UNISONO_HTTP_ORIGINS to those that "
                "may."
            )
            await self._refused(scope, what, "origin_not_allowed")(scope, receive, send)
        elif scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _allowed(headers)(scope, receive, send)
        else:
            await self._app(scope, receive, _telling(send, origins[0]))

    def _refused(self, scope: Scope, what: str, code: str, status: int = HTTPStatus.FORBIDDEN) -> Response:
        body = self._error_body_of(scope["path"])(status, what, code=code)
        response = json_answer(body, status=status)
        response.headers["x-request-id"] = f"req_{secrets.token_hex(16)}"
        return response


def _head_bytes(scope: Scope) -> int:
    """Of a request's line and headers, nearly."""
    line = len(scope["raw_path"]) + len(scope["query_string"])
    return line + sum(len(name) + len(value) + 4 for name, value in scope["headers"])


def _allowed(headers: Headers) -> Response:
    """The answer to a browser that asks whether a page may ask."""
    response = Response(status_code=HTTPStatus.NO_CONTENT)
    response.headers["access-control-allow-origin"] = headers["origin"]
    response.headers["access-control-allow-methods"] = _METHODS
    response.headers["access-control-max-age"] = str(_REMEMBERED_S)
    if wanted := headers.get("access-control-request-headers"):
        response.headers["access-control-allow-headers"] = wanted
    if "access-control-request-private-network" in headers:
        response.headers["access-control-allow-private-network"] = "true"
    response.headers["vary"] = "origin"
    return response


def _telling(send: Send, origin: str) -> Send:
    """Adds to an answer that the page may see it."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = _SEEN
            headers.add_vary_header("origin")
        await send(message)

    return told
