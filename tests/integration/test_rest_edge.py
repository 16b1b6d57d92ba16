"""The REST edge with requests that no client library would send: each is answered, and in OpenAI's shape."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import structlog

from tests.fakes.ollama import FakeOllama
from tests.integration.described import HOOKS
from tests.integration.service import LIMIT_S, House, house
from unisono.bootstrap import running
from unisono.config import Settings
from unisono.edge.rest import upload

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def served(keeps_in: Path | None, **settings: Any) -> AsyncGenerator[tuple[House, httpx.AsyncClient]]:
    """A service, and a client of its HTTP port."""
    async with (
        house(keeps_in=keeps_in, with_http=True, **settings) as h,
        httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S, event_hooks=HOOKS) as client,
    ):
        yield h, client


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error that was answered, in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error


def form(*parts: tuple[str, bytes], boundary: bytes = b"cut", ends: bool = True) -> bytes:
    """A multipart body; a part is its Content-Disposition and its content."""
    body = b"".join(
        b"--" + boundary + b"\r\nContent-Disposition: " + head.encode() + b"\r\n\r\n" + content + b"\r\n"
        for head, content in parts
    )
    return body + (b"--" + boundary + b"--\r\n" if ends else b"")


FILE = ('form-data; name="file"; filename="a.jsonl"', b"{}\n")
PURPOSE = ('form-data; name="purpose"', b"batch")
FORM = {"content-type": "multipart/form-data; boundary=cut"}


async def put(client: httpx.AsyncClient, data: bytes = b"{}\n") -> str:
    """A file; its id."""
    answer = await client.post("/v1/files", files={"file": ("a.jsonl", data)}, data={"purpose": "batch"})
    assert answer.status_code == 200, answer.text
    file_id: str = answer.json()["id"]
    return file_id


# -- Uploads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "body", "param"),
    [
        ({"content-type": "application/json"}, b"{}", None),
        ({}, b"", None),
        ({"content-type": "multipart/form-data"}, form(FILE, PURPOSE), None),
        ({"content-type": f"multipart/form-data; boundary={'b' * 1000}"}, b"", None),
        (FORM, b"no form at all", None),
        (FORM, b"", None),
        (FORM, form(FILE, PURPOSE, ends=False), None),
        (FORM, form(PURPOSE), "file"),
        (FORM, form(FILE), "purpose"),
        (FORM, form(FILE, FILE, PURPOSE), "file"),
        (FORM, form(FILE, PURPOSE, PURPOSE), "purpose"),
        (FORM, form(FILE, ('form-data; name="purpose"', b"assistants")), "purpose"),
        (FORM, form(FILE, ("form-data", b"batch")), None),
        (FORM, form(FILE, ('form-data; name="x"', b"y" * 20_000)), None),
        (FORM, form(FILE, *((f'form-data; name="x{n}"', b"") for n in range(40))), None),
        (FORM, form(FILE, PURPOSE, ('form-data; name="expires_after[seconds]"', b"7200")), "expires_after[anchor]"),
        (
            FORM,
            form(
                FILE,
                PURPOSE,
                ('form-data; name="expires_after[anchor]"', b"created_at"),
                ('form-data; name="expires_after[seconds]"', b"60"),
            ),
            "expires_after[seconds]",
        ),
    ],
)
async def test_what_is_no_upload(tmp_path: Path, headers: dict[str, str], body: bytes, param: str | None) -> None:
    """It is refused, and nothing of it stays."""
    async with served(tmp_path) as (_, client):
        answer = await client.post("/v1/files", headers=headers, content=body)
        assert error_of(answer, 400)["param"] == param
        assert (await client.get("/v1/files")).json()["data"] == []
        assert not list((tmp_path / "files").iterdir())


async def test_the_largest_file_and_one_byte_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends too much is heard to the end, and told."""
    monkeypatch.setattr(upload, "MAX_FILE_BYTES", 1_000_000)
    async with served(tmp_path) as (_, client):
        file_id = await put(client, b"x" * 1_000_000)
        assert (await client.get(f"/v1/files/{file_id}")).json()["bytes"] == 1_000_000
        content = await client.get(f"/v1/files/{file_id}/content")
        assert content.content == b"x" * 1_000_000
        for size in (1_000_001, 20_000_000):
            files = {"file": ("a.jsonl", b"x" * size)}
            error = error_of(await client.post("/v1/files", files=files, data={"purpose": "batch"}), 413)
            assert (error["param"], error["code"]) == ("file", "file_too_large")
        assert len(list((tmp_path / "files").iterdir())) == 1


async def test_a_name_is_only_a_name(tmp_path: Path) -> None:
    """Whatever a caller calls a file, or asks for, nothing outside of the folder is made or opened."""
    (tmp_path / "secret").write_text("secret")
    async with served(tmp_path / "data") as (_, client):
        for name in ("../../secret", "/etc/passwd", "ä\u2028 .jsonl", "n" * 1000):
            answer = await client.post("/v1/files", files={"file": (name, b"{}")}, data={"purpose": "batch"})
            assert answer.status_code == 200
            file = answer.json()
            assert file["filename"] == name[-255:]
            content = await client.get(f"/v1/files/{file['id']}/content")
            assert content.content == b"{}"
        for asked in ("..%2f..%2fsecret", "..%2fjournal.sqlite3", "%2e%2e", "file-", "file-" + "0" * 24, "%00"):
            for path in (f"/v1/files/{asked}", f"/v1/files/{asked}/content"):
                _ = error_of(await client.get(path), 404)
        body = {"input_file_id": "../secret", "endpoint": CHAT, "completion_window": "24h"}
        assert error_of(await client.post("/v1/batches", json=body), 400)["param"] == "input_file_id"
    assert all(path.name.startswith("file-") for path in (tmp_path / "data" / "files").iterdir())


async def test_a_caller_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    """In the middle of an upload."""

    async def some() -> AsyncIterator[bytes]:
        yield form(FILE, ends=False)
        yield b"x" * 1_000_000
        raise ConnectionResetError

    async with served(tmp_path) as (_, client):
        with pytest.raises(ConnectionResetError):
            _ = await client.post("/v1/files", headers=FORM, content=some())
        async with asyncio.timeout(LIMIT_S):
            while list((tmp_path / "files").iterdir()):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert (await client.get("/v1/files")).json()["data"] == []


async def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With when to try again; and it heals by itself."""
    async with served(tmp_path) as (_, client):
        with monkeypatch.context() as patched:
            patched.setattr("unisono.adapters.journal.files.os.fsync", full)
            answer = await client.post("/v1/files", files={"file": ("a", b"{}")}, data={"purpose": "batch"})
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "limit_exceeded"
        assert int(answer.headers["retry-after"]) > 0
        assert not list((tmp_path / "files").iterdir())
        _ = await put(client)


async def test_files_have_no_more_bytes_than_they_may(tmp_path: Path) -> None:
    """All together: an upload beyond that is refused as by OpenAI, whatever its size; what is deleted makes room."""
    async with served(tmp_path, settings={"max_files_bytes": 1_000_000}) as (_, client):
        first = await put(client, b"x" * 600_000)
        for size in (400_001, 3_000_000):
            answer = await client.post("/v1/files", files={"file": ("a", b"x" * size)}, data={"purpose": "batch"})
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
            assert "UNISONO_MAX_FILES_BYTES" in error["message"]
        assert len(list((tmp_path / "files").iterdir())) == 1
        _ = await put(client, b"x" * 400_000)
        _ = await client.delete(f"/v1/files/{first}")
        _ = await put(client, b"x" * 600_000)
    async with served(tmp_path, settings={"max_files_bytes": 1_000_000}) as (_, client):
        answer = await client.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"})
        assert answer.status_code == 400


async def test_files_of_results_are_written_where_uploads_are_not(tmp_path: Path) -> None:
    """What is answered is paid for; then nothing more is taken until something is deleted."""
    lines = b"".join(request(f"q{n}") for n in range(20))
    async with served(tmp_path, settings={"max_files_bytes": len(lines)}) as (_, client):
        file_id = await put(client, lines)
        batch_id = await create(client, file_id)
        await until(client, batch_id, "completed")
        output = (await client.get(f"/v1/batches/{batch_id}")).json()["output_file_id"]
        assert len((await client.get(f"/v1/files/{output}/content")).content.splitlines()) == 20
        answer = await client.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"})
        assert answer.status_code == 400
        for each in (file_id, output):
            _ = await client.delete(f"/v1/files/{each}")
        _ = await put(client, request("a"))


async def test_uploads_leave_something_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the journal, and for files of results."""
    async with served(tmp_path) as (_, client):
        with monkeypatch.context() as patched:
            patched.setattr("unisono.adapters.journal.room.shutil.disk_usage", nearly_full)
            answer = await client.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"})
        assert answer.status_code == 400
        assert "100,000,000 bytes left" in answer.json()["error"]["message"]
        _ = await put(client)


class DiskUsage(NamedTuple):
    """As shutil tells it."""

    total: int
    used: int
    free: int


def nearly_full(_: object) -> Any:
    """A disk of ten gigabytes."""
    return DiskUsage(10**10, 10**10 - 10**8, 10**8)


async def test_files_of_results_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is finalizing meanwhile, and what was begun does not stay."""
    monkeypatch.setattr("unisono.app.file_batches._AGAIN_S", 0.02)
    async with served(tmp_path) as (_, client):
        file_id = await put(client, request("a"))
        with monkeypatch.context() as patched:
            patched.setattr("unisono.adapters.journal.files.os.fsync", full)
            batch_id = await create(client, file_id)
            await until(client, batch_id, "finalizing")
            await asyncio.sleep(0.2)
            await until(client, batch_id, "finalizing")
        await until(client, batch_id, "completed")
        assert len(list((tmp_path / "files").iterdir())) == 2


def full(*_: object) -> None:
    """There is no room on the disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def request(custom_id: str, text: str = "Hello", **fields: Any) -> bytes:
    """A line of a batch's file."""
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}).encode() + b"\n"


async def create(client: httpx.AsyncClient, file_id: str) -> str:
    """A batch; its id."""
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    answer = await client.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    batch_id: str = answer.json()["id"]
    return batch_id


async def until(client: httpx.AsyncClient, batch_id: str, status: str) -> None:
    """Until a batch stands so."""
    async with asyncio.timeout(LIMIT_S):
        while (await client.get(f"/v1/batches/{batch_id}")).json()["status"] != status:  # noqa: ASYNC110 - polled
            await asyncio.sleep(0.01)


# -- Batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"endpoint": None}, "endpoint"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"endpoint": ["a"]}, "endpoint"),
        ({"completion_window": None}, "completion_window"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": "0s"}, "completion_window"),
        ({"metadata": "text"}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k": "\ud83d"}}, "metadata.k"),
        ({"metadata": {"\ud83d": "v"}}, "metadata"),
        ({"metadata": {"\ud83d": 1}}, "metadata"),
        ({"\ud83d": 1}, "?"),
        ({"endpoint": "\ud83d"}, "endpoint"),
        ({"completion_window": "\ud83d"}, "completion_window"),
        ({"output_expires_after": {"anchor": "now", "seconds": 7200}}, "output_expires_after.anchor"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after.seconds"),
        ({"window": "24h"}, "window"),
    ],
)
async def test_what_is_no_batch(tmp_path: Path, changes: dict[str, Any], param: str) -> None:
    """It is refused, with the field."""
    async with served(tmp_path) as (_, client):
        usual = {"input_file_id": await put(client), "endpoint": CHAT, "completion_window": "24h"}
        # With escapes, as a half of a surrogate pair can be sent.
        error = error_of(await client.post("/v1/batches", content=json.dumps(usual | changes)), 400)
        assert error["param"] == param
        codes = {"?": "unknown_parameter", "window": "unknown_parameter"}
        is_missing = None in changes.values()
        assert error["code"] == codes.get(param, "missing_required_parameter" if is_missing else "invalid_value")
        assert (await client.get("/v1/batches")).json()["data"] == []


@pytest.mark.parametrize("body", [b"", b"no JSON", b"[]", b"null", b"\xff", b'{"a":', b"[" * 100_000])
async def test_a_body_that_is_none(tmp_path: Path, body: bytes) -> None:
    """It is refused."""
    async with served(tmp_path) as (_, client):
        _ = error_of(await client.post("/v1/batches", content=body), 400)


async def test_a_body_that_is_too_large(tmp_path: Path) -> None:
    """It is refused."""
    async with served(tmp_path) as (_, client):
        _ = error_of(await client.post("/v1/batches", content=b" " * 1_100_000), 413)


async def test_a_file_of_results_is_no_batch(tmp_path: Path) -> None:
    """Its purpose is another."""
    async with served(tmp_path) as (_, client):
        batch_id = await create(client, await put(client, request("a", model="absent")))
        await until(client, batch_id, "completed")
        found = (await client.get(f"/v1/batches/{batch_id}")).json()
        body = {"input_file_id": found["error_file_id"], "endpoint": CHAT, "completion_window": "24h"}
        assert "batch_output" in error_of(await client.post("/v1/batches", json=body), 400)["message"]


async def test_too_many_batches(tmp_path: Path) -> None:
    """As many as may be open; then one must end before another may come."""
    async with served(tmp_path, settings={"max_kept_batches": 1}, pass_s=0.01) as (_, client):
        file_id = await put(client, request("a", "Go on [[tokens=4000]]", max_tokens=4000))
        first = await create(client, file_id)
        await until(client, first, "in_progress")
        body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        second = await client.post("/v1/batches", json=body)
        assert second.status_code == 429
        assert second.headers["retry-after"]
        assert second.json()["error"]["type"] == "rate_limit_error"
        assert (await client.post(f"/v1/batches/{first}/cancel")).status_code == 200
        await until(client, first, "cancelled")
        _ = await create(client, file_id)


# -- Paths, methods, pages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/files?limit=0", "integer_below_min_value"),
        ("/v1/files?limit=10001", "integer_above_max_value"),
        ("/v1/files?limit=99999999999999999999", "integer_above_max_value"),
        ("/v1/files?limit=many", "invalid_value"),
        ("/v1/files?limit=²", "invalid_value"),
        ("/v1/files?limit=-1", "invalid_value"),
        ("/v1/files?order=up", "invalid_value"),
        ("/v1/batches?limit=101", "integer_above_max_value"),
    ],
)
async def test_a_page_that_is_none(tmp_path: Path, path: str, code: str) -> None:
    """By the name that OpenAI has for what is wrong."""
    async with served(tmp_path) as (_, client):
        error = error_of(await client.get(path), 400)
    assert (error["code"], error["param"]) == (code, path.partition("?")[2].partition("=")[0])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/files/", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/batches/batch_none", 404),
        ("POST", "/v1/batches/batch_none/cancel", 404),
        ("DELETE", "/v1/files/file-none", 404),
        ("PUT", "/v1/files", 405),
        ("DELETE", "/v1/batches/batch_none", 405),
        ("GET", "/v1/batches/batch_none/cancel", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/files?after=file-none", 400),
    ],
)
async def test_what_is_not_there(tmp_path: Path, method: str, path: str, status: int) -> None:
    """Told in OpenAI's shape."""
    async with served(tmp_path) as (_, client):
        _ = error_of(await client.request(method, path), status)


async def test_an_empty_list(tmp_path: Path) -> None:
    """Has no first and no last."""
    async with served(tmp_path) as (_, client):
        for path in ("/v1/files", "/v1/batches"):
            answer = await client.get(path)
            assert answer.headers["x-request-id"].startswith("req_")
            assert answer.json() == {
                "object": "list",
                "data": [],
                "first_id": None,
                "last_id": None,
                "has_more": False,
            }


async def test_head_is_answered_without_a_body(tmp_path: Path) -> None:
    """For a file's content too."""
    async with served(tmp_path) as (_, client):
        file_id = await put(client)
        answer = await client.head(f"/v1/files/{file_id}/content")
        assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "3")


async def test_small_answers_go_at_once(tmp_path: Path) -> None:
    """The best of twenty: a connection that gathers small pieces takes 40 ms each time."""
    async with served(tmp_path) as (_, client):
        taken = [(await client.get("/health")).elapsed.total_seconds() for _ in range(20)]
    assert min(taken) < 0.03


# -- How the service is ----------------------------------------------------------------------------------------


async def test_health_and_readiness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives; and takes work, unless its journal cannot be written to."""
    async with served(tmp_path) as (_, client):
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/ready")).json() == {"status": "ready"}
        monkeypatch.setattr("unisono.adapters.journal.sqlite.SqliteJournal.trouble", "cannot grow: free some space")
        assert "cannot grow" in error_of(await client.get("/ready"), 503)["message"]
        monkeypatch.setattr("unisono.app.durable.DurableBatches.is_closing", property(lambda _: True))
        assert "being stopped" in error_of(await client.get("/ready"), 503)["message"]
        assert (await client.get("/health")).status_code == 200


async def test_a_service_that_keeps_nothing() -> None:
    """Says so."""
    async with served(None, settings={"data_dir": "none"}) as (_, client):
        assert error_of(await client.get("/v1/files"), 409)["code"] == "nothing_kept"
        assert (await client.get("/ready")).status_code == 200


async def test_a_defect_costs_its_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is reported."""

    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    async with served(tmp_path) as (h, client):
        h.expected_defects = {"GET /v1/files"}
        with monkeypatch.context() as patched:
            patched.setattr("unisono.adapters.journal.files.SqliteFiles.page", broken)
            assert error_of(await client.get("/v1/files"), 500)["code"] == "internal"
        assert [where for where, _ in h.defects] == ["GET /v1/files"]
        assert (await client.get("/v1/files")).status_code == 200


async def test_a_defect_fails_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody polls for ever."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async with served(tmp_path) as (h, client):
        h.expected_defects = {"a batch of a file"}
        monkeypatch.setattr("unisono.edge.rest.lines.FileCheck.read", broken)
        batch_id = await create(client, await put(client))
        await until(client, batch_id, "failed")
        found = (await client.get(f"/v1/batches/{batch_id}")).json()
        assert found["errors"]["data"][0]["code"] == "server_error"


async def test_nowhere() -> None:
    """Where it is set so."""
    async with house(with_http=True, settings={"http_listen": "none"}) as h:
        assert h.http_url == ""


async def test_a_port_that_is_taken_is_a_warning() -> None:
    """The service starts without, and says so."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        async with FakeOllama() as fake:
            made = Settings(listen="127.0.0.1:0", ollama_url=fake.url, state_dir="none", drain=0.0, http_listen=taken)
            with structlog.testing.capture_logs() as logs:
                async with running(made, with_http=True) as service:
                    assert service.http_url == ""
    (warning,) = [entry for entry in logs if entry["event"] == "OpenAI's API is not served"]
    assert (warning["log_level"], warning["listen"], warning["error"]) == (
        "warning",
        taken,
        "Address already in use",
    )


async def test_unisono_serve_serves_it_and_stops_when_it_is_told(tmp_path: Path) -> None:
    """The command says where; an upload that hangs does not keep it from ending, and uvicorn takes no signals."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("UNISONO_", "OLLAMA_"))}
    environ = {
        "UNISONO_LISTEN": "127.0.0.1:0",
        "UNISONO_HTTP_LISTEN": "127.0.0.1:0",
        "UNISONO_METRICS_LISTEN": "none",
        "UNISONO_STATE_DIR": "none",
        "UNISONO_DATA_DIR": str(tmp_path),
        "OLLAMA_HOST": "127.0.0.1:1",
        "UNISONO_DRAIN": "0s",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "unisono", "serve"), env=inherited | environ, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        said = b""
        while b'"serving"' not in said:
            said = await asyncio.wait_for(process.stderr.readline(), LIMIT_S)
            assert said
        url = json.loads(said)["http"]
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
            assert (await client.get("/health")).status_code == 200
            _ = await put(client)
        host, _, port = url.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\ncontent-type: "
        writer.write(head.encode() + FORM["content-type"].encode() + b"\r\n\r\n" + form(FILE, ends=False))
        await writer.drain()
        async with asyncio.timeout(LIMIT_S):
            while len(list((tmp_path / "files").iterdir())) < 2:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        process.terminate()
        left = await asyncio.wait_for(process.stderr.read(), LIMIT_S)
        assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0
        writer.close()
    finally:
        if process.returncode is None:
            process.kill()
    assert b"Traceback" not in left
    assert [path.name for path in (tmp_path / "files").iterdir() if path.suffix] == []
