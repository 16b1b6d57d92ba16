"""The Ollama backend as the application sees it: models, runners, loading, and calls to their end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.adapters.raw_server import LIMIT_S, STREAM_HEAD, Connection, RawServer, chunked, raw_server
from tests.unit.adapters.wire import recording
from unisono.adapters.ollama import OllamaBackend, parse_host
from unisono.adapters.ollama.host import normalised
from unisono.app.ports import Backend, HeldCall
from unisono.core.errors import (
    BackendUnavailableError,
    BadAnswerError,
    ConnectionLostError,
    LoadFailedError,
    ModelLacksCapabilityError,
    ModelNotFoundError,
    NotAuthorizedError,
    UnisonoError,
)
from unisono.core.model import (
    ChatRequest,
    Finished,
    Item,
    LoadedRunner,
    Message,
    PassMethod,
    Role,
    RunnerOptions,
    RunnerSpec,
    Spoke,
)

DIGEST = "fdc5049875c5d1fb5484c3ac60424b846e70f975d778e3417653b4ce020cf80c"
RUNNER = RunnerSpec(backend="here", model="smollm2:135m", digest=DIGEST)
ITEM = Item(item_id="a", index=0, request=ChatRequest(messages=(Message(role=Role.USER, content="hi"),)))


class Ollama:
    """Answers each path with a recording, or what a test puts in its place."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {
            "/api/version": (200, recording("version").body),
            "/api/tags": (200, recording("tags").body),
            "/api/show": (404, recording("error_model_missing").body),
            "/api/ps": (200, recording("ps_one").body),
            "/api/chat": (200, recording("load").body),
            "/api/embed": (200, recording("load_embed").body),
        }
        self.asked: list[tuple[str, Any]] = []
        self.heads: list[bytes] = []

    async def answer(self, seen: Connection) -> None:
        """Answers a request."""
        await seen.until_whole()
        path = seen.head.split(b" ")[1].decode()
        self.asked.append((path, json.loads(seen.body) if seen.body else None))
        self.heads.append(seen.head)
        status, body = self.answers[path]
        await seen.say_json(body, status)
        seen.close()


@pytest.fixture
def ollama() -> Ollama:
    """What the server says."""
    return Ollama()


@pytest.fixture
async def server(ollama: Ollama) -> AsyncIterator[RawServer]:
    """The server that says it."""
    async with raw_server(ollama.answer) as running:
        yield running


@pytest.fixture
async def backend(server: RawServer) -> AsyncIterator[OllamaBackend]:
    """The backend under test."""
    made = OllamaBackend(name="here", url=f"127.0.0.1:{server.port}", headers={"Authorization": "Bearer abc"})
    yield made
    await made.close()


# -- Addresses and names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:8080", "http://127.0.0.1:8080"),
        (":8080", "http://127.0.0.1:8080"),
        ("example.com", "http://example.com:11434"),
        ("http://example.com", "http://example.com"),
        ("https://example.com", "https://example.com"),
        ("https://example.com/ollama", "https://example.com/ollama"),
        ("ollama.com", "https://ollama.com"),
        ("[::1]", "http://[::1]:11434"),
        ("::", "http://[::1]:11434"),
    ],
)
def test_ollama_host(text: str, url: str) -> None:
    """OLLAMA_HOST means what it means to Ollama's own client."""
    assert parse_host(text).url == url


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("llama3", "llama3:latest"),
        ("LLama3:8B", "llama3:8b"),
        ("library/llama3", "llama3:latest"),
        ("registry.ollama.ai/library/llama3:8b", "llama3:8b"),
        ("me/mine", "me/mine:latest"),
        ("hf.co/me/mine:Q4", "hf.co/me/mine:q4"),
        ("localhost:5000/me/mine", "localhost:5000/me/mine:latest"),
    ],
)
def test_names_in_full(name: str, full: str) -> None:
    """A name is the same with and without what it may leave out; a port is no tag."""
    assert normalised(name) == full


async def test_what_it_is(backend: OllamaBackend, server: RawServer) -> None:
    """It is the port that it claims to be, and tells its address without credentials."""
    port: Backend = backend
    assert (port.name, port.kind, port.url) == ("here", "ollama", f"http://127.0.0.1:{server.port}")
    assert port.pass_method is PassMethod.CREATED_AT
    guarded = OllamaBackend(url="http://me:secret@example.com")
    assert guarded.url == "http://example.com"
    await guarded.close()
    with pytest.raises(ValueError):
        OllamaBackend(url="ftp://example.com")


# -- Models and runners --------------------------------------------------------------------------------------------


async def test_version(backend: OllamaBackend, ollama: Ollama) -> None:
    """The version proves that it answers; the configured headers go with every question."""
    assert await backend.version() == "0.32.15"
    assert b"\r\nAuthorization: Bearer abc" in ollama.heads[0]


async def test_models(backend: OllamaBackend) -> None:
    """Everything that /api/tags tells of a model."""
    smol, small, tiny = await backend.models()
    assert (smol.name, small.name, tiny.name) == ("smollm2:135m", "small:latest", "tiny:latest")
    assert (smol.backend, smol.digest, smol.family, smol.parameter_size) == ("here", DIGEST, "llama", "134.52M")
    assert (smol.quantization, smol.context_length, smol.size_bytes) == ("Q4_1", 8192, 98362913)
    assert smol.capabilities == frozenset({"completion"})
    assert not smol.is_embedding


@pytest.mark.parametrize("name", ["smollm2:135m", "SmolLM2:135M", "registry.ollama.ai/library/smollm2:135m"])
async def test_a_model_is_found_under_its_names(backend: OllamaBackend, ollama: Ollama, name: str) -> None:
    """Names that differ only in what Ollama ignores are one model, with one digest."""
    assert (await backend.find_model(name)).digest == DIGEST
    assert [path for path, _ in ollama.asked] == ["/api/tags", "/api/show"]


async def test_what_a_token_takes_is_asked_once_for_each_digest(backend: OllamaBackend, ollama: Ollama) -> None:
    """Only /api/show tells what an estimate of memory needs; without an answer the model is as good."""
    assert (await backend.find_model("smollm2:135m")).kv_bytes_per_token is None
    ollama.answers["/api/show"] = (200, recording("show").body)
    for _ in range(3):
        assert (await backend.find_model("smollm2:135m")).kv_bytes_per_token == 23_040
    assert [path for path, _ in ollama.asked].count("/api/show") == 2
    assert (await backend.find_model("hidden")).kv_bytes_per_token == 23_040


@pytest.mark.parametrize(
    ("parameters", "modelfile", "layers", "drafted"),
    [
        pytest.param('stop    "<|im_end|>"\ndraft_num_predict              2', "", None, 2, id="by its Modelfile"),
        pytest.param("draft_num_predict              0", "", 1, 0, id="not, by its Modelfile"),
        pytest.param("draft_num_predict              3.0", "", None, 3, id="a number with a fraction"),
        pytest.param(
            "num_ctx 4096", f"FROM /m/sha256-{DIGEST}\nDRAFT /m/sha256-{DIGEST}\n", None, 4, id="draft model"
        ),
        pytest.param("", f'DRAFT "C:\\my models\\sha256-{DIGEST}"\r\n', None, 4, id="draft model, quoted"),
        pytest.param("", 'SYSTEM """\nDRAFT letters.\n"""', None, 0, id="a word"),
        pytest.param("", "", 1, 4, id="layers of its own"),
        pytest.param("", "", "one", 0, id="no number"),
        pytest.param("", "", None, 0, id="nothing"),
    ],
)
async def test_what_a_model_drafts(  # noqa: PLR0917 - what is told, and what follows
    backend: OllamaBackend, ollama: Ollama, parameters: str, modelfile: str, layers: Any, drafted: int
) -> None:
    """A model that drafts tells it in /api/show: its parameter, a draft model beside it, or layers for it."""
    facts = {"general.architecture": "qwen35", "qwen35.nextn_predict_layers": layers}
    told = {"modelfile": modelfile, "parameters": parameters, "model_info": facts}
    ollama.answers["/api/show"] = (200, json.dumps(told).encode())
    assert (await backend.find_model("tiny")).draft_num_predict == drafted


async def test_what_is_remembered_of_models_is_bounded(
    backend: OllamaBackend, ollama: Ollama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose models come and go does not fill the memory."""
    monkeypatch.setattr("unisono.adapters.ollama.client._MOST_REMEMBERED", 1)
    ollama.answers["/api/show"] = (200, recording("show").body)
    for name in ("smollm2:135m", "tiny", "smollm2:135m"):
        await backend.find_model(name)
    assert [path for path, _ in ollama.asked].count("/api/show") == 3


async def test_a_model_without_a_tag_is_the_latest(backend: OllamaBackend) -> None:
    """As everywhere with Ollama."""
    assert (await backend.find_model("tiny")).name == "tiny:latest"


async def test_a_model_that_only_show_knows(backend: OllamaBackend, ollama: Ollama) -> None:
    """What /api/tags does not list is asked for by name; the name stands for the digest that is not told."""
    ollama.answers["/api/show"] = (200, recording("show").body)
    model = await backend.find_model("hidden")
    assert (model.name, model.digest, model.family, model.context_length) == ("hidden", "hidden", "llama", 8192)
    assert model.capabilities == frozenset({"completion"})


async def test_a_model_that_is_not_there(backend: OllamaBackend) -> None:
    """The error says how to get it."""
    with pytest.raises(ModelNotFoundError, match="ollama pull nosuch") as caught:
        await backend.find_model("nosuch")
    assert caught.value.metadata["model"] == "nosuch"


async def test_no_model_named(backend: OllamaBackend, ollama: Ollama) -> None:
    """Nothing named is the only model there is; where there are several, they are listed."""
    with pytest.raises(ModelNotFoundError, match="smollm2:135m, small:latest, tiny:latest"):
        await backend.find_model("")
    tags = json.loads(recording("tags").body)
    ollama.answers["/api/tags"] = (200, json.dumps({"models": tags["models"][:1]}).encode())
    assert (await backend.find_model(" ")).name == "smollm2:135m"
    ollama.answers["/api/tags"] = (200, b'{"models":null}')
    with pytest.raises(ModelNotFoundError, match="none"):
        await backend.find_model("")


async def test_loaded(backend: OllamaBackend, ollama: Ollama) -> None:
    """Everything that /api/ps tells of a runner; a time that is none is left out."""
    (runner,) = await backend.loaded()
    assert (runner.model, runner.digest, runner.context_length) == ("smollm2:135m", DIGEST, 4096)
    assert (runner.size_bytes, runner.size_vram_bytes, runner.slots) == (98362432, 98362432, None)
    assert runner.expires_at_ns == 1_795_254_006_218_960_103
    ollama.answers["/api/ps"] = (200, recording("ps_none").body)
    assert await backend.loaded() == ()
    ollama.answers["/api/ps"] = (200, b'{"models":[{"name":"a","expires_at":"never"}]}')
    assert (await backend.loaded())[0].expires_at_ns is None


# -- Loading -------------------------------------------------------------------------------------------------------


async def test_a_load_finds_its_runner(backend: OllamaBackend, ollama: Ollama) -> None:
    """A runner of the same digest, with as much context as is asked for, was loaded already."""
    outcome = await backend.load(RUNNER, keep_alive_s=300)
    assert outcome.was_loaded
    assert outcome.context_tokens == 4096
    assert ollama.asked[-2] == (
        "/api/chat",
        {"model": "smollm2:135m", "keep_alive": 300, "messages": [], "stream": False},
    )
    same = RunnerSpec(backend="here", model="x", digest=DIGEST, options=RunnerOptions(num_ctx=4096))
    assert (await backend.load(same, keep_alive_s=300)).was_loaded


@pytest.mark.parametrize(
    "runner",
    [
        RunnerSpec(backend="here", model="x", digest="other"),
        RunnerSpec(backend="here", model="x", digest=DIGEST, options=RunnerOptions(num_ctx=8192)),
    ],
)
async def test_a_load_that_loads(backend: OllamaBackend, ollama: Ollama, runner: RunnerSpec) -> None:
    """Another digest or another context is another runner."""
    outcome = await backend.load(runner, keep_alive_s=1.5)
    assert not outcome.was_loaded
    assert outcome.slots is None
    assert 0 < outcome.duration_s < LIMIT_S
    assert ollama.asked[-2][1]["keep_alive"] == 1.5
    assert outcome.context_tokens == (4096 if runner.digest == DIGEST else 0)


async def test_a_load_whose_context_cannot_be_had(backend: OllamaBackend) -> None:
    """The runner is ready; that /api/ps fails afterwards is no failed load."""
    ask = backend.loaded
    seen: list[str] = []

    async def loaded() -> tuple[LoadedRunner, ...]:
        seen.append("/api/ps")
        if len(seen) > 1:
            raise BadAnswerError("broken")
        return await ask()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "loaded", loaded)
        assert (await backend.load(RUNNER, keep_alive_s=300)).context_tokens == 0
    assert len(seen) == 2


async def test_an_embedding_model_is_loaded_by_an_empty_embedding(backend: OllamaBackend, ollama: Ollama) -> None:
    """It does not chat."""
    runner = RunnerSpec(backend="here", model="t-emb", digest="e", is_embedding=True)
    await backend.load(runner, keep_alive_s=60)
    assert ollama.asked[-2] == ("/api/embed", {"model": "t-emb", "keep_alive": 60})


async def test_a_model_whose_capabilities_nobody_knew(backend: OllamaBackend, ollama: Ollama) -> None:
    """One that turns out not to chat is loaded by an embedding after all; an embedding model is not asked twice."""
    ollama.answers["/api/chat"] = (400, recording("error_embedding_chat").body)
    await backend.load(RUNNER, keep_alive_s=60)
    assert [path for path, _ in ollama.asked] == ["/api/ps", "/api/chat", "/api/embed", "/api/ps"]
    ollama.answers["/api/embed"] = (501, recording("embed_unsupported").body)
    with pytest.raises(ModelLacksCapabilityError):
        await backend.load(RunnerSpec(backend="here", model="x", digest="e", is_embedding=True), keep_alive_s=60)


async def test_a_load_that_fails(backend: OllamaBackend, ollama: Ollama) -> None:
    """Whatever a load dies of is a failed load."""
    ollama.answers["/api/chat"] = (500, b'{"error":"llama-server process has terminated: signal: killed"}')
    with pytest.raises(LoadFailedError):
        await backend.load(RUNNER, keep_alive_s=60)
    ollama.answers["/api/chat"] = (500, b'{"error":"who knows"}')
    with pytest.raises(LoadFailedError):
        await backend.load(RUNNER, keep_alive_s=60)


async def test_a_cancelled_load_is_taken_back(backend: OllamaBackend, server: RawServer) -> None:
    """A load is given up only where its task is cancelled; then its connection closes, and Ollama stops loading."""
    hold = asyncio.Event()

    async def slow(seen: Connection) -> None:
        await seen.until_whole()
        if b"/api/ps" in seen.head:
            await seen.say_json(b'{"models":[]}')
        else:
            await hold.wait()

    server.handler = slow
    loading = asyncio.create_task(backend.load(RUNNER, keep_alive_s=60))
    seen = await server.connection(1)
    await seen.until_whole()
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await seen.until_closed()
    hold.set()


async def test_unload(backend: OllamaBackend, ollama: Ollama) -> None:
    """An empty chat with a keep_alive of zero, for every kind of model."""
    ollama.answers["/api/chat"] = (200, recording("unload").body)
    await backend.unload(RUNNER)
    assert ollama.asked == [
        ("/api/chat", {"model": "smollm2:135m", "keep_alive": 0, "messages": [], "stream": False})
    ]


# -- What can go wrong with a plain question -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, b"<html>hello</html>", BadAnswerError),
        (200, b'{"models":5}', BadAnswerError),
        (200, b'{"models":[{"name":"\xff"}]}', BadAnswerError),
        (401, b"", NotAuthorizedError),
        (502, b"<html>", BackendUnavailableError),
    ],
)
async def test_plain_questions_fail_in_our_words(
    backend: OllamaBackend, ollama: Ollama, status: int, body: bytes, kind: type[UnisonoError]
) -> None:
    """Whatever answers, the application meets classes of its own."""
    ollama.answers["/api/tags"] = (status, body)
    with pytest.raises(kind):
        await backend.models()


async def test_a_backend_that_is_away(server: RawServer) -> None:
    """Nobody there, or nobody who answers: unavailable or lost, and never anything else."""
    away = OllamaBackend(name="here", url="127.0.0.1:9")
    with pytest.raises(BackendUnavailableError):
        await away.version()
    with pytest.raises(BackendUnavailableError):
        await away.stage(ITEM, RUNNER, {})
    await away.close()

    async def silent(seen: Connection) -> None:
        await seen.until_closed()

    server.handler = silent
    mute = OllamaBackend(name="here", url=f"127.0.0.1:{server.port}", answer_timeout_s=0.05)
    with pytest.raises(ConnectionLostError):
        await mute.version()
    await mute.close()


# -- Calls ---------------------------------------------------------------------------------------------------------


async def stream_slowly(seen: Connection) -> None:
    """Says one word, and then nothing until the other side closes."""
    await seen.until_whole()
    word = b'{"message":{"content":"a"},"created_at":"2026-11-21T09:35:06Z","done":false}\n'
    await seen.say(STREAM_HEAD + chunked(word, ends=False))
    await seen.until_closed()


async def test_a_call_to_its_end(backend: OllamaBackend, server: RawServer) -> None:
    """Staged, released, read; the trace goes along; the held time is not in the durations; the connection closes."""
    told = recording("chat_stream").body.replace(b'"total_duration":121838385', b'"total_duration":421838385')

    async def answer(seen: Connection) -> None:
        await seen.until_whole()
        await seen.say(STREAM_HEAD + chunked(told))

    server.handler = answer
    call: HeldCall = await backend.stage(ITEM, RUNNER, {"traceparent": "00-a-b-01"})
    seen = await server.connection()
    await seen.until(lambda: len(seen.body) == seen.content_length - 1)
    assert b"\r\ntraceparent: 00-a-b-01" in seen.head
    assert b"\r\nAuthorization: Bearer abc" in seen.head
    assert not call.is_closed
    await asyncio.sleep(0.3)
    times = backend.release([call])
    assert 0 <= times.spread_s < 1
    pieces = [piece async for piece in call.answer()]
    assert "".join(piece.content for piece in pieces if isinstance(piece, Spoke)) == "The capital of France is Paris"
    last = pieces[-1]
    assert isinstance(last, Finished)
    assert last.durations.total_s is not None
    assert last.durations.total_s <= 0.122
    assert last.durations.load_s == 0.0
    await seen.until_closed()


@pytest.mark.parametrize("how", ["aclose", "cancel", "abort", "close"])
async def test_who_stops_reading_closes_the_connection(server: RawServer, how: str) -> None:
    """Closing the iterator, cancelling its reader, aborting the call or closing the backend: the server sees it."""
    server.handler = stream_slowly
    backend = OllamaBackend(name="here", url=f"127.0.0.1:{server.port}")
    call = await backend.stage(ITEM, RUNNER, {})
    backend.release([call])
    answer = call.answer()
    assert isinstance(await anext(answer), Spoke)
    reading = asyncio.ensure_future(anext(answer))
    await asyncio.sleep(0)
    if how in {"aclose", "cancel"}:
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await answer.aclose()
    else:
        if how == "abort":
            call.abort()
        else:
            await backend.close()
        with pytest.raises(ConnectionLostError):
            await reading
    await (await server.connection()).until_closed()
    assert call.is_closed
    await backend.close()


async def test_a_reader_that_is_cancelled_before_the_answer_begins(backend: OllamaBackend, server: RawServer) -> None:
    """Cancelled while nothing has been said yet, in the long wait for a slot."""

    async def silent(seen: Connection) -> None:
        await seen.until_closed()

    server.handler = silent
    call = await backend.stage(ITEM, RUNNER, {})
    backend.release([call])

    async def read() -> None:
        async with contextlib.aclosing(call.answer()) as answer:
            async for _ in answer:
                pass

    reading = asyncio.create_task(read())
    await (await server.connection()).until_whole()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await (await server.connection()).until_closed()


async def test_a_call_that_nobody_reads(backend: OllamaBackend, server: RawServer) -> None:
    """A call that is staged and forgotten, or aborted unread, leaves nothing behind."""
    server.handler = stream_slowly
    calls = [await backend.stage(ITEM, RUNNER, {}) for _ in range(3)]
    calls[0].abort()
    backend.release(calls[:2])
    await backend.close()
    for index in range(3):
        await (await server.connection(index)).until_closed()
    assert not backend._transport._open


async def test_two_hundred_calls_at_once(backend: OllamaBackend, server: RawServer) -> None:
    """A wave of the size that the design was measured with: each gets its own answer."""
    answered = recording("chat_stream").body

    async def answer(seen: Connection) -> None:
        await seen.until_whole()
        own = json.loads(seen.body)["messages"][0]["content"].encode()
        await seen.say(STREAM_HEAD + chunked(*answered.replace(b" Paris", own).splitlines(keepends=True)))

    server.handler = answer
    items = [
        Item(item_id=str(i), index=i, request=ChatRequest(messages=(Message(role=Role.USER, content=f" no {i}"),)))
        for i in range(200)
    ]
    calls = await asyncio.gather(*[backend.stage(item, RUNNER, {}) for item in items])
    backend.release(calls)

    async def read(call: HeldCall) -> str:
        return "".join([piece.content async for piece in call.answer() if isinstance(piece, Spoke)])

    texts = await asyncio.gather(*[read(call) for call in calls])
    assert texts == [f"The capital of France is no {i}" for i in range(200)]
