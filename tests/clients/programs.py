"""Client programs in other languages, as a test builds them, runs them, and gets in their way.

async with program.started("batch.jsonl", target=h.target) as run:
    await run.until_lines(5)
    run.interrupt()
    assert await run.exit_code() == 130
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ROOT / "clients"
EXAMPLE = ROOT / "service" / "unisono" / "examples" / "batch.jsonl"
# What every wait for a program is bounded by: far more than any needs.
LIMIT_S = 60.0
# A build from nothing on a slow machine.
BUILD_LIMIT_S = 900.0


# -- Building --------------------------------------------------------------------------------------------------


def need(*tools: str, for_what: str) -> None:
    """Skips a test, by the tool's name, where a toolchain is missing."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{for_what} needs {tool}, which is not installed")


def fetch(*command: str | Path, folder: Path, for_what: str, env: Mapping[str, str] | None = None) -> None:
    """Downloads what a build needs; skips the test where that cannot be had."""
    ended = _run(command, folder, env)
    if ended.returncode:
        pytest.skip(f"{for_what} needs packages that could not be fetched: {ended.stdout.strip()[-300:]}")


def build(*command: str | Path, folder: Path, env: Mapping[str, str] | None = None) -> None:
    """Runs a step of a build, which must succeed; `env` comes on top of the environment."""
    ended = _run(command, folder, env)
    assert ended.returncode == 0, f"{shlex.join(map(str, command))}:\n{ended.stdout[-4000:]}"


def _run(
    command: Sequence[str | Path], folder: Path, env: Mapping[str, str] | None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_LIMIT_S,
        check=False,
    )


# -- Running ---------------------------------------------------------------------------------------------------


class Run:
    """A program that runs, or has ended."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        # Results, one a line of standard output.
        self.lines: list[dict[str, Any]] = []
        # Standard error so far.
        self.told = ""
        self._changed = asyncio.Event()
        self._readers = [asyncio.ensure_future(self._read_lines()), asyncio.ensure_future(self._read_told())]

    @property
    def ids(self) -> list[str]:
        """The items that have a line, in the order in which they came."""
        return [line["id"] for line in self.lines]

    @property
    def states(self) -> list[str]:
        """How they ended."""
        return [line["state"] for line in self.lines]

    @property
    def batch_id(self) -> str:
        """As told on standard error."""
        return self._told("batch")

    @property
    def trace_id(self) -> str:
        """As told on standard error."""
        return self._told("trace")

    def command_to_resume(self) -> list[str]:
        """The arguments of the command that the program gave when it lost the connection."""
        (command,) = [line for line in map(str.strip, self.told.splitlines()) if line.startswith("unisono-batch -")]
        return shlex.split(command)[1:]

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Returns once a condition on what was written holds."""
        try:
            async with asyncio.timeout(LIMIT_S):
                while not condition():
                    self._changed.clear()
                    assert not all(reader.done() for reader in self._readers), f"it ended before {what}: {self.told}"
                    _ = await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"no {what}; lines: {self.ids}; told: {self.told}") from None

    async def until_lines(self, count: int) -> None:
        """Returns once there are so many results."""
        await self.until(lambda: len(self.lines) >= count, f"{count} results")

    async def until_told(self, text: str) -> None:
        """Returns once standard error has a text."""
        await self.until(lambda: text in self.told, repr(text))

    async def say(self, *lines: Mapping[str, Any]) -> None:
        """Writes lines to standard input, which stays open."""
        assert self.process.stdin is not None
        self.process.stdin.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        await self.process.stdin.drain()

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    async def exit_code(self) -> int:
        """Waits for the end, of the output too."""
        try:
            async with asyncio.timeout(LIMIT_S):
                _ = await asyncio.gather(*self._readers)
                return await self.process.wait()
        except TimeoutError:
            raise AssertionError(f"it does not end; lines: {self.ids}; told: {self.told}") from None

    async def close(self) -> None:
        """Ends it where it has not ended."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.process.returncode is None:
            self.process.kill()
        _ = await self.process.wait()
        _ = await asyncio.gather(*self._readers, return_exceptions=True)

    def _told(self, name: str) -> str:
        found = re.search(rf"^{name} (\S+)$", self.told, re.MULTILINE)
        assert found is not None, self.told
        return found[1]

    async def _read_lines(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(json.loads(line))
            self._changed.set()
        self._changed.set()

    async def _read_told(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.told += line.decode()
            self._changed.set()
        self._changed.set()


@dataclass(frozen=True, kw_only=True)
class Program:
    """A client program that was built."""

    # What starts it, before its own arguments.
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    @asynccontextmanager
    async def started(
        self, *arguments: str | Path, target: str, env: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Run, None]:
        """Runs it against a service; it is gone when the context is left."""
        # Nothing of this machine's settings: neither another service's nor a collector's address.
        usual = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "UNISONO_"))}
        process = await asyncio.create_subprocess_exec(
            *self.command,
            *map(str, arguments),
            env={**usual, **self.env, "UNISONO_TARGET": target, **(env or {})},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=2**26,  # bytes of a line: a long answer is one
        )
        run = Run(process)
        try:
            yield run
        finally:
            await run.close()

    async def run(self, *arguments: str | Path, target: str, env: Mapping[str, str] | None = None) -> tuple[int, Run]:
        """Runs it to its end; its exit code, and what it wrote."""
        async with self.started(*arguments, target=target, env=env) as run:
            return await run.exit_code(), run


def write_lines(path: Path, lines: Sequence[Mapping[str, Any] | str]) -> Path:
    """A batch file; a text is a line as it stands."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


# -- In between ------------------------------------------------------------------------------------------------


class CuttingProxy:
    """Passes connections on to a service, until it is told to hold them up, or to cut them."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_open = asyncio.Event()
        self._is_open.set()
        # Where it listens.
        self.target = ""
        # Connections ever accepted.
        self.connections = 0
        # Connections are cut when so many bytes of the service's have passed in all; None: never by themselves.
        self.cuts_after: int | None = None
        self._passed = 0
        # HTTP/2 frames by their type, of the caller and of the service.
        self.asked: list[int] = []
        self.answered: list[int] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        _ = await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """All connections are reset, on both sides. New ones may come."""
        for writer in self._writers:
            writer.transport.abort()
        self._is_open.set()

    def hold(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._is_open.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, there_writer}
        for source, sink, frames in (
            (reader, there_writer, Frames(self.asked, preface=24)),
            (there_reader, writer, Frames(self.answered)),
        ):
            task = asyncio.ensure_future(self._pass_on(source, sink, frames))
            self._tasks.add(task)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, frames: Frames) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                _ = await self._is_open.wait()
                frames.add(data)
                sink.write(data)
                await sink.drain()
                if frames.types is self.answered:
                    self._passed += len(data)
                    if self.cuts_after is not None and self._passed >= self.cuts_after:
                        self.cut()
        # One side has gone; so does the other.
        sink.close()


class Frames:
    """The types of HTTP/2 frames in a stream of bytes (RFC 9113, 4.1)."""

    PING, GOAWAY = 6, 7

    def __init__(self, types: list[int], preface: int = 0) -> None:
        # All so far.
        self.types = types
        self._skip = preface
        self._head = b""

    def add(self, data: bytes) -> None:
        """More bytes."""
        while data:
            if self._skip:
                self._skip, data = max(0, self._skip - len(data)), data[self._skip :]
                continue
            head, data = data[: 9 - len(self._head)], data[9 - len(self._head) :]
            self._head += head
            if len(self._head) == 9:
                # The answer to a ping is no ping.
                is_answer = self._head[3] == self.PING and self._head[4] & 1
                if not is_answer:
                    self.types.append(self._head[3])
                self._skip, self._head = int.from_bytes(self._head[:3]), b""


# -- A collector -----------------------------------------------------------------------------------------------


class HttpCollector:
    """Takes traces over OTLP/HTTP, in protobuf."""

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Collecting)
        self._server.daemon_threads = True
        self._server.spans = []  # type: ignore[attr-defined]  # for the handler
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        """For OTEL_EXPORTER_OTLP_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def spans(self) -> list[trace_pb2.Span]:
        """All that came."""
        spans: list[trace_pb2.Span] = self._server.spans  # type: ignore[attr-defined]
        return list(spans)


class _Collecting(BaseHTTPRequestHandler):
    # Exporters keep their connections.
    protocol_version = "HTTP/1.1"
    timeout = 10

    def do_POST(self) -> None:
        body = self._body()
        status = 404
        if self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf":
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            self.server.spans += [  # type: ignore[attr-defined]
                span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans
            ]
            status = 200
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            _ = self.rfile.readline()
        _ = self.rfile.readline()
        return body

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        """Says nothing."""
