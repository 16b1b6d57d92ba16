"""A drop-in Ollama: what tells of models and runners is passed on; what changes the server is refused, or allowed.

With one backend an answer is that backend's, as it is. With several, lists (`/api/tags`, `/api/ps`, `/v1/models`) are
put together, entry by entry as they came: of one name, the first backend's in the order of the configuration. What is
about one model goes to the backend that has it, and everything else to the first that answers.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.responses import Response

from unisono.core.errors import LimitExceededError, UnisonoError
from unisono.edge.rest import relayed
from unisono.edge.rest.errors import RefusedError, error_body
from unisono.edge.rest.ollama import ollama_error, ollama_no_route, speakers
from unisono.edge.rest.routes import Table, no_route

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Collection

    from starlette.requests import Request

    from unisono.app.forward import Forwarder, Passage
    from unisono.app.ports import PlainAnswer
    from unisono.core.model import Forwarded

# What may be allowed, each with its paths and methods.
PATHS: Final = {
    "pull": (("/api/pull", "POST"),),
    "create": (("/api/create", "POST"),),
    "push": (("/api/push", "POST"),),
    "copy": (("/api/copy", "POST"),),
    "delete": (("/api/delete", "DELETE"),),
    "blobs": (("/api/blobs/{digest}", "POST"), ("/api/blobs/{digest}", "HEAD")),
}
# A list of a backend, as it is put together with others'.
_LONGEST_LIST: Final = 32 * 1024 * 1024
_OK: Final = 200
# The field of a list that holds its entries, and those of an entry that name it.
_FIELDS: Final = {"/api/tags": "models", "/api/ps": "models", "/v1/models": "data"}


class _Entry(msgspec.Struct):
    name: str = ""
    model: str = ""
    id: str = ""


class _Named(msgspec.Struct):
    """A request about one model."""

    model: str = ""
    name: str = ""
    source: str = ""


class PassedRoutes:
    """Everything of Ollama's API but requests for answers."""

    def __init__(self, forwarder: Forwarder, *, allowed: Collection[str]) -> None:
        """`allowed`: what may change the server, of the names in PATHS."""
        self._forwarder = forwarder
        self._allowed = allowed

    def tables(self) -> list[Table]:
        """The paths, and what is done there."""
        changes = [(path, method, self._change(name)) for name, routes in PATHS.items() for path, method in routes]
        lists = [("/api/tags", "GET", self._list), ("/api/ps", "GET", self._list)]
        own = [("/", "GET", self._pass), ("/api/version", "GET", self._pass), ("/api/show", "POST", self._show)]
        shared = [("/v1/models", "GET", self._list), ("/v1/models/{model:path}", "GET", self._of_model)]
        return [
            Table(
                prefix="/api/",
                error_body=ollama_error,
                no_route=ollama_no_route,
                routes=[*own, *lists, *changes],
            ),
            Table(prefix="/v1/", error_body=error_body, no_route=no_route, routes=shared),
        ]

    # -- What tells --------------------------------------------------------------------------------------------

    async def _pass(self, request: Request) -> Response:
        return await self._passed(request, lambda passage, sent: passage.plainly(sent, among=self._among(request)))

    async def _of_model(self, request: Request) -> Response:
        model: str = request.path_params["model"]
        return await self._passed(
            request, lambda passage, sent: passage.plainly(sent, model=model, among=self._among(request))
        )

    async def _show(self, request: Request) -> Response:
        among = self._among(request)
        passage = relayed.enter(self._forwarder)
        try:
            body = await relayed.read_body(request, passage, self._forwarder.limits.most_body_bytes)
        except BaseException:
            await passage.close()
            raise
        sent = relayed.forwarded(request, body)
        return await relayed.relayed(request, passage, passage.plainly(sent, model=_model_of(body), among=among))

    async def _list(self, request: Request) -> Response:
        among = self._among(request)
        if len(among) == 1 or request.method != "GET":
            return await self._pass(request)
        sent = relayed.forwarded(request)
        answers = await asyncio.gather(*(self._ask(name, sent) for name in among), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, UnisonoError):
                raise answer
        found = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not found:
            # Nobody answers: by the first one's word.
            return await self._pass(request)
        good = [body for status, _, body in found if status == _OK]
        status, headers, body = next((one for one in found if one[0] == _OK), found[0])
        if status == _OK:
            body = _merged(good, _FIELDS[request.url.path])
        response = Response(body, status_code=status)
        kept = relayed.end_to_end(headers, drop=frozenset((b"date", b"content-length")))
        response.raw_headers = [*kept, (b"content-length", b"%d" % len(body))]
        return response

    async def _ask(self, name: str, sent: Forwarded) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        passage = relayed.enter(self._forwarder)
        try:
            answer = await passage.plainly(sent, among=(name,))
            body = bytearray()
            async for chunk in answer.chunks():
                body += chunk
                if len(body) > _LONGEST_LIST:
                    raise LimitExceededError(f"backend {name}: a list of more than {_LONGEST_LIST:,} bytes")
            return answer.status, list(answer.headers), bytes(body)
        finally:
            await passage.close()

    # -- What changes the server -------------------------------------------------------------------------------

    def _change(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        async def refuse(request: Request) -> Response:
            raise RefusedError(
                403,
                f"{request.method} {request.url.path[:200]} would change the server behind this service, and is not "
                f"allowed: ask it directly, or start the service with UNISONO_ALLOW={name}",
            )

        if name not in self._allowed:
            return refuse
        return self._pass_blob if name == "blobs" else self._show

    async def _pass_blob(self, request: Request) -> Response:
        """A file of any size, which goes on as it comes; to the first backend, as does what is made of it."""
        among = self._among(request)
        if request.method == "HEAD":
            return await self._pass(request)
        passage = relayed.enter(self._forwarder)
        sent = relayed.forwarded(request, keeps_length=True)
        stream: AsyncGenerator[bytes, None] = request.stream()
        try:
            answer = await passage.plainly(sent, among=among, body=stream)
        except BaseException:
            await passage.close()
            raise

        async def answered() -> PlainAnswer:
            return answer

        return await relayed.relayed(request, passage, answered())

    # -- Small things ------------------------------------------------------------------------------------------

    def _among(self, request: Request) -> tuple[str, ...]:
        return speakers(self._forwarder, request)

    async def _passed(
        self, request: Request, ask: Callable[[Passage, Forwarded], Awaitable[PlainAnswer]]
    ) -> Response:
        _ = self._among(request)
        passage = relayed.enter(self._forwarder)
        return await relayed.relayed(request, passage, ask(passage, relayed.forwarded(request)))


def _model_of(body: bytes) -> str:
    """The model that a request is about; empty where it cannot be read."""
    try:
        named = msgspec.json.decode(body, type=_Named)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return named.model or named.name or named.source


def _merged(bodies: list[bytes], field: str) -> bytes:
    """One list of several: the first one's other fields, and all entries, of each name the first."""
    whole: dict[str, msgspec.Raw] = {}
    entries: dict[str, msgspec.Raw] = {}
    for body in bodies:
        try:
            read = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
            for entry in msgspec.json.decode(read.get(field, b"[]"), type=list[msgspec.Raw] | None) or ():
                named = msgspec.json.decode(entry, type=_Entry)
                _ = entries.setdefault(named.name or named.model or named.id, entry)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # Whatever it is, it is no list of models.
            continue
        whole = whole or read
    return msgspec.json.encode({**whole, field: list(entries.values())})
