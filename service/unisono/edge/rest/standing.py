"""How the service is, for whoever watches over it: whether it lives, and whether it takes work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono.edge.rest.errors import error_body
from unisono.edge.rest.routes import Table, json_answer, no_route

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.responses import Response


class StandingRoutes:
    """What is answered to which request."""

    def __init__(self, trouble: Callable[[], str]) -> None:
        """`trouble`: why no work can be taken; empty: it can."""
        self._trouble = trouble

    def table(self) -> Table:
        """The paths, and what is done there."""
        return Table(
            prefix="/",
            error_body=error_body,
            no_route=no_route,
            routes=(("/health", "GET", self._health), ("/ready", "GET", self._ready)),
        )

    async def _health(self, request: Request) -> Response:
        return json_answer({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        trouble = self._trouble()
        if trouble:
            return json_answer(error_body(503, f"The service takes no work: {trouble}."), status=503)
        return json_answer({"status": "ready"})
