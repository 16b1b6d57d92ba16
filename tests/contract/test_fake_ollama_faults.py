"""Every scripted fault of the stand-in for Ollama does what it says, and the next request finds it fit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.fakes.ollama import FakeOllama, Fault, FaultKind, Outcome

DIED = {"error": "an error was encountered while running the model: unexpected EOF"}


def chat(text: str = "x [[tokens=6]]", **more: Any) -> dict[str, Any]:
    """A chat of one message."""
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture
async def fake() -> AsyncIterator[FakeOllama]:
    """A server with two slots."""
    async with FakeOllama(num_parallel=2) as server:
        yield server


@pytest.fixture
async def client(fake: FakeOllama) -> AsyncIterator[httpx.AsyncClient]:
    """A client of it; at the end an undisturbed request must still succeed."""
    async with httpx.AsyncClient(base_url=fake.url, timeout=10) as one:
        yield one
        fake.faults.clear()
        answer = await one.post("/api/chat", json=chat("after [[tokens=2]]"))
        assert json.loads(answer.text.splitlines()[-1])["done"] is True
        await fake.wait_for(lambda f: f.busy_slots == 0 and f.waiting == 0)


async def lines_until_break(client: httpx.AsyncClient) -> tuple[list[str], type[BaseException] | None]:
    """The lines of a streamed chat, and what broke it."""
    lines: list[str] = []
    try:
        async with client.stream("POST", "/api/chat", json=chat()) as response:
            async for line in response.aiter_lines():
                lines.append(line)  # noqa: PERF401  (what came before the break counts)
    except httpx.HTTPError as error:
        return lines, type(error)
    return lines, None


async def test_answer(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """A status and a body of one's own, for the nth request that matches, so many times."""
    fake.faults.add(
        Fault(FaultKind.ANSWER, path="/api/chat", nth=2, times=2, status=503, headers={"Retry-After": "1"})
    )
    answers = [await client.post("/api/chat", json=chat()) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 503, 503, 200]
    assert answers[1].headers["retry-after"] == "1"
    assert (await client.get("/api/version")).status_code == 200
    assert [record.outcome for record in fake.requests[:2]] == [Outcome.COMPLETED, Outcome.FAULTED]


async def test_a_fault_is_chosen_by_the_body(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """A predicate on the body picks the request."""
    fault = fake.faults.add(Fault(FaultKind.ANSWER, when=lambda body: "poison" in json.dumps(body), status=500))
    statuses = [(await client.post("/api/chat", json=chat(text))).status_code for text in ("good", "poison", "good")]
    assert statuses == [200, 500, 200]
    assert fault.hits == 1


async def test_close(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """The connection is closed without an answer."""
    fake.faults.add(Fault(FaultKind.CLOSE))
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post("/api/chat", json=chat())
    assert fake.requests[0].outcome is Outcome.FAULTED


async def test_reset_after_lines(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """So many lines, then a reset, and the slot is free."""
    fake.faults.add(Fault(FaultKind.RESET, after_lines=3))
    lines, broken = await lines_until_break(client)
    # What a kernel has received and not handed out is lost with a reset: there may be fewer, never more.
    assert len(lines) <= 3
    assert broken is httpx.ReadError
    assert (fake.requests[0].lines, fake.requests[0].outcome) == (3, Outcome.FAULTED)
    await fake.wait_for(lambda f: f.busy_slots == 0)


async def test_reset_after_bytes(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """A reset anywhere, even in the head."""
    for count in (0, 5, 200):
        fake.faults.add(Fault(FaultKind.RESET, after_bytes=count))
        lines, broken = await lines_until_break(client)
        assert (lines, broken is not None) == ([], True)


async def test_stall_until_released(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """A stalled answer keeps its slot, others go on, and it ends well when it is released."""
    fault = fake.faults.add(Fault(FaultKind.STALL, after_lines=2))
    task = asyncio.create_task(lines_until_break(client))
    await fake.wait_for(lambda f: f.received == 1 and f.requests[0].lines == 2)
    assert (await client.post("/api/chat", json=chat())).text.count("\n") == 7
    assert (fake.requests[0].lines, fake.busy_slots) == (2, 1)
    fault.release()
    lines, broken = await task
    assert (len(lines), broken) == (7, None)


async def test_stall_until_the_client_goes(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """A stalled answer's slot falls free when the client gives up."""
    fake.faults.add(Fault(FaultKind.STALL))
    task = asyncio.create_task(lines_until_break(client))
    await fake.wait_for(lambda f: f.busy_slots == 1)
    task.cancel()
    await fake.wait_for(lambda f: f.busy_slots == 0)
    assert fake.requests[0].outcome is Outcome.CLIENT_GONE


async def test_error_line(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """An error inside a 200, as a runner that died leaves it; the runner lives."""
    fake.faults.add(Fault(FaultKind.ERROR_LINE, after_lines=2))
    lines, broken = await lines_until_break(client)
    assert (len(lines), broken, json.loads(lines[-1])) == (3, None, DIED)
    assert (fake.loads, fake.requests[0].outcome) == (1, Outcome.FAULTED)


@pytest.mark.parametrize(("after_lines", "expected"), [(None, 6), (0, 0), (2, 2)])
async def test_no_done(fake: FakeOllama, client: httpx.AsyncClient, after_lines: int | None, expected: int) -> None:
    """A stream that ends properly, without its done line."""
    fake.faults.add(Fault(FaultKind.NO_DONE, after_lines=after_lines))
    lines, broken = await lines_until_break(client)
    assert (len(lines), broken) == (expected, None)
    assert not any(json.loads(line)["done"] for line in lines)


async def test_killed_runner_takes_its_neighbours_with_it(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """Decoding, prefilling and waiting requests each get the words that a real server has for them."""
    await client.post("/api/generate", json={"model": "fake"})
    fake.hold_passes()
    tasks = []
    for text in ("a [[tokens=50]]", "word " * 2000, "waits"):
        tasks.append(asyncio.create_task(client.post("/api/chat", json=chat(text, stream=False))))
        await fake.wait_for(lambda f: f.busy_slots + f.waiting == len(tasks))
        if len(tasks) < 3:
            await fake.step(2)
    assert fake.kill_runners() == 1
    answers = await asyncio.gather(*tasks)
    assert [answer.status_code for answer in answers] == [500, 500, 500]
    texts = [answer.json()["error"] for answer in answers]
    assert texts[0] == DIED["error"]
    assert texts[1].startswith("model runner has unexpectedly stopped")
    assert texts[2].startswith("llama-server process no longer running")
    fake.release_passes()
    await client.post("/api/chat", json=chat())
    assert fake.loads == 2


@pytest.mark.parametrize("after_lines", [0, 3])
async def test_kill_runner_by_a_request(fake: FakeOllama, client: httpx.AsyncClient, after_lines: int) -> None:
    """A request that kills its runner, before or after its first token."""
    fake.faults.add(Fault(FaultKind.KILL_RUNNER, after_lines=after_lines))
    answer = await client.post("/api/chat", json=chat())
    lines = answer.text.splitlines()
    assert answer.status_code == (200 if after_lines else 500)
    assert "error" in json.loads(lines[-1])
    assert len(lines) == after_lines + 1


@pytest.mark.parametrize(("rule", "said"), [("[[crash]]", 0), ("[[crash=4]]", 4)])
async def test_a_prompt_that_kills(fake: FakeOllama, client: httpx.AsyncClient, rule: str, said: int) -> None:
    """A prompt can carry its own crash, every time that it is run."""
    for loads in (1, 2):
        answer = await client.post("/api/chat", json=chat(f"{rule} [[tokens=9]]"))
        assert len(answer.text.splitlines()) == said + 1
        assert fake.loads == loads


async def test_a_runner_that_dies_under_an_embedding_is_a_400(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """Ollama answers 400 to an embedding whose runner died, so the status does not tell whose fault it was."""
    fake.faults.add(Fault(FaultKind.KILL_RUNNER, path="/api/embed"))
    answer = await client.post("/api/embed", json={"model": "fake-embed", "input": ["a", "b"]})
    assert (answer.status_code, answer.json()["error"].endswith("EOF")) == (400, True)
    answer = await client.post("/api/embed", json={"model": "fake-embed", "input": ["a", "b"]})
    assert len(answer.json()["embeddings"]) == 2


async def test_bad_line(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """A line that is no JSON in the middle of a stream that goes on."""
    fake.faults.add(Fault(FaultKind.BAD_LINE, after_lines=2))
    lines, broken = await lines_until_break(client)
    assert (len(lines), broken) == (8, None)
    with pytest.raises(ValueError, match="Unterminated string"):
        json.loads(lines[2])


async def test_delay_until_released(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """A request that begins late."""
    fault = fake.faults.add(Fault(FaultKind.DELAY, until_released=True, delay_s=0.001))
    task = asyncio.create_task(client.post("/api/chat", json=chat()))
    await fake.wait_for(lambda f: f.in_flight == 1)
    await client.get("/api/version")
    assert (task.done(), fake.loads) == (False, 0)
    fault.release()
    assert (await task).status_code == 200


async def test_silent_load(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """A load that does not end holds everybody, until it is released."""
    fault = fake.faults.add(Fault(FaultKind.SILENT_LOAD))
    tasks = [asyncio.create_task(client.post("/api/chat", json=chat())) for _ in range(2)]
    await fake.wait_for(lambda f: f.loading and f.pending == 1)
    await client.get("/api/version")
    assert fake.loads == 0
    fault.release()
    assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}


@pytest.mark.parametrize("piece_bytes", [1, 7])
async def test_slice(fake: FakeOllama, client: httpx.AsyncClient, piece_bytes: int) -> None:
    """An answer in small pieces is the same answer."""
    fake.faults.add(Fault(FaultKind.SLICE, piece_bytes=piece_bytes))
    lines, broken = await lines_until_break(client)
    assert (len(lines), broken) == (7, None)
    assert json.loads(lines[-1])["done"] is True
    await fake.wait_for(lambda f: f.requests[0].outcome is Outcome.COMPLETED)


async def test_away_and_back(fake: FakeOllama, client: httpx.AsyncClient) -> None:
    """A server that goes away resets its connections and refuses new ones; back, it has forgotten its models."""
    fake.faults.add(Fault(FaultKind.STALL, after_lines=1))
    task = asyncio.create_task(lines_until_break(client))
    await fake.wait_for(lambda f: f.received == 1 and f.requests[0].lines == 1)
    port = fake.port
    await fake.go_away()
    assert (await task)[1] is httpx.ReadError
    for _ in range(2):
        with pytest.raises(httpx.ConnectError):
            await client.post("/api/chat", json=chat())
    await fake.come_back()
    assert fake.port == port
    assert (await client.post("/api/chat", json=chat())).status_code == 200
    assert fake.loads == 2


async def test_waiting_in_vain_is_told() -> None:
    """A condition that never holds is an AssertionError that says what the server has seen."""
    async with FakeOllama() as fake:
        with pytest.raises(AssertionError, match="received=0"):
            await fake.wait_for(lambda f: f.received, timeout_s=0.01)
