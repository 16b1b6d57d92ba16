"""What is asked of a backend directly, and how its answers are read: over the stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.ollama import FakeModel, FakeOllama, Fault, FaultKind
from unisono.bench.backend import OLLAMA, BenchError, ask, look, unload, warm
from unisono.bench.counters import RunnerWatch, find_counters
from unisono.bench.sides import OLLAMA_PACKAGE, RIVALS, direct_sides
from unisono.bench.workloads import Ask, Phase, Sending

ONE = Ask(name="one", system="Be brief.", user="Say something.", num_predict=7, num_ctx=2048)


async def test_a_backend_is_looked_at() -> None:
    """The loaded model comes first, then the smallest; one that only embeds is none; the asked ones as they are."""
    models = [FakeModel(name="big", size=9), FakeModel(name="small", size=1), FakeModel(name="loaded", size=5)]
    async with FakeOllama([*models, FakeModel(name="e", size=0, capabilities=("embedding",))]) as fake:
        first = await look(fake.url)
        await warm(first, "loaded")
        second = await look(fake.url.removeprefix("http://"), slots=3)
        chosen = await look(fake.url, models=("big",))
        with pytest.raises(BenchError, match="no model tiny"):
            await look(fake.url, models=("tiny",))
    assert (first.kind, first.version, first.slots) == (OLLAMA, "0.32.15", None)
    assert first.models == ("small:latest", "loaded:latest", "big:latest")
    assert (second.models[0], second.slots, chosen.models) == ("loaded:latest", 3, ("big",))


async def test_what_is_no_backend_is_said() -> None:
    """An address at which nothing answers, and one at which something else does."""
    with pytest.raises(BenchError, match="nothing answers"):
        await look("127.0.0.1:1")
    async with FakeOllama() as fake:
        fake.faults.add(Fault(FaultKind.ANSWER, path="/api/version", status=404, times=None))
        with pytest.raises(BenchError, match="neither an Ollama nor"):
            await look(fake.url)


@pytest.mark.parametrize("streams", [True, False])
async def test_all_sides_send_the_same(*, streams: bool) -> None:
    """Whole or streamed, and what is answered is read."""
    async with FakeOllama() as fake:
        backend = await look(fake.url, models=("fake",))
        async with backend.client() as client:
            answer = await ask(client, backend, ONE, streams=streams)
        (request,) = fake.requests_to("/api/chat")
    assert request.body == {
        "model": "fake",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}],
        "stream": streams,
        "truncate": False,
        "options": {"temperature": 0, "num_predict": 7, "num_ctx": 2048},
    }
    assert (answer.error, answer.tokens, answer.prompt_tokens) == ("", 7, request.prompt_tokens)
    assert len(answer.times_ns) == (7 if streams else 0)
    assert answer.latency_s > 0


@pytest.mark.parametrize("streams", [True, False])
async def test_what_goes_wrong_is_in_the_answer(*, streams: bool) -> None:
    """A refusal, a connection that is cut, and a stream without an end lose the item, not the bench."""
    async with FakeOllama() as fake:
        backend = await look(fake.url, models=("fake",))
        fake.faults.add(Fault(FaultKind.ANSWER, path="/api/chat"))
        fake.faults.add(Fault(FaultKind.RESET, path="/api/chat", after_lines=2))
        fake.faults.add(Fault(FaultKind.NO_DONE, path="/api/chat"))
        async with backend.client() as client:
            errors = [(await ask(client, backend, ONE, streams=streams)).error for _ in range(3)]
    assert errors[0].startswith("503 ")
    assert all(errors)


async def test_the_sides_answer_each_item() -> None:
    """All ways of a client, as a batch and as callers; a lost item is the side's own loss."""
    asks = tuple(Ask(name=f"{n}", user=f"Number {n}", num_predict=2) for n in range(6))
    async with FakeOllama(num_parallel=2) as fake:
        backend = await look(fake.url, models=("fake",))
        sides, notes = direct_sides(backend, slots=2, streams=False)
        assert not notes
        assert {side.name for side in sides} > set(RIVALS)
        for side in sides:
            for sending in (Sending.BATCH, Sending.CALLERS):
                ran = await side.run(Phase(asks=asks), sending, callers=3)
                assert [answer.name for answer in ran.answers] == [one.name for one in asks]
                assert {(answer.error, answer.tokens) for answer in ran.answers} == {("", 2)}
        for side in sides:
            fake.faults.add(Fault(FaultKind.ANSWER, path="/api/chat", times=2))
            ran = await side.run(Phase(asks=asks), Sending.BATCH, callers=3)
            assert sum(bool(answer.error) for answer in ran.answers) == 2, side.name


async def test_the_package_speaks_to_an_ollama_only() -> None:
    """Why a side is missing is told."""
    async with FakeOllama() as fake:
        backend = await look(fake.url, models=("fake",))
        object.__setattr__(backend, "kind", "llama-server")
        sides, notes = direct_sides(backend, slots=2, streams=False)
    assert OLLAMA_PACKAGE not in {side.name for side in sides}
    assert OLLAMA_PACKAGE in notes[0]


async def test_a_model_can_be_unloaded() -> None:
    """So that a burst meets a cold one."""
    async with FakeOllama() as fake:
        backend = await look(fake.url, models=("fake",))
        await warm(backend, "fake")
        assert fake.runners
        await unload(backend, "fake")
        assert not fake.runners


async def test_counters_are_read_where_they_are() -> None:
    """On the backend's own page; where it has none, nothing is known."""
    async with FakeOllama() as fake:
        backend = await look(fake.url, models=("fake",))
        counters = await find_counters(backend)
        before = await counters.read()
        async with backend.client() as client:
            await ask(client, backend, ONE, streams=False)
        counted = (await counters.read()).since(before)
        assert counters.knows_passes
        assert (counted.passes, counted.loads) == (fake.passes, 1)
        assert counted.prompt_tokens == fake.prompt_tokens_computed


def test_an_ollamas_runners_are_found_among_the_processes(tmp_path: Path) -> None:
    """By their command line; others with a port are left alone."""
    commands = {
        "1": b"/usr/lib/ollama/llama-server\0--model\0m.gguf\0--port\x0040001\0",
        "2": b"vllm\0serve\0--model\0m\0--port\x008000\0",
        "3": b"/usr/bin/ollama\0serve\0",
        "4": b"python3\0/lib/ollama/llama-server\0--port\x0040002\0--model\0m.gguf\0",
        "5": b"ollama\0--model\0m\0--port\0none\0",
    }
    for number, command in commands.items():
        (tmp_path / number).mkdir()
        (tmp_path / number / "cmdline").write_bytes(command)
    (tmp_path / "6").mkdir()
    (tmp_path / "self").mkdir()
    assert RunnerWatch(tmp_path).look() == {1: 40001, 4: 40002}
    assert RunnerWatch(tmp_path / "none").look() == {}
