"""A server that says what was recorded, byte for byte, to whoever sends just the recorded bytes.

What a service asks by itself beside that (which models there are, what is loaded, a load) is answered too, so that a
request can be planned.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 500: "Internal Server Error"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as it came."""

    method: str
    target: str
    # In their order, with names as they were written.
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of a header; None: it is not there. It may be there once only."""
        found = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(found) < 2, (name, found)
        return found[0] if found else None


@dataclass(kw_only=True)
class Recorded:
    """An answer, and what is to be asked for it."""

    method: str
    target: str
    body: bytes
    status: int
    headers: dict[str, str]
    # The pieces of the answer's body; sent as chunks where the answer is chunked.
    pieces: list[bytes]
    # Each piece but the first waits for this many releases.
    gate: asyncio.Semaphore | None = None
    # The connection is reset in place of the end.
    is_cut: bool = False


def recorded(case: dict[str, Any]) -> Recorded:
    """A recording of tests/fixtures/wire."""
    request, response = case["request"], case["response"]
    raw = request["body"]
    body = b"" if raw is None else raw.encode() if isinstance(raw, str) else json.dumps(raw).encode()
    said = response.get("body", "")
    headers = dict(response.get("headers") or {"content-type": "application/json; charset=utf-8"})
    if isinstance(said, list):
        pieces = [line.encode() + b"\n" for line in said]
        headers["content-type"] = response.get("headers", {}).get("content-type", "application/x-ndjson")
        headers["transfer-encoding"] = "chunked"
    else:
        text = said if isinstance(said, str) else json.dumps(said, separators=(",", ":"))
        pieces = [text.encode()]
    return Recorded(
        method=request["method"],
        target=request["path"],
        body=body,
        status=response["status"],
        headers=headers,
        pieces=pieces,
    )


@dataclass
class Replay:
    """The server: `async with Replay(recorded(case), models=("m",)) as replay`."""

    answer: Recorded
    # Models that it says it has, which can do anything.
    models: tuple[str, ...] = ()
    asked: list[Asked] = field(default_factory=list)
    # Connections on which the recorded request came, and that are open.
    open: int = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()

    @property
    def matching(self) -> list[Asked]:
        """Requests that were the recorded one."""
        return [one for one in self.asked if self._is_it(one)]

    def _is_it(self, one: Asked) -> bool:
        wanted = self.answer
        return (one.method, one.target, one.body) == (wanted.method, wanted.target, wanted.body)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, target, _ = head[0].split(" ")
            pairs = [line.partition(": ") for line in head[1:] if line]
            headers = tuple((name, value) for name, _, value in pairs)
            length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
            body = await reader.readexactly(length)
            one = Asked(method=method, target=target, headers=headers, body=body)
            self.asked.append(one)
            if self._is_it(one):
                self.open += 1
                try:
                    await self._say(self.answer, one.method, reader, writer)
                finally:
                    self.open -= 1
            else:
                await self._say_other(one, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _say(
        self, answer: Recorded, method: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        is_chunked = "chunked" in answer.headers.get("transfer-encoding", "")
        headers = {name: value for name, value in answer.headers.items() if name != "content-length"}
        if not is_chunked:
            # Some recordings were cut, and their length with them.
            headers["content-length"] = str(sum(map(len, answer.pieces)))
        writer.write(f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Status')}\r\n".encode())
        writer.write("".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n")
        for number, piece in enumerate(answer.pieces if method != "HEAD" else ()):
            if number and answer.gate is not None:
                gone = asyncio.ensure_future(reader.read(1))
                passed = asyncio.ensure_future(answer.gate.acquire())
                await asyncio.wait((gone, passed), return_when=asyncio.FIRST_COMPLETED)
                passed.cancel()
                if gone.done():
                    return
                gone.cancel()
                with_nothing = await asyncio.gather(gone, return_exceptions=True)
                del with_nothing
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
            await writer.drain()
        if answer.is_cut:
            writer.transport.abort()
        elif is_chunked:
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    async def _say_other(self, one: Asked, writer: asyncio.StreamWriter) -> None:
        models: list[dict[str, Any]] = []
        if one.target == "/api/tags":
            capabilities = ["completion", "tools", "vision", "thinking", "embedding", "insert"]
            models = [
                {"name": name, "model": name, "digest": name, "capabilities": capabilities} for name in self.models
            ]
        body = json.dumps({"models": models, "model": "", "done": True, "done_reason": "load"}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
        writer.write(body)
        await writer.drain()
