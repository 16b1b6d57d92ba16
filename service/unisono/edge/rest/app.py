"""The HTTP port's application: all tables of routes. Every error leaves by here, in its API's own shape."""

from __future__ import annotations

import secrets
from functools import wraps
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from unisono.core.errors import InternalError, UnisonoError
from unisono.edge.rest.errors import RefusedError, headers_of, of_house
from unisono.edge.rest.guard import Guard
from unisono.edge.rest.guarded import Guarded
from unisono.edge.rest.routes import json_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from unisono.edge.rest.errors import ErrorBody
    from unisono.edge.rest.routes import Handler, Table

    ReportDefect = Callable[[str, BaseException], None]


def make_app(tables: Sequence[Table], *, report_defect: ReportDefect, guard: Guard | None = None) -> Starlette:
    """The application that answers what these tables do, to whom the guard lets in."""
    routes = [route for table in tables for route in _routes(table, report_defect)]
    by_prefix = sorted(tables, key=lambda table: len(table.prefix), reverse=True)

    def table_of(path: str) -> Table:
        return next((one for one in by_prefix if path.startswith(one.prefix)), by_prefix[-1])

    async def no_route(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return table_of(request.url.path).no_route(request, status)

    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: no_route},
        middleware=[Middleware(Guarded, guard or Guard(), lambda path: table_of(path).error_body)],
    )
    # A path with a slash too many is another path, for the APIs that are spoken here too.
    app.router.redirect_slashes = False
    return app


def _routes(table: Table, report_defect: ReportDefect) -> list[Route]:
    """One route a path, so that a method that it does not have is told apart from a path that is none."""
    paths: dict[str, dict[str, Handler]] = {}
    for path, method, handler in table.routes:
        paths.setdefault(path, {})[method] = handler
    return [
        Route(path, _answered(handlers, table.error_body, report_defect), methods=list(handlers))
        for path, handlers in paths.items()
    ]


def _answered(handlers: Mapping[str, Handler], error_body: ErrorBody, report_defect: ReportDefect) -> Handler:
    """The handler of a request's method, whose errors become answers."""

    @wraps(next(iter(handlers.values())))
    async def answer(request: Request) -> Response:
        # HEAD is answered where GET is; some paths have a HEAD of their own.
        handler = handlers.get(request.method) or handlers["GET"]
        try:
            response = await handler(request)
        except RefusedError as error:
            body = error_body(error.status, error.message, param=error.param, code=error.code)
            response = json_answer(body, status=error.status)
        except UnisonoError as error:
            response = _of_house(error, error_body)
        except ClientDisconnect:
            # Nobody reads this.
            response = Response(status_code=400)
        except Exception as defect:  # noqa: BLE001 - a defect here costs a request, not the service
            report_defect(f"{request.method} {request.url.path}", defect)
            response = _of_house(InternalError("the service failed; its log says how"), error_body)
        # An answer that is passed on may have one.
        _ = response.headers.setdefault("x-request-id", f"req_{secrets.token_hex(16)}")
        return response

    return answer


def _of_house(error: UnisonoError, error_body: ErrorBody) -> Response:
    status, body = of_house(error, error_body)
    response = json_answer(body, status=status)
    response.headers.update(headers_of(error))
    return response
