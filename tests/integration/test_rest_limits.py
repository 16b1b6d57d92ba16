"""What one caller of the HTTP port may take: time, bytes, connections. Each limit, and that it costs nobody else."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.described import HOOKS
from tests.integration.service import LIMIT_S, House, house
from unisono.edge.rest.connections import MOST_CONNECTIONS, MOST_HEAD_BYTES, BoundedProtocol, most_connections

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@asynccontextmanager
async def served(keeps_in: Path | None = None, **settings: Any) -> AsyncGenerator[tuple[House, httpx.AsyncClient]]:
    """A service, and a client of its HTTP port."""
    async with (
        house(keeps_in=keeps_in, with_http=True, **settings) as h,
        httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S, event_hooks=HOOKS) as client,
    ):
        yield h, client


def dialled(h: House) -> tuple[str, int]:
    """Where the port is."""
    host, port = h.http_url.removeprefix("http://").split(":")
    return host, int(port)


async def said(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection is closed, or broken off."""
    found = b""
    async with asyncio.timeout(LIMIT_S):
        try:
            while piece := await reader.read(65_536):
                found += piece
        except ConnectionResetError:
            pass
    return found


def error_in(answer: bytes, status: int) -> dict[str, Any]:
    """The error that was answered by hand, in OpenAI's shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# -- Time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [b"", b"G", b"GET /health HTTP/1.1\r\nHost: loc", GET + b"GET /he"])
async def test_a_head_that_does_not_end(monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    """However slowly it goes on, it has so long; on a connection that was used before, too."""
    monkeypatch.setattr(BoundedProtocol, "head_s", 0.4)
    async with served() as (h, client):
        reader, writer = await asyncio.open_connection(*dialled(h))
        writer.write(start)
        started_s = asyncio.get_running_loop().time()
        ending = asyncio.ensure_future(said(reader))
        while not ending.done():
            await asyncio.sleep(0.05)
            if start:
                writer.write(b"a")
        taken_s = asyncio.get_running_loop().time() - started_s
        assert (await ending).count(b"HTTP/1.1 200") == start.count(GET)
        assert 0.3 < taken_s < LIMIT_S / 2
        assert (await client.get("/health")).status_code == 200
        writer.close()


async def test_a_body_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is broken off, and nothing of an upload stays."""
    monkeypatch.setattr(BoundedProtocol, "silence_s", 0.4)
    async with served(tmp_path) as (h, client):
        for path, start in (
            ("/v1/batches", b"{"),
            ("/v1/files", b'--cut\r\nContent-Disposition: form-data; name="file"'),
        ):
            reader, writer = await asyncio.open_connection(*dialled(h))
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
            writer.write(f"{head}Content-Type: multipart/form-data; boundary=cut\r\n\r\n".encode() + start)
            assert await said(reader) == b""
            writer.close()
        async with asyncio.timeout(LIMIT_S):
            while list((tmp_path / "files").iterdir()):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert (await client.get("/v1/files")).json()["data"] == []


async def test_a_body_that_goes_on_slowly_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only silence counts."""
    monkeypatch.setattr(BoundedProtocol, "silence_s", 0.5)
    body = b'{"model": "fake", "requests": [{"prompt": "[[say=slow]]"}]}'

    async def slowly() -> AsyncGenerator[bytes]:
        for at in range(0, len(body), 8):
            yield body[at : at + 8]
            await asyncio.sleep(0.15)

    async with served() as (_, client):
        answer = await client.post("/api/batch/generate", content=slowly())
    assert answer.json()["responses"][0]["response"] == "slow"


async def test_a_batch_that_takes_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller whose request is whole may be silent for as long as its answer takes."""
    for name in ("silence_s", "head_s", "linger_s"):
        monkeypatch.setattr(BoundedProtocol, name, 0.3)
    async with served(pass_s=0.02) as (_, client):
        body = {"model": "fake", "requests": [{"prompt": "[[tokens=60]]"}]}
        found = (await client.post("/api/batch/generate", json=body)).json()
    assert found["stats"]["processing_time"] > 0.9e9
    assert found["responses"][0]["eval_count"] == 61


async def test_an_answer_that_nobody_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is given up; one on which a little is taken at a time is not, and has all of it in the end."""
    monkeypatch.setattr(BoundedProtocol, "silence_s", 0.5)
    size = 30_000_000
    async with served(tmp_path) as (h, client):
        files = {"file": ("a", b"x" * size)}
        file = (await client.post("/v1/files", files=files, data={"purpose": "batch"})).json()

        def asking() -> socket.socket:
            made = socket.socket()
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            made.connect(dialled(h))
            made.sendall(f"GET /v1/files/{file['id']}/content HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            made.setblocking(False)  # noqa: FBT003 - its own words
            return made

        idle, slow = asking(), asking()
        got = 0
        for _ in range(25):
            got += len(await asyncio.get_running_loop().sock_recv(slow, 4_096))
            await asyncio.sleep(0.1)
        of_slow, of_idle = await asyncio.gather(rest_of(slow), rest_of(idle))
        assert got + of_slow > size
        assert 0 < of_idle < size
        assert (await client.get("/health")).status_code == 200


async def rest_of(connection: socket.socket) -> int:
    """How many bytes come to the end of a connection, or until it is broken off."""
    count = 0
    with connection:
        async with asyncio.timeout(LIMIT_S):
            try:
                while piece := await asyncio.get_running_loop().sock_recv(connection, 65_536):
                    count += len(piece)
            except ConnectionResetError:
                pass
            # A keep-alive connection ends a while after its answer.
            return count


async def test_a_body_that_goes_on_after_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is read for a while, so that the answer is heard; then no more."""
    monkeypatch.setattr(BoundedProtocol, "linger_s", 0.4)
    async with served() as (h, _):
        reader, writer = await asyncio.open_connection(*dialled(h))
        writer.write(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n")
        ending = asyncio.ensure_future(said(reader))
        sent = 0
        while not ending.done():
            writer.write(b"x" * 1000)
            sent += 1000
            await asyncio.sleep(0.02)
        assert (await ending).startswith(b"HTTP/1.1 404")
        assert sent < 1_000_000
        writer.close()


# -- Bytes -----------------------------------------------------------------------------------------------------


async def test_heads_up_to_a_limit() -> None:
    """The line and the headers; a path that fits is only a path."""
    async with served() as (h, client):
        answer = await client.get("/v1/" + "x" * 12_000)
        assert answer.status_code == 404
        assert len(answer.json()["error"]["message"]) < 400
        for path in ("/v1/files", "/api/batch/status"):
            for answer in (
                await client.get(path, headers={"x-long": "x" * MOST_HEAD_BYTES}),
                await client.get(f"{path}?after={'x' * MOST_HEAD_BYTES}"),
            ):
                assert answer.status_code == 431
                assert "16,384" in answer.text
        for data in (
            # What does not come in one piece is not read to its end.
            b"GET /" + b"x" * 400_000,
            b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: " + b"x" * 400_000,
            b"GET / HTTP/1.1\r\n\r\n",
            b"nothing of the sort\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection(*dialled(h))
            writer.write(data)
            assert "16,384" in error_in(await said(reader), 400)["message"]
            writer.close()


async def test_bodies_up_to_a_limit(tmp_path: Path) -> None:
    """Of each path that reads one; in the shape of its API."""
    async with served(tmp_path) as (_, client):
        for path, most in (
            ("/v1/batches", 1024 * 1024),
            ("/v1/batches/batch_none/retry", 1024 * 1024),
            ("/api/batch/chat", 32 * 1024 * 1024),
        ):
            assert (await client.post(path, content=b" " * most)).status_code == 400
            answer = await client.post(path, content=b" " * (most + 1))
            assert answer.status_code == 413
            assert f"{most:,}" in answer.text


async def test_bodies_are_read_whatever_they_are_called(tmp_path: Path) -> None:
    """As Ollama does, and curl relies on; a form is not JSON."""
    async with served(tmp_path) as (_, client):
        body = json.dumps({"model": "fake", "requests": [{"prompt": "Hello"}]})
        for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=latin-1", "x", ""):
            answer = await client.post("/api/batch/generate", content=body, headers={"content-type": kind})
            assert answer.status_code == 200, kind
        answer = await client.post("/api/batch/generate", data={"requests": "[]"})
        assert (answer.status_code, "JSON" in answer.json()["error"]) == (400, True)
        answer = await client.post("/v1/files", json={"file": "x"})
        assert (answer.status_code, "multipart" in answer.json()["error"]["message"]) == (400, True)


async def test_a_parameter_that_is_given_twice(tmp_path: Path) -> None:
    """Nobody could say which is meant. Those that are not known are passed over."""
    async with served(tmp_path) as (_, client):
        for path, names in (
            ("/v1/files", ("limit", "after", "order", "purpose")),
            ("/v1/batches", ("limit", "after")),
        ):
            for name in names:
                value = {"limit": "1", "order": "asc"}.get(name, "")
                answer = await client.get(f"{path}?{name}={value}&{name}={value}")
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
            assert (await client.get(f"{path}?colour=red&colour=blue")).status_code == 200


# -- Connections -----------------------------------------------------------------------------------------------


async def test_so_many_connections_and_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told so, and the others go on; when one ends, another may come."""
    monkeypatch.setattr(BoundedProtocol, "most", 20)
    async with served() as (h, _):
        held = [await asyncio.open_connection(*dialled(h)) for _ in range(20)]
        for reader, writer in held:
            writer.write(GET)
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        reader, writer = await asyncio.open_connection(*dialled(h))
        assert "20 connections" in error_in(await said(reader), 503)["message"]
        writer.close()
        held[0][1].close()
        async with asyncio.timeout(LIMIT_S):
            while True:
                reader, writer = await asyncio.open_connection(*dialled(h))
                writer.write(GET)
                try:
                    line = await reader.readline()
                except ConnectionResetError:
                    line = b""
                writer.close()
                if line.startswith(b"HTTP/1.1 200"):
                    break
                await asyncio.sleep(0.02)
        for _, writer in held[1:]:
            writer.close()


async def test_many_connections_at_one_time() -> None:
    """Some hundreds, all of which are answered."""
    async with served() as (h, _):
        many = await asyncio.gather(*(asyncio.open_connection(*dialled(h)) for _ in range(300)))
        for _, writer in many:
            writer.write(GET)
        lines = await asyncio.gather(*(reader.readline() for reader, _ in many))
        assert {line.split()[1] for line in lines} == {b"200"}
        for _, writer in many:
            writer.close()


def test_no_more_connections_than_half_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which this process may have open: the rest is for its work."""
    for files, most in ((256, 128), (1_024, 512), (1_000_000, MOST_CONNECTIONS), (-1, MOST_CONNECTIONS), (1, 1)):
        monkeypatch.setattr("resource.getrlimit", lambda _, files=files: (files, files))
        assert most_connections() == most
