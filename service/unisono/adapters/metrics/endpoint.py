"""GET /metrics, on a port of its own.

Served by the event loop in which everything else happens, so that what is read of backends is never half changed. It
knows as much of HTTP/1.1 as a scraper needs: a request has a head and no body, and each answer closes its connection.

An answer is written family by family, and the loop goes on in between: the whole takes 5 ms for ten models, in which
a wave that is due would wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client.core import Metric

PATH = "/metrics"
_MOST_HEAD_BYTES = 16 * 1024
# For a request to arrive and its answer to be taken.
_PATIENCE_S = 10.0
_END = b"# EOF\n"
_TEXT = "text/plain; charset=utf-8"


class MetricsEndpoint:
    """Serves a registry until it is closed."""

    def __init__(self, registry: CollectorRegistry, report_defect: Callable[[str, BaseException], None]) -> None:
        self._registry = registry
        self._report_defect = report_defect
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls, registry: CollectorRegistry, host: str, port: int, *, report_defect: Callable[[str, BaseException], None]
    ) -> Self:
        """Begins to serve; port 0 is any that is free. Raises OSError where it cannot listen there."""
        endpoint = cls(registry, report_defect)
        endpoint._server = await asyncio.start_server(endpoint._accept, host, port, limit=_MOST_HEAD_BYTES)
        return endpoint

    @property
    def url(self) -> str:
        """Where the figures are."""
        if self._server is None or not self._server.sockets:
            return ""
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}{PATH}"

    async def close(self) -> None:
        """Ends, with calls that are being answered."""
        if self._server is not None:
            self._server.close()
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        _ = await asyncio.gather(*calls, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = asyncio.get_running_loop().create_task(self._answer(reader, writer))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except asyncio.LimitOverrunError:
                    writer.write(_response("431 Request Header Fields Too Large", b""))
                else:
                    writer.write(await self._response_to(head))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            # Whoever asked has gone, or says nothing.
            pass
        except Exception as defect:  # noqa: BLE001 - a defect here must cost a scrape, not the service
            self._report_defect("an answer to a scrape", defect)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _response_to(self, head: bytes) -> bytes:
        request, *lines = head.decode("latin-1").split("\r\n")
        words = request.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response("400 Bad Request", b"")
        method, target, _ = words
        if target.partition("?")[0] != PATH:
            return _response("404 Not Found", f"The figures are at {PATH}.\n".encode(), is_head=method == "HEAD")
        if method not in {"GET", "HEAD"}:
            return _response("405 Method Not Allowed", b"", extra="Allow: GET, HEAD\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body, kind = await written(self._registry, headers.get("accept", ""))
        return _response("200 OK", body, kind=kind, is_head=method == "HEAD")


async def written(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The figures of this moment in the form that is accepted, and its media type."""
    encode, kind = choose_encoder(accept)
    parts: list[bytes] = []
    end = b""
    for family in registry.collect():
        alone = CollectorRegistry(auto_describe=False)
        alone.register(_Collected(family))
        part = encode(alone)
        # OpenMetrics ends with a line of its own, once.
        end = _END if part.endswith(_END) else b""
        parts.append(part.removesuffix(_END))
        await asyncio.sleep(0)
    return b"".join([*parts, end]), kind


class _Collected(Collector):
    """A family that was collected already."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def _response(status: str, body: bytes, *, kind: str = _TEXT, extra: str = "", is_head: bool = False) -> bytes:
    about = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}Connection: close\r\n"
    return f"HTTP/1.1 {status}\r\n{about}\r\n".encode() + (b"" if is_head else body)
