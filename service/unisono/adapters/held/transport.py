"""The transport: held requests, and plain ones for an httpx client, all on connections of their own."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import h11
import httpcore
import httpx

from unisono.adapters.held.connect import Connector
from unisono.adapters.held.errors import translated
from unisono.adapters.held.exchange import HeldExchange
from unisono.adapters.held.forwarded import PassedAnswer

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping

    from unisono.adapters.held.endpoint import Endpoint
    from unisono.core.model import Forwarded

_END: Final = b"}"
# A request without a body says nothing of its length.
_BODILESS: Final = ("GET", "HEAD", "OPTIONS", "DELETE")

# httpcore's errors under httpx's names, most particular first.
_HTTPX_NAMES: Final[tuple[tuple[type[Exception], type[httpx.TransportError]], ...]] = (
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.ReadTimeout, httpx.ReadTimeout),
    (httpcore.WriteTimeout, httpx.WriteTimeout),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.ReadError, httpx.ReadError),
    (httpcore.WriteError, httpx.WriteError),
    (httpcore.LocalProtocolError, httpx.LocalProtocolError),
    (httpcore.RemoteProtocolError, httpx.RemoteProtocolError),
)


class HeldTransport(httpx.AsyncBaseTransport):
    """Opens a connection for each request and uses none twice.

    `stage` holds a request; as an httpx transport it sends plain ones at once. Configured headers are sent with
    held requests only: an httpx client brings its own.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        backend: str,
        headers: Mapping[str, str] | None = None,
        connect_timeout_s: float = 5.0,
        patience_s: float = 30.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`backend` names it in errors; `patience_s` is how long sending may stand still."""
        self._backend = backend
        self._patience_s = patience_s
        self._connector = Connector(endpoint, timeout_s=connect_timeout_s, ssl_context=ssl_context)
        self._scheme, self._host = endpoint.scheme.encode("ascii"), endpoint.host.encode("ascii")
        self._port = endpoint.port
        self._prefix = endpoint.prefix
        self._origin = httpcore.Origin(self._scheme, self._host, self._port)
        own = {"Host": endpoint.host_header, **(headers or {})}
        if endpoint.authorization and "authorization" not in {name.lower() for name in own}:
            own["Authorization"] = endpoint.authorization
        own |= {"Content-Type": "application/json", "Connection": "close"}
        self._headers = [(name.encode("ascii"), value.encode("utf-8")) for name, value in own.items()]
        self._open: set[HeldExchange] = set()

    async def stage(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> HeldExchange:
        """Opens a connection and POSTs all of the body but its last byte, which must be `}`.

        `path` is taken below the endpoint's prefix; `headers` are added. Raises ValueError for another body,
        BackendUnavailableError where no connection can be had or it closes before the request was sent: the
        backend has done nothing for the request then.
        """
        if not body.endswith(_END):
            raise ValueError("a held body must end with }: any other last byte would not hold the request back")
        with translated(self._backend, opening=True):
            head = self._request(path, len(body), headers)
        return await self._stage(head, body, _END)

    async def stage_forwarded(self, request: Forwarded, headers: Mapping[str, str]) -> HeldExchange:
        """The same with a request that goes as it came, whose body is a JSON object and maybe blanks behind it.

        What is held is all of the body from the object's last byte on.
        """
        body = request.body
        last = body[body.rindex(_END) :]
        with translated(self._backend, opening=True):
            head = h11.Request(
                method=request.method.encode("ascii"),
                target=self._target(request),
                headers=[*self._beside(request, headers), (b"Content-Length", b"%d" % len(body))],
            )
        return await self._stage(head, body, last)

    async def pass_on(self, request: Forwarded, body: AsyncIterable[bytes] | None = None) -> PassedAnswer:
        """Sends a request at once, as it came; see the port `Backend`."""
        headers = self._beside(request, {})
        names = {name.lower() for name, _ in headers}
        content: bytes | AsyncIterable[bytes] = request.body
        if body is not None:
            content = body
            if b"content-length" not in names:
                headers.append((b"Transfer-Encoding", b"chunked"))
        elif request.body or request.method not in _BODILESS:
            headers.append((b"Content-Length", b"%d" % len(request.body)))
        with translated(self._backend, opening=True):
            stream = await self._connector.open()
        with translated(self._backend):
            try:
                connection = httpcore.AsyncHTTP11Connection(origin=self._origin, stream=stream)
                url = httpcore.URL(
                    scheme=self._scheme, host=self._host, port=self._port, target=self._target(request)
                )
                response = await connection.handle_async_request(
                    httpcore.Request(request.method.encode("ascii"), url, headers=headers, content=content)
                )
            except BaseException:
                stream.abort()
                raise
        return PassedAnswer(response, stream, backend=self._backend)

    def _target(self, request: Forwarded) -> bytes:
        return (self._prefix + request.target).encode("ascii")

    def _beside(self, request: Forwarded, added: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
        """A forwarded request's headers beside our own, which win: where it goes, and what this service was given to
        be let in with.
        """
        own = [pair for pair in self._headers if pair[0].lower() != b"content-type"]
        own += [(name.encode("ascii"), value.encode("utf-8")) for name, value in added.items()]
        taken = {name.lower() for name, _ in own}
        return [*own, *(pair for pair in request.headers if pair[0].lower() not in taken)]

    async def _stage(self, request: h11.Request, body: bytes, last: bytes) -> HeldExchange:
        with translated(self._backend, opening=True):
            stream = await self._connector.open()
            exchange = HeldExchange(backend=self._backend, stream=stream, last=last, on_over=self._open.discard)
            self._open.add(exchange)
            try:
                await exchange.stage(request, body, self._patience_s)
            except BaseException:
                exchange.abort()
                self._open.discard(exchange)  # also one that was closed before it could tell
                raise
        return exchange

    def _request(self, path: str, length: int, headers: Mapping[str, str] | None) -> h11.Request:
        added = [(name.encode("ascii"), value.encode("utf-8")) for name, value in (headers or {}).items()]
        return h11.Request(
            method=b"POST",
            target=(self._prefix + path).encode("ascii"),
            headers=[*self._headers, (b"Content-Length", b"%d" % length), *added],
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a plain request, for an httpx client."""
        timeouts = request.extensions.get("timeout", {})
        with _httpx_names():
            stream = await self._connector.open()
            try:
                connection = httpcore.AsyncHTTP11Connection(origin=self._origin, stream=stream)
                assert isinstance(request.stream, httpx.AsyncByteStream)  # noqa: S101 - what an async client gives
                response = await connection.handle_async_request(
                    httpcore.Request(
                        request.method,
                        httpcore.URL(
                            scheme=self._scheme, host=self._host, port=self._port, target=request.url.raw_path
                        ),
                        headers=request.headers.raw,
                        content=request.stream,
                        extensions={"timeout": timeouts},
                    )
                )
            except BaseException:
                # httpcore closes it once the request has begun; who is cancelled before that would leave it open.
                stream.abort()
                raise
        return httpx.Response(
            response.status, headers=response.headers, stream=_PlainStream(response), extensions=response.extensions
        )

    async def aclose(self) -> None:
        """Closes the connections of all held requests."""
        for exchange in tuple(self._open):
            exchange.abort()


class _PlainStream(httpx.AsyncByteStream):
    """A plain answer's body; its end closes the connection."""

    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _httpx_names():
            async for chunk in self._response.aiter_stream():
                yield chunk

    async def aclose(self) -> None:
        stream = self._response.extensions["network_stream"]
        try:
            await self._response.aclose()
        finally:
            # Also where the caller is cancelled in just this moment.
            await stream.aclose()


@contextlib.contextmanager
def _httpx_names() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        for ours, theirs in _HTTPX_NAMES:
            if isinstance(error, ours):
                raise theirs(str(error)) from error
        raise
