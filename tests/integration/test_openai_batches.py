"""OpenAI's own package against the service, unchanged: upload, create, poll, download, cancel, list, paginate."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch, Completion, CreateEmbeddingResponse, FileObject
from openai.types.chat import ChatCompletion

from tests.fakes.ollama import Answer
from tests.fakes.otlp import OtlpReceiver
from tests.integration.openai_client import CHAT, chat, chats, create, line, lines_of, served, until_over, upload
from tests.integration.service import LIMIT_S
from unisono.app.file_batches import FileBatches
from unisono.edge.rest.lines import FileCheck

# Twenty seconds, at five milliseconds a pass.
LONG = "Go on [[tokens=4000]]"

# -- From a file to its files ----------------------------------------------------------------------------------


async def test_upload_create_poll_download(tmp_path: Path) -> None:
    """The whole way; the answers are OpenAI's, and those of the kept batch that gRPC sees under the same id."""
    async with served(tmp_path) as (h, client):
        created = await create(client, chats(20), metadata={"job": "night"})
        assert (created.status, created.object, created.endpoint) == ("validating", "batch", CHAT)
        assert (created.completion_window, created.metadata) == ("24h", {"job": "night"})
        assert created.expires_at == created.created_at + 86_400
        assert (created.in_progress_at, created.output_file_id, created.errors) == (None, None, None)
        batch = await until_over(client, created)
        assert batch.status == "completed"
        assert batch.error_file_id is None
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 20, "completed": 20, "failed": 0}
        moments = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        assert list(moments) == sorted(moment or 0 for moment in moments)
        assert batch.failed_at is batch.expired_at is batch.cancelling_at is batch.cancelled_at is None
        assert batch.usage is not None
        assert batch.usage.output_tokens == 60
        assert batch.usage.total_tokens == batch.usage.input_tokens + 60
        found = await lines_of(client, batch.output_file_id)
        assert set(found) == {f"i{number}" for number in range(20)}
        kept = (await h.list_results(batch.id)).results
        for custom_id, one in found.items():
            assert one["error"] is None
            assert one["response"]["status_code"] == 200
            body = ChatCompletion.model_validate_json(json.dumps(one["response"]["body"]), strict=True)
            assert body.choices[0].message.content == kept[custom_id].completion.content
            assert body.choices[0].finish_reason == "length"
        output = await client.files.retrieve(batch.output_file_id or "")
        assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
        content = await client.files.content(output.id)
        assert len(content.content) == output.bytes


async def test_every_field_of_a_batch_is_there(tmp_path: Path) -> None:
    """What does not apply is null, not absent."""
    async with served(tmp_path) as (h, client), httpx.AsyncClient() as raw:
        batch = await until_over(client, await create(client, chats(1)))
        answer = await raw.get(f"{h.http_url}/v1/batches/{batch.id}")
        answer_of_file = await raw.get(f"{h.http_url}/v1/files/{batch.input_file_id}")
        lists = {path: (await raw.get(f"{h.http_url}/v1/{path}")).json() for path in ("batches", "files")}
    _ = Batch.model_validate_json(answer.content, strict=True)
    _ = FileObject.model_validate_json(answer_of_file.content, strict=True)
    found, file = answer.json(), answer_of_file.json()
    assert set(found) == set(Batch.model_fields)
    assert [name for name, value in found.items() if value is None] == [
        *("errors", "error_file_id", "failed_at", "expired_at", "cancelled_at", "cancelling_at", "metadata")
    ]
    assert set(file) == set(FileObject.model_fields)
    assert lists["batches"] == {
        "object": "list",
        "data": [found],
        "first_id": batch.id,
        "last_id": batch.id,
        "has_more": False,
    }
    ids = [one["id"] for one in lists["files"]["data"]]
    assert ids == [batch.output_file_id, batch.input_file_id]
    assert (lists["files"]["first_id"], lists["files"]["last_id"]) == (ids[0], ids[1])


async def test_the_model_of_a_batch(tmp_path: Path) -> None:
    """That of all its lines, once they were looked at, and after its end too; no other."""
    several = [chat("a"), chat("b", model="fake-think")]
    async with served(tmp_path) as (_, client):
        alike, mixed, gone = [
            await create(client, lines)
            for lines in ([*chats(2), chat("wrong", temperature=-1.0)], several, [chat("a", model="absent")])
        ]
        assert alike.model is mixed.model is None
        ended = [await until_over(client, batch) for batch in (alike, mixed, gone)]
        assert [batch.model for batch in ended] == ["fake", None, "absent"]
        assert [batch.status for batch in ended] == ["completed"] * 3
        assert [batch.model async for batch in client.batches.list()] == ["absent", None, "fake"]


async def test_the_other_endpoints(tmp_path: Path) -> None:
    """Prompts, and embeddings; several models in a file; and a default one."""
    prompts = [
        line("a", {"model": "fake", "prompt": "Once", "max_tokens": 2}, url="/v1/completions"),
        line("b", {"prompt": "Twice", "max_tokens": 2}, url="/v1/completions"),
    ]
    texts = [line("v", {"model": "fake-embed", "input": ["one", "two"]}, url="/v1/embeddings")]
    async with served(tmp_path, settings={"default_model": "fake"}) as (_, client):
        first = await until_over(client, await create(client, prompts, endpoint="/v1/completions"))
        second = await until_over(client, await create(client, texts, endpoint="/v1/embeddings"))
        completions = await lines_of(client, first.output_file_id)
        vectors = await lines_of(client, second.output_file_id)
    for custom_id in "ab":
        body = Completion.model_validate_json(json.dumps(completions[custom_id]["response"]["body"]), strict=True)
        assert body.choices[0].text
        assert body.model == "fake:latest"
    made = CreateEmbeddingResponse.model_validate_json(json.dumps(vectors["v"]["response"]["body"]), strict=True)
    assert [one.index for one in made.data] == [0, 1]
    assert len(made.data[0].embedding) == len(made.data[1].embedding) > 0


async def test_what_fails_goes_to_the_file_of_errors(tmp_path: Path) -> None:
    """With its status and the error inside the body; the others run."""
    lines = [
        *chats(3),
        chat("gone", model="absent"),
        chat("wrong", temperature=-1.0),
        line("odd", {"model": "fake", "messages": [{"role": "nobody", "content": "?"}]}),
        line("none", {"model": "fake"}),
    ]
    async with served(tmp_path) as (_, client):
        batch = await until_over(client, await create(client, lines))
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 7, "completed": 3, "failed": 4}
        assert set(await lines_of(client, batch.output_file_id)) == {"i0", "i1", "i2"}
        failed = await lines_of(client, batch.error_file_id)
    assert {name: one["response"]["status_code"] for name, one in failed.items()} == {
        "gone": 404,
        "wrong": 400,
        "odd": 400,
        "none": 400,
    }
    assert all(one["error"] is None for one in failed.values())
    errors = {name: one["response"]["body"]["error"] for name, one in failed.items()}
    assert all(set(one) == {"message", "type", "param", "code"} for one in errors.values())
    assert (errors["gone"]["code"], errors["gone"]["type"]) == ("model_not_found", "invalid_request_error")
    assert {name: errors[name]["param"] for name in ("wrong", "odd", "none")} == {
        "wrong": "temperature",
        "odd": "messages[0].role",
        "none": "messages",
    }


async def test_a_batch_whose_every_line_failed_is_completed(tmp_path: Path) -> None:
    """Without a file of answers."""
    async with served(tmp_path) as (_, client):
        batch = await until_over(client, await create(client, [chat("a", model="absent")]))
        assert (batch.status, batch.output_file_id) == ("completed", None)
        assert set(await lines_of(client, batch.error_file_id)) == {"a"}


async def test_a_large_answer_is_whole(tmp_path: Path) -> None:
    """Though the journal holds it in parts."""
    pieces = ("x" * 600_000,) * 8
    async with served(tmp_path) as (h, client):
        h.fake.answer("the book", Answer(content=pieces))
        batch = await until_over(
            client, await create(client, [chat("large", "the book", max_tokens=20), chat("small")])
        )
        found = await lines_of(client, batch.output_file_id)
    assert found["large"]["response"]["body"]["choices"][0]["message"]["content"] == "".join(pieces)
    assert len(found["small"]["response"]["body"]["choices"][0]["message"]["content"]) < 100


async def test_the_caller_s_trace_goes_on(
    tmp_path: Path, otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the header of the request that created the batch, to its items; the key of that request is not kept."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint)
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with served(tmp_path) as (_, client):
        headers = {"traceparent": f"00-{trace}-{caller}-01"}
        _ = await until_over(client, await create(client, chats(1), extra_headers=headers))
    spans = await asyncio.to_thread(otlp.wait_for, lambda spans: len(spans) >= 3)
    (root,) = [span for span in spans if span.name == "POST /v1/batches"]
    assert (root.trace_id, root.parent_id) == (trace, caller)
    assert root.attributes["http.route"] == "/v1/batches"
    assert "rpc.method" not in root.attributes
    assert {span.trace_id for span in spans} == {trace}
    assert b"Bearer" not in (tmp_path / "journal.sqlite3").read_bytes()


# -- Files that are no batch -----------------------------------------------------------------------------------


async def test_what_is_wrong_with_a_file_is_told_by_line(tmp_path: Path) -> None:
    """Nothing runs, and nothing is kept but that."""
    lines = [
        chat("a"),
        "no JSON",
        "",
        chat("a"),
        chat("b", stream=True),
        line("c", {"model": "fake", "messages": []}, method="GET"),
        line("d", {"model": "fake", "prompt": "?"}, url="/v1/completions"),
        json.dumps({"method": "POST", "url": CHAT, "body": {}}),
        json.dumps({"custom_id": "e", "method": "POST", "url": CHAT, "body": "text"}),
    ]
    async with served(tmp_path) as (h, client):
        batch = await until_over(client, await create(client, lines))
        assert batch.status == "failed"
        assert batch.failed_at is not None
        assert (batch.in_progress_at, batch.finalizing_at) == (None, None)
        assert (batch.output_file_id, batch.error_file_id) == (None, None)
        assert batch.errors is not None
        found = [(one.line, one.code, one.param) for one in batch.errors.data or ()]
        assert found == [
            (2, "invalid_json_line", None),
            (4, "duplicate_custom_id", "custom_id"),
            (5, "unsupported_value", "body.stream"),
            (6, "invalid_method", "method"),
            (7, "url_mismatch", "url"),
            (8, "missing_required_parameter", "custom_id"),
            (9, "invalid_value", "body"),
        ]
        assert all(one.message for one in batch.errors.data or ())
        assert not h.work
        empty = await until_over(client, await create(client, ["", " "]))
        assert empty.errors is not None
        assert [(one.line, one.code) for one in empty.errors.data or ()] == [(None, "empty_file")]


async def test_too_many_lines(tmp_path: Path) -> None:
    """One more than a batch may have."""
    async with served(tmp_path, settings={"max_items": 30}) as (_, client):
        full = await until_over(client, await create(client, chats(30)))
        batch = await until_over(client, await create(client, chats(31)))
    assert full.status == "completed"
    assert batch.errors is not None
    assert [(one.line, one.code) for one in batch.errors.data or ()] == [(31, "too_many_tasks")]


async def test_a_file_that_was_deleted_before_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch fails, and says why."""
    async with served(tmp_path) as (_, client):
        with slow_checks(monkeypatch):
            first = await create(client, chats(1))
            second = await create(client, chats(1))
            _ = await client.files.delete(second.input_file_id)
        second = await until_over(client, second)
        assert (await until_over(client, first)).status == "completed"
    assert second.errors is not None
    assert [one.code for one in second.errors.data or ()] == ["file_not_found"]


@contextmanager
def slow_checks(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Files are not checked to their end before this is left."""
    go_on = threading.Event()
    end = FileCheck.end

    def slow_end(check: FileCheck) -> None:
        _ = go_on.wait(LIMIT_S)
        end(check)

    with monkeypatch.context() as patched:
        patched.setattr(FileCheck, "end", slow_end)
        try:
            yield
        finally:
            go_on.set()


# -- Ends before the end ---------------------------------------------------------------------------------------


async def test_a_batch_is_cancelled(tmp_path: Path) -> None:
    """What was answered stays; the others never ran, and say so."""
    async with served(tmp_path, pass_s=0.005, num_parallel=3) as (_, client):
        batch = await create(
            client, [*chats(6), chat("long0", LONG, max_tokens=4000), chat("long1", LONG, max_tokens=2000)]
        )
        async with asyncio.timeout(LIMIT_S):
            while not batch.request_counts or batch.request_counts.completed < 1:
                await asyncio.sleep(0.01)
                batch = await client.batches.retrieve(batch.id)
        assert batch.status == "in_progress"
        cancelled = await client.batches.cancel(batch.id)
        assert cancelled.status in ("cancelling", "cancelled")
        assert cancelled.cancelling_at is not None
        batch = await until_over(client, cancelled)
        assert batch.status == "cancelled"
        assert batch.cancelled_at is not None
        assert batch.completed_at is batch.finalizing_at is None
        done = await lines_of(client, batch.output_file_id)
        rest = await lines_of(client, batch.error_file_id)
        assert len(done) + len(rest) == 8
        assert {"long0", "long1"} <= set(rest)
        assert all(one["response"] is None and one["error"]["code"] == "batch_cancelled" for one in rest.values())
        with pytest.raises(openai.ConflictError) as caught:
            _ = await client.batches.cancel(batch.id)
        assert "cancelled" in str(caught.value)


async def test_a_batch_is_cancelled_while_its_file_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it ever runs."""
    async with served(tmp_path) as (h, client):
        with slow_checks(monkeypatch):
            batch = await create(client, chats(3))
            assert (await client.batches.cancel(batch.id)).status == "cancelling"
        batch = await until_over(client, batch)
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("cancelled", None, None)
        assert not h.work


async def test_a_batch_expires(tmp_path: Path) -> None:
    """Whatever has no answer when its window is over; another window than OpenAI's is taken."""
    async with served(tmp_path, pass_s=0.005, num_parallel=2) as (_, client):
        lines = [chat("short"), chat("long0", LONG, max_tokens=4000)]
        batch = await until_over(client, await create(client, lines, window="1s"))
        assert batch.status == "expired"
        assert batch.expired_at is not None
        assert batch.finalizing_at is not None
        assert set(await lines_of(client, batch.output_file_id)) == {"short"}
        rest = await lines_of(client, batch.error_file_id)
    assert set(rest) == {"long0"}
    assert all(one["response"] is None and one["error"]["code"] == "batch_expired" for one in rest.values())


async def test_a_batch_outlives_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its file is checked, while it runs, and while its files are written."""

    async def never(*_: Any) -> None:
        await asyncio.sleep(LIMIT_S)

    async with served(tmp_path, pass_s=0.005) as (_, client):
        with monkeypatch.context() as patched:
            patched.setattr(FileBatches, "_finish", never)
            answered = await create(client, chats(2))
            async with asyncio.timeout(LIMIT_S):
                while answered.status != "finalizing":
                    await asyncio.sleep(0.01)
                    answered = await client.batches.retrieve(answered.id)
        running = await create(client, [chat(f"r{n}", "Go on [[tokens=300]]", max_tokens=300) for n in range(8)])
        async with asyncio.timeout(LIMIT_S):
            while running.status != "in_progress":
                await asyncio.sleep(0.01)
                running = await client.batches.retrieve(running.id)
        monkeypatch.setattr(FileBatches, "_submit", never)
        checked = await create(client, chats(3))
        assert checked.status == "validating"
    monkeypatch.undo()
    async with served(tmp_path, pass_s=0.001) as (_, client):
        for batch, count in ((answered, 2), (running, 8), (checked, 3)):
            ended = await until_over(client, await client.batches.retrieve(batch.id))
            assert ended.status == "completed"
            assert len(await lines_of(client, ended.output_file_id)) == count
        outputs = [file async for file in client.files.list(purpose="batch_output")]
        assert len(outputs) == 3
    known = {path.name for path in (tmp_path / "files").iterdir()}
    assert {file.id for file in outputs} < known
    assert not [name for name in known if name.endswith(".part")]


# -- Lists -----------------------------------------------------------------------------------------------------


async def test_batches_are_listed_page_by_page(tmp_path: Path) -> None:
    """The newest first, as many as are asked for; the package walks through the pages."""
    async with served(tmp_path) as (_, client):
        file_id = await upload(client, chats(1))
        made = [
            await client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
            for _ in range(7)
        ]
        for batch in made:
            _ = await until_over(client, batch)
        page = await client.batches.list(limit=3)
        assert page.has_more
        assert [batch.id for batch in page.data] == [batch.id for batch in reversed(made[4:])]
        walked = [batch.id async for batch in client.batches.list(limit=3)]
        assert walked == [batch.id for batch in reversed(made)]
        last = await client.batches.list(limit=3, after=made[1].id)
        assert ([batch.id for batch in last.data], last.has_more) == ([made[0].id], False)
        with pytest.raises(openai.BadRequestError):
            _ = await client.batches.list(after="batch_none")


async def test_files_are_listed_kept_and_deleted(tmp_path: Path) -> None:
    """In either order; with what they hold, to the byte; and gone when they are deleted."""
    async with served(tmp_path) as (_, client):
        ids = [await upload(client, chats(number + 1)) for number in range(5)]
        assert [file.id async for file in client.files.list(limit=2)] == ids[::-1]
        assert [file.id async for file in client.files.list(limit=2, order="asc")] == ids
        assert [file.id async for file in client.files.list(purpose="batch_output")] == []
        file = await client.files.retrieve(ids[1])
        assert (file.filename, file.purpose, file.status) == ("requests.jsonl", "batch", "processed")
        content = await client.files.content(ids[1])
        assert content.content == ("\n".join(chats(2)) + "\n").encode()
        assert file.bytes == len(content.content)
        assert (await client.files.delete(ids[1])).deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError) as caught:
                _ = await call(ids[1])
            assert ids[1] in str(caught.value)
        with pytest.raises(openai.BadRequestError) as refused:
            _ = await client.batches.create(input_file_id=ids[1], endpoint=CHAT, completion_window="24h")
        assert refused.value.param == "input_file_id"
        assert len(list((tmp_path / "files").iterdir())) == 4


async def test_files_expire_when_they_are_told_to(tmp_path: Path) -> None:
    """Theirs, those of the results, and by default as long as batches are kept."""
    async with served(tmp_path, settings={"retention": 7 * 86_400.0}) as (_, client):
        data = "\n".join(chats(1)).encode()
        file = await client.files.create(
            file=("a.jsonl", data), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7_200}
        )
        assert file.expires_at == file.created_at + 7_200
        usual = await client.files.retrieve(await upload(client, chats(1)))
        assert usual.expires_at == usual.created_at + 7 * 86_400
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window="24h",
            output_expires_after={"anchor": "created_at", "seconds": 3_600},
        )
        batch = await until_over(client, batch)
        output = await client.files.retrieve(batch.output_file_id or "")
        assert output.expires_at == output.created_at + 3_600


async def test_what_is_old_is_deleted(tmp_path: Path) -> None:
    """Its batch, its files, and what lies on the disk."""
    async with served(tmp_path, settings={"retention": 0.0}) as (_, client):
        batch = await until_over(client, await create(client, chats(1)))
        assert batch.output_file_id is not None
    async with served(tmp_path) as (_, client):
        async with asyncio.timeout(LIMIT_S):
            while list((tmp_path / "files").iterdir()):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert [file async for file in client.files.list()] == []
        with pytest.raises(openai.NotFoundError):
            _ = await client.batches.retrieve(batch.id)
