"""The drop-in over a stand-in: requests of single callers share passes; what becomes of them when things go wrong."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.fakes.ollama import FakeModel, FakeOllama, Fault, FaultKind
from tests.integration.service import LIMIT_S, House, chats, house
from unisono.bootstrap import running
from unisono.config import Settings

BUSY = b"server busy, please try again.  maximum pending requests exceeded"


@asynccontextmanager
async def served(**settings: Any) -> AsyncGenerator[tuple[House, httpx.AsyncClient]]:
    """A service over a stand-in, and a client of its HTTP port with as many connections as it likes."""
    limits = httpx.Limits(max_connections=None)
    async with (
        house(with_http=True, **settings) as h,
        httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S, limits=limits, trust_env=False) as client,
    ):
        yield h, client


def chat(text: str = "Hello", *, model: str = "fake", stream: bool | None = None, **options: Any) -> dict[str, Any]:
    """The body of a chat."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], "options": options}
    return body if stream is None else {**body, "stream": stream}


def lines(answer: httpx.Response) -> list[Any]:
    """The lines of a streamed answer."""
    return [json.loads(text) for text in answer.text.splitlines()]


async def several(client: httpx.AsyncClient, count: int, **options: Any) -> list[httpx.Response]:
    """The answers to so many callers at one time."""
    bodies = [chat(str(number), **options) for number in range(count)]
    return await asyncio.gather(*(client.post("/api/chat", json=body) for body in bodies))


def loads(h: House) -> list[Any]:
    """Requests of the service itself that load a model."""
    return [r for r in h.fake.requests if isinstance(r.body, dict) and r.body.get("messages") == []]


async def until(condition: Any) -> None:
    """Waits for something to become so."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - polled
            await asyncio.sleep(0.005)


# -- Shared passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions"])
async def test_sixteen_callers_share_passes(path: str) -> None:
    """Of 16 callers with one request each, on eight slots: two waves, and as many passes as two answers take."""
    async with served(num_parallel=8, pass_s=0.005, settings={"slots": 8}) as (h, client):
        tokens = 20

        def body(number: int) -> dict[str, Any]:
            is_openai, is_chat = path.startswith("/v1"), "chat" in path
            what: dict[str, Any] = {"prompt": f"Question {number}"}
            if is_chat:
                what = {"messages": [{"role": "user", "content": f"Question {number}"}]}
            bound = {"max_tokens": tokens} if is_openai else {"options": {"num_predict": tokens}}
            return {"model": "fake", "stream": True, **what, **bound}

        assert (await client.post(path, json=body(99))).status_code == 200
        before = h.fake.passes
        answers = await asyncio.gather(*(client.post(path, json=body(number)) for number in range(16)))
        assert {answer.status_code for answer in answers} == {200}
        # Two waves of 20 tokens, and a pass for each wave's prompts; by themselves they were 320 passes.
        assert h.fake.passes - before <= 3 * tokens
        await until(lambda: not h.batches._batches)


async def test_switched_off_each_goes_at_once() -> None:
    """OLLAMA_BATCH_ENABLED=off: nobody waits for company."""
    async with served(settings={"batch_enabled": False, "slots": 4}, pass_s=0.002) as (_, client):
        answers = await several(client, 8, num_predict=2)
        assert all(lines(answer)[-1]["done"] for answer in answers)


async def test_batches_and_callers_are_one_queue() -> None:
    """A forwarded request goes into the slots between a batch's items, and its answer is whole."""
    async with served(num_parallel=4, pass_s=0.002, settings={"slots": 4}) as (h, client):
        call = h.run_batch(chats(40, num_predict=10))
        await call.until("released")
        answer = await client.post("/api/chat", json=chat("In between", num_predict=10))
        assert lines(answer)[-1]["done"]
        await call.until("result")
        seen = await call.to_end()
        assert set(seen.states().values()) == {"COMPLETED"}
        assert h.fake.loads == 1


async def test_a_context_of_a_batch_s_own_does_not_reload_each_time() -> None:
    """Callers that say no num_ctx mean the backend's default; beside a batch with another, it is loaded by turns."""
    async with served(num_parallel=4, pass_s=0.001, settings={"slots": 4}) as (h, client):
        for _ in range(3):
            assert (await client.post("/api/chat", json=chat("a", num_predict=2))).status_code == 200
        assert h.fake.loads == 1
        seen = await h.run([*chats(8, num_predict=2, runner={"num_ctx": 8192})])
        assert set(seen.states().values()) == {"COMPLETED"}
        assert h.fake.loads == 2
        answers = await several(client, 8, num_predict=2)
        assert all(lines(answer)[-1]["done"] for answer in answers)
        # Once back to the default, for all of them.
        assert h.fake.loads == 3
        # What a batch that asks for nothing gets is what is there: no load either.
        seen = await h.run(chats(4, num_predict=2))
        assert h.fake.loads == 3
        # The default by its name is the default.
        answer = await client.post("/api/chat", json=chat("b", num_predict=2, num_ctx=4096))
        assert lines(answer)[-1]["done"]
        assert h.fake.loads == 3


async def test_how_long_a_model_stays_is_the_backend_s_own_setting() -> None:
    """What is loaded for a forwarded request says nothing of keep_alive."""
    async with served() as (h, client):
        assert (await client.post("/api/chat", json=chat(num_predict=1))).status_code == 200
        (load,) = loads(h)
        assert "keep_alive" not in load.body


async def test_unload_and_load_go_plainly() -> None:
    """An empty chat loads, and keep_alive 0 unloads: the backend's own answers."""
    async with served() as (_, client):
        answer = await client.post("/api/chat", json={"model": "fake", "messages": [], "stream": False})
        assert answer.json()["done_reason"] == "load"
        answer = await client.post("/api/generate", json={"model": "fake", "keep_alive": 0})
        assert lines(answer)[-1]["done_reason"] == "unload"
        assert (await client.get("/api/ps")).json() == {"models": []}


# -- What goes wrong -------------------------------------------------------------------------------------------


async def test_a_runner_that_dies_in_the_middle() -> None:
    """What the caller sees is what it would have seen: an error line after some tokens; nothing is tried again."""
    async with served(settings={"slots": 4}) as (h, client):
        h.fake.faults.add(Fault(FaultKind.KILL_RUNNER, path="/api/chat", after_lines=3, when=is_asked))
        answer = await client.post("/api/chat", json=chat(num_predict=50))
        said = lines(answer)
        assert answer.status_code == 200
        assert "done" in said[0]
        assert list(said[-1]) == ["error"]
        assert len([r for r in h.fake.requests_to("/api/chat") if is_asked(r.body)]) == 1
        h.fake.faults.add(Fault(FaultKind.KILL_RUNNER, path="/api/chat", after_lines=3, when=is_asked))
        answer = await client.post("/api/chat", json=chat(num_predict=50, stream=False))
        assert answer.status_code == 500
        assert list(answer.json()) == ["error"]
        # And the next is answered.
        assert lines(await client.post("/api/chat", json=chat(num_predict=2)))[-1]["done"]


def is_asked(body: Any) -> bool:
    """Whether a request wants an answer."""
    return isinstance(body, dict) and bool(body.get("messages"))


@pytest.mark.parametrize("kind", [FaultKind.CLOSE, FaultKind.RESET])
async def test_a_connection_lost_before_the_answer_is_tried_again(kind: FaultKind) -> None:
    """As for any item."""
    async with served() as (h, client):
        fault = h.fake.faults.add(Fault(kind, path="/api/chat", when=is_asked))
        answer = await client.post("/api/chat", json=chat(num_predict=2))
        assert lines(answer)[-1]["done"]
        assert fault.hits == 1


async def test_a_connection_lost_in_the_middle_is_not() -> None:
    """The caller has part of the answer."""
    async with served() as (h, client):
        h.fake.faults.add(Fault(FaultKind.RESET, path="/api/chat", after_lines=2, when=is_asked))
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/api/chat", json=chat(num_predict=20))
        assert len([r for r in h.fake.requests_to("/api/chat") if is_asked(r.body)]) == 1


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/api/chat", chat()), ("/v1/chat/completions", chat()), ("/api/tags", None), ("/v1/models", None)],
)
async def test_a_backend_that_is_away(path: str, asked: dict[str, Any] | None) -> None:
    """After the patience that was set: 503, in the shape of that API."""
    async with served(starts_away=True, settings={"backend_patience": 0.2}) as (_, client):
        began = time.monotonic()
        answer = await (client.get(path) if asked is None else client.post(path, json=asked))
        assert time.monotonic() - began < 5
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert ("message" in error) if path.startswith("/v1") else isinstance(error, str)


async def test_a_backend_that_comes_back_in_time() -> None:
    """The request has waited, and is answered."""
    async with served(starts_away=True) as (h, client):
        asking = asyncio.ensure_future(client.post("/api/chat", json=chat(num_predict=2)))
        await asyncio.sleep(0.3)
        await h.fake.come_back()
        assert lines(await asking)[-1]["done"]


async def test_a_caller_that_leaves_while_it_waits() -> None:
    """Nothing of it is sent, and its place is free."""
    async with served(starts_away=True, settings={"max_forwarded": 1}) as (h, client):
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/api/chat", json=chat(), timeout=0.2)
        await until(lambda: not h.batches._batches)
        await h.fake.come_back()
        assert (await client.post("/api/chat", json=chat(num_predict=1))).status_code == 200


async def test_what_is_asked_last_is_whole_when_the_service_ends() -> None:
    """A drain lets answers end."""
    async with FakeOllama(pass_s=0.01) as fake:
        settings = Settings(
            listen="127.0.0.1:0", http_listen="127.0.0.1:0", ollama_url=fake.url, state_dir="none", data_dir="none"
        )
        async with httpx.AsyncClient(timeout=LIMIT_S, trust_env=False) as client:
            async with running(settings, with_http=True) as service:
                url = f"{service.http_url}/api/chat"
                asking = asyncio.ensure_future(client.post(url, json=chat(num_predict=30)))
                await until(lambda: fake.passes > 3)
            assert lines(await asking)[-1]["done"]


# -- Limits ----------------------------------------------------------------------------------------------------


async def test_more_than_may_be_under_way() -> None:
    """503 in Ollama's words, or in OpenAI's shape; the others are answered."""
    async with served(settings={"max_forwarded": 4, "slots": 1}, pass_s=0.02, num_parallel=1) as (h, client):
        some = [asyncio.ensure_future(client.post("/api/chat", json=chat(str(n), num_predict=10))) for n in range(4)]
        await until(lambda: len(h.batches._batches) == 4)
        answer = await client.post("/api/chat", json=chat())
        assert answer.status_code == 503
        assert answer.json() == {"error": BUSY.decode()}
        answer = await client.post("/v1/chat/completions", json=chat())
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, BUSY.decode())
        assert all(lines(one)[-1]["done"] for one in await asyncio.gather(*some))
        assert (await client.post("/api/chat", json=chat(num_predict=1))).status_code == 200


async def test_a_body_that_is_too_large() -> None:
    """The last byte that is taken, and the first that is not."""
    most = 4096
    async with served(settings={"max_forwarded_bytes": most}) as (_, client):
        text = json.dumps(chat(num_predict=1))
        fits = text + " " * (most - len(text))
        assert (await client.post("/api/chat", content=fits)).status_code == 200
        answer = await client.post("/api/chat", content=fits + " ")
        assert answer.status_code == 413
        assert "UNISONO_MAX_FORWARDED_BYTES" in answer.json()["error"]


async def test_callers_do_not_take_the_places_of_batches() -> None:
    """The limit of batches is not theirs."""
    async with served(settings={"max_batches": 1, "slots": 4}, pass_s=0.002) as (h, client):
        answers = await several(client, 8, num_predict=5)
        assert {answer.status_code for answer in answers} == {200}
        assert h.batches.running == 0


# -- The rest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "path"),
    [
        ("pull", "POST", "/api/pull"),
        ("create", "POST", "/api/create"),
        ("push", "POST", "/api/push"),
        ("copy", "POST", "/api/copy"),
        ("delete", "DELETE", "/api/delete"),
        ("blobs", "POST", "/api/blobs/sha256:00"),
        ("blobs", "HEAD", "/api/blobs/sha256:00"),
    ],
)
async def test_what_changes_the_server_is_refused_unless_allowed(name: str, method: str, path: str) -> None:
    """403 with the setting's name; allowed, the backend's own answer."""
    body = json.dumps({"model": "fake"}) if method != "HEAD" else None
    async with served() as (h, client):
        answer = await client.request(method, path, content=body)
        assert answer.status_code == 403
        if method != "HEAD":
            assert f"UNISONO_ALLOW={name}" in answer.json()["error"]
        assert not h.fake.requests_to(path)
    async with served(settings={"allow": name}) as (h, client):
        answer = await client.request(method, path, content=body)
        # The stand-in has no such path.
        assert answer.status_code == 404
        assert len(h.fake.requests_to(path)) == 1


async def test_a_blob_of_any_size_goes_through() -> None:
    """Larger than a body may be, and passed on as it comes."""
    piece, count = bytes(range(256)) * 256, 100

    async def pieces() -> AsyncGenerator[bytes, None]:
        for _ in range(count):
            yield piece

    async with served(settings={"allow": "blobs, pull", "max_forwarded_bytes": 4096}) as (h, client):
        for headers in ({}, {"content-length": str(len(piece) * count)}):
            answer = await client.post("/api/blobs/sha256:00", content=pieces(), headers=headers)
            assert answer.status_code == 404
        assert len(h.fake.requests_to("/api/blobs/sha256:00")) == 2


async def test_several_backends() -> None:
    """Lists are put together; what is about a model goes to the backend that has it; so do requests for answers."""
    models = [FakeModel(name="other"), FakeModel(name="fake")]
    async with FakeOllama(models, version="0.99.0") as second, served() as (h, client):
        assert len((await client.get("/api/tags")).json()["models"]) == len(h.fake._models)
        backends = f"one={h.fake.url}, two={second.url}"
        settings = Settings(
            listen="127.0.0.1:0",
            http_listen="127.0.0.1:0",
            backends=backends,  # type: ignore[arg-type]  # as it is written in the environment
            state_dir="none",
            data_dir="none",
            drain=0.0,
        )
        async with (
            running(settings, with_http=True) as service,
            httpx.AsyncClient(base_url=service.http_url, timeout=LIMIT_S, trust_env=False) as both,
        ):
            names = [model["name"] for model in (await both.get("/api/tags")).json()["models"]]
            assert len(names) == len(set(names)) == len(h.fake._models) + 1
            found = await both.get("/v1/models")
            assert "other:latest" in [model["id"] for model in found.json()["data"]]
            assert (await both.get("/v1/models/other")).json()["id"] == "other"
            assert (await both.post("/api/show", json={"model": "other"})).status_code == 200
            assert len(second.requests_to("/api/show")) >= 1
            assert (await both.get("/api/version")).json() == {"version": h.fake.version}
            answer = await both.post("/api/chat", json=chat(model="other", num_predict=2))
            assert lines(answer)[-1]["done"]
            running_now = (await both.get("/api/ps")).json()["models"]
            assert [model["name"] for model in running_now] == ["other:latest"]
            assert (await both.post("/api/chat", json=chat(model="none", num_predict=2))).status_code == 404
            # One that is away is left out of lists.
            await second.go_away()
            names = [model["name"] for model in (await both.get("/api/tags")).json()["models"]]
            assert "other:latest" not in names
            assert "fake:latest" in names


async def test_no_ollama_behind_it() -> None:
    """A llama.cpp server does not speak Ollama's API: 501, in its shape, with what to do."""
    async with FakeOllama() as fake:
        settings = Settings(
            listen="127.0.0.1:0",
            http_listen="127.0.0.1:0",
            llama_server_url=fake.url,
            state_dir="none",
            data_dir="none",
            backend_patience=0.1,
            drain=0.0,
        )
        async with (
            running(settings, with_http=True) as service,
            httpx.AsyncClient(base_url=service.http_url, timeout=LIMIT_S, trust_env=False) as client,
        ):
            for answer in (
                await client.post("/api/chat", json=chat()),
                await client.get("/api/tags"),
                await client.get("/"),
            ):
                assert answer.status_code == 501
                assert "/v1" in answer.json()["error"]
            assert (await client.get("/v1/models")).status_code == 200
