"""Web pages that happen to be open cannot ask the HTTP port; those that may, and proxies, can."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.described import HOOKS
from tests.integration.service import LIMIT_S, House, house

PATHS = [
    "/health",
    "/ready",
    "/metrics",
    "/openapi.json",
    "/v1/files",
    "/v1/batches",
    "/",
    "/nowhere",
    "/api/batch/status",
]
EVIL = "http://evil.example"


@asynccontextmanager
async def served(keeps_in: Path, **settings: Any) -> AsyncGenerator[tuple[House, httpx.AsyncClient]]:
    """A service, and a client of its HTTP port."""
    async with (
        house(keeps_in=keeps_in, with_http=True, settings=settings) as h,
        httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S, event_hooks=HOOKS) as client,
    ):
        yield h, client


async def test_a_foreign_name_is_refused_everywhere(tmp_path: Path) -> None:
    """In the shape of the path's API, with the setting that would allow it; nothing was done."""
    async with served(tmp_path) as (_, client):
        for path in PATHS:
            for method in ("GET", "HEAD", "POST", "OPTIONS"):
                answer = await client.request(method, path, headers={"host": "evil.example:4080"})
                assert answer.status_code == 403, (method, path)
                assert answer.headers["x-request-id"].startswith("req_")
                if method == "HEAD":
                    continue
                error = answer.json()["error"]
                is_ollama = path.startswith("/api/")
                assert isinstance(error, str) == is_ollama
                assert "UNISONO_HTTP_HOSTS" in (error if is_ollama else error["message"])
                assert is_ollama or (error["type"], error["code"]) == ("permission_error", "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "unisono", "a.localhost:80", "[::1]:4080", "192.0.2.7", "box.local"])
async def test_names_that_are_ours(tmp_path: Path, host: str) -> None:
    """Probes of a cluster ask by address, containers by a name without a dot."""
    async with served(tmp_path) as (_, client):
        assert (await client.get("/health", headers={"host": host})).status_code == 200


async def test_a_form_of_a_foreign_page_does_nothing(tmp_path: Path) -> None:
    """What a browser sends without asking beforehand: a form, or text that is JSON."""
    async with served(tmp_path) as (h, client):
        for origin in (EVIL, "null", "http://127.0.0.1.evil.example"):
            files = {"file": ("a", b"{}")}
            answer = await client.post(
                "/v1/files", files=files, data={"purpose": "batch"}, headers={"origin": origin}
            )
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "origin_not_allowed"
            body = json.dumps({"model": "fake", "requests": [{"prompt": "Hello"}]})
            plain = {"origin": origin, "content-type": "text/plain"}
            answer = await client.post("/api/batch/generate", content=body, headers=plain)
            assert (answer.status_code, set(answer.json())) == (403, {"error"})
        assert (await client.get("/v1/files")).json()["data"] == []
        assert h.fake.requests == [one for one in h.fake.requests if one.path not in ("/api/chat", "/api/generate")]


async def test_a_page_that_may_ask_is_told_so(tmp_path: Path) -> None:
    """Beforehand, and with the answer; others are not."""
    async with served(tmp_path, http_origins="https://*.example.org") as (_, client):
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "content-type, x-one"}
        for origin in ("http://localhost:3000", "https://app.example.org"):
            answer = await client.options("/v1/batches", headers={**ask, "origin": origin})
            assert (answer.status_code, answer.content) == (204, b"")
            assert answer.headers["access-control-allow-origin"] == origin
            assert answer.headers["access-control-allow-headers"] == "content-type, x-one"
            assert "POST" in answer.headers["access-control-allow-methods"]
            assert answer.headers["vary"] == "origin"
            for path, status in (("/health", 200), ("/v1/batches/none", 404)):
                answer = await client.get(path, headers={"origin": origin})
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == origin
                assert "x-request-id" in answer.headers["access-control-expose-headers"]
        private = ask | {"origin": "http://localhost", "access-control-request-private-network": "true"}
        answer = await client.options("/v1/batches", headers=private)
        assert answer.headers["access-control-allow-private-network"] == "true"
        answer = await client.options("/v1/batches", headers={**ask, "origin": EVIL})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
        assert "access-control-allow-origin" not in (await client.get("/health")).headers


async def test_a_page_of_our_own_host_may_ask(tmp_path: Path) -> None:
    """As behind a proxy whose name is set."""
    async with served(tmp_path, http_hosts="api.example.org") as (_, client):
        headers = {"host": "api.example.org", "origin": "https://api.example.org"}
        assert (await client.get("/health", headers=headers)).status_code == 200
        assert (await client.get("/health", headers=headers | {"origin": EVIL})).status_code == 403
        assert (await client.get("/health", headers={"host": "other.example.org"})).status_code == 403


async def test_two_hosts_are_none(tmp_path: Path) -> None:
    """Nobody could say which of them is meant. Two origins alike."""
    async with served(tmp_path) as (h, client):
        two = [("origin", "http://localhost"), ("origin", EVIL)]
        assert (await client.get("/health", headers=two)).status_code == 403
        port = int(h.http_url.rpartition(":")[2])
        said = await raw(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert said.split(b" ")[1] in (b"400", b"403")


async def raw(port: int, data: bytes) -> bytes:
    """What is answered to bytes, as far as one read goes."""
    import asyncio

    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    async with asyncio.timeout(LIMIT_S):
        said = await reader.read(65_536)
    writer.close()
    return said
