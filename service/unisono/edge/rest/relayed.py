"""A forwarded request at the HTTP port: its headers, the answer that is passed on, and a caller that leaves.

Headers go on in both directions but for those that concern one connection. Ours in their place are Host,
Content-Length, Connection and, where the backend was configured with a token, Authorization; of the answer, Date,
which the server writes.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from unisono.core.errors import BadAnswerError, ConnectionLostError, LimitExceededError
from unisono.core.model import Forwarded
from unisono.edge.rest.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from unisono.app.forward import Forwarder, Passage, Tap
    from unisono.app.ports import PlainAnswer

    Pairs = Sequence[tuple[bytes, bytes]]

# RFC 9110, 7.6.1, and what is written like them.
_OF_ONE_CONNECTION: Final = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    )
)
# Said anew for each connection, or answered by this server itself: which pages may ask is judged here (guard.py).
# Without Accept-Encoding an answer comes as it is, so that its figures can be read on the way.
_OUR_OWN: Final = frozenset((b"host", b"content-length", b"expect", b"accept-encoding", b"origin"))
_STATUSES: Final = range(200, 600)
_BUSY_STATUS, _TOO_LARGE_STATUS = 503, 413


def forwarded(request: Request, body: bytes = b"", *, keeps_length: bool = False) -> Forwarded:
    """The request as it came. `keeps_length`: its body is not in memory, and as long as it says."""
    scope = request.scope
    raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    headers = end_to_end(scope["headers"])
    if keeps_length:
        headers += [pair for pair in scope["headers"] if pair[0] == b"content-length"]
    target = raw_path + (b"?" + query if query else b"")
    return Forwarded(method=request.method, target=target.decode("ascii"), headers=tuple(headers), body=body)


def end_to_end(headers: Pairs, *, drop: frozenset[bytes] = _OUR_OWN) -> list[tuple[bytes, bytes]]:
    """Headers without those that concern one connection, by the list or by their own word."""
    named = b",".join(value for name, value in headers if name.lower() == b"connection").lower()
    dropped = _OF_ONE_CONNECTION | drop | {name.strip() for name in named.split(b",")}
    return [(name, value) for name, value in headers if name.lower() not in dropped]


async def read_body(request: Request, passage: Passage, most_bytes: int) -> bytes:
    """The whole body. Raises RefusedError where it is too large, or there are too many others."""
    body = bytearray()
    stream: AsyncGenerator[bytes, None] = request.stream()
    async for chunk in stream:
        try:
            passage.take(len(chunk))
        except LimitExceededError as error:
            raise busy(error) from error
        body += chunk
        if len(body) > most_bytes:
            what = f"the request's body is larger than {most_bytes:,} bytes; UNISONO_MAX_FORWARDED_BYTES is the limit"
            raise RefusedError(_TOO_LARGE_STATUS, what)
    return bytes(body)


def enter(forwarder: Forwarder) -> Passage:
    """A place among the requests under way. Raises RefusedError where there is none."""
    try:
        return forwarder.enter()
    except LimitExceededError as error:
        raise busy(error) from error


def busy(error: LimitExceededError) -> RefusedError:
    """Ollama's status for a full queue."""
    return RefusedError(_BUSY_STATUS, error.message, code="limit_exceeded")


async def relayed(request: Request, passage: Passage, answering: Awaitable[Tap | PlainAnswer]) -> Response:
    """The answer, once it has begun. The passage is closed with it; and at once where the caller leaves."""
    task = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_until_gone(request.receive))
    try:
        _ = await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return Relayed(_begun(task), passage, gone)
    except BaseException:
        _ = task.cancel()
        _ = gone.cancel()
        await passage.close()
        with suppress(asyncio.CancelledError, Exception):
            await task
        raise


def _begun(task: asyncio.Future[Tap | PlainAnswer]) -> Tap | PlainAnswer:
    if not task.done():
        raise ClientDisconnect
    answer = task.result()
    if answer.status not in _STATUSES:
        raise BadAnswerError(f"the backend answered with the status {answer.status}, which is none")
    return answer


async def _until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Relayed(Response):
    """An answer that is passed on, byte for byte as it comes."""

    def __init__(self, answer: Tap | PlainAnswer, passage: Passage, gone: asyncio.Future[None]) -> None:
        self.status_code = answer.status
        self.background = None
        self.raw_headers = end_to_end(answer.headers, drop=frozenset((b"date",)))
        self._answer = answer
        self._passage = passage
        self._gone = gone
        self._closing: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it. Where it is cut, so is what the caller gets: the server closes an answer that was not ended."""
        self._gone.add_done_callback(self._left)
        chunks = self._answer.chunks()
        try:
            headers: Any = self.raw_headers
            await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ConnectionLostError:
            return
        finally:
            _ = self._gone.cancel()
            await self._passage.close()
            await chunks.aclose()

    def _left(self, gone: asyncio.Future[None]) -> None:
        if not gone.cancelled():
            self._closing = asyncio.get_running_loop().create_task(self._passage.close())
