"""A drop-in Ollama: requests for answers, in its own API and in OpenAI's, that go through the window as they came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from starlette.responses import Response

from unisono.core.errors import LimitExceededError
from unisono.edge.rest import relayed
from unisono.edge.rest.errors import RefusedError, error_body
from unisono.edge.rest.routes import Table, no_route
from unisono.edge.rest.understood import PATHS, understand
from unisono.edge.status import utf8

if TYPE_CHECKING:
    from starlette.requests import Request

    from unisono.app.forward import Forwarder, Passage, Tap
    from unisono.app.ports import PlainAnswer

_NO_OLLAMA: Final = 501


class InferenceRoutes:
    """Requests for answers."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    def tables(self) -> list[Table]:
        """The paths of both APIs."""
        own = [path for path in PATHS if path.startswith("/api/")]
        others = [path for path in PATHS if path.startswith("/v1/")]
        return [
            Table(
                prefix="/api/",
                error_body=ollama_error,
                no_route=ollama_no_route,
                routes=[(path, "POST", self._infer) for path in own],
            ),
            Table(
                prefix="/v1/",
                error_body=error_body,
                no_route=no_route,
                routes=[(path, "POST", self._infer) for path in others],
            ),
        ]

    async def _infer(self, request: Request) -> Response:
        among = speakers(self._forwarder, request)
        passage = relayed.enter(self._forwarder)
        try:
            body = await relayed.read_body(request, passage, self._forwarder.limits.most_body_bytes)
        except BaseException:
            await passage.close()
            raise
        return await relayed.relayed(request, passage, self._answer(request, passage, body, among))

    async def _answer(
        self, request: Request, passage: Passage, body: bytes, among: tuple[str, ...]
    ) -> Tap | PlainAnswer:
        path = request.url.path
        sent = relayed.forwarded(request, body)
        item = understand(path, sent)
        if item is None:
            return await passage.plainly(sent, among=among)
        carrier = {name: value for name, value in request.headers.items() if name in ("traceparent", "tracestate")}
        try:
            return await passage.infer(item, among=among, method=f"POST {path}", carrier=carrier)
        except LimitExceededError as error:
            raise relayed.busy(error) from error


def speakers(forwarder: Forwarder, request: Request) -> tuple[str, ...]:
    """The backends that speak the API that is asked. Raises RefusedError where none does."""
    is_ollamas = not request.url.path.startswith("/v1/")
    among = forwarder.among(speaks_ollama=is_ollamas)
    if not among:
        raise RefusedError(
            _NO_OLLAMA,
            f"{request.url.path} is of Ollama's API, and no backend of this service is an Ollama: "
            "a llama.cpp server speaks OpenAI's, under /v1",
        )
    return among


def ollama_error(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    """An error as Ollama writes it."""
    del status, param, code
    return {"error": utf8(message)}


def ollama_no_route(request: Request, status: int) -> Response:
    """What Ollama answers to a path (404) or a method (405) that is none."""
    text = "405 method not allowed" if status == 405 else "404 page not found"
    return Response(text, status_code=status, headers={"content-type": "text/plain"})
