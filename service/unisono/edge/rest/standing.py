"""How the service is, for whoever watches over it: whether it lives, and whether it takes work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import Response

from unisono.edge.rest.errors import RefusedError, error_body
from unisono.edge.rest.openapi import document
from unisono.edge.rest.routes import Table, json_answer, no_route

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request


class StandingRoutes:
    """What is answered to which request."""

    def __init__(
        self, trouble: Callable[[], str], *, figures: Callable[[str], Awaitable[tuple[bytes, str]]] | None = None
    ) -> None:
        """`trouble`: why no work can be taken; empty: it can.

        `figures`: the metrics in a form that is accepted, and its media type; None: nothing is counted.
        """
        self._trouble = trouble
        self._figures = figures

    def table(self) -> Table:
        """The paths, and what is done there."""
        return Table(
            prefix="/",
            error_body=error_body,
            no_route=no_route,
            routes=(
                ("/health", "GET", self._health),
                ("/ready", "GET", self._ready),
                ("/metrics", "GET", self._metrics),
                ("/openapi.json", "GET", self._openapi),
            ),
        )

    async def _health(self, request: Request) -> Response:
        return json_answer({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        trouble = self._trouble()
        if trouble:
            return json_answer(error_body(503, f"The service takes no work: {trouble}."), status=503)
        return json_answer({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        if self._figures is None:
            raise RefusedError(404, "This service counts nothing: it was started without metrics.")
        body, kind = await self._figures(request.headers.get("accept", ""))
        response = Response(body)
        response.headers["content-type"] = kind
        return response

    async def _openapi(self, request: Request) -> Response:
        return json_answer(document())
