"""Ollama's requests by the batch, over HTTP: in order or as they finish, errors in their places, figures measured."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.described import HOOKS
from tests.integration.service import LIMIT_S, House, chat, house

CHAT, GENERATE, STATUS = "/api/batch/chat", "/api/batch/generate", "/api/batch/status"
WIRE = Path(__file__).resolve().parents[1] / "fixtures" / "wire"
# Twenty seconds, at five milliseconds a pass.
LONG = "Go on [[tokens=4000]]"


@asynccontextmanager
async def served(**settings: Any) -> AsyncGenerator[tuple[House, httpx.AsyncClient]]:
    """A service, and a client of its HTTP port."""
    async with (
        house(with_http=True, **settings) as h,
        httpx.AsyncClient(base_url=h.http_url, timeout=LIMIT_S, event_hooks=HOOKS) as client,
    ):
        yield h, client


def asks(text: str, **fields: Any) -> dict[str, Any]:
    """A body of /api/chat."""
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **fields}


def prompts(count: int, **fields: Any) -> dict[str, Any]:
    """A batch of prompts, each to be answered with its own number."""
    return {"requests": [{"prompt": f"[[say=answer {n}]]"} for n in range(count)], "model": "fake", **fields}


def ollamas_own(name: str) -> set[str]:
    """The fields of an answer that a real Ollama gave."""
    return set(json.loads(json.loads((WIRE / f"{name}.json").read_text())["response"]["body"]))


# -- Answers ---------------------------------------------------------------------------------------------------


async def test_answers_stand_in_the_order_of_their_requests() -> None:
    """Whatever order they end in, with the batch's id, when it ended, and its figures."""
    requests = [{"prompt": f"[[tokens={40 - 4 * n}]]", "id": f"q{n}"} for n in range(8)]
    body = {"model": "fake", "requests": requests, "max_batch_size": 4, "batch_timeout": "10ms"}
    async with served(pass_s=0.002) as (h, client):
        answer = await client.post(GENERATE, json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert (await h.attach(found["batch_id"])).batch_id == found["batch_id"]
    assert [one["index"] for one in found["responses"]] == list(range(8))
    assert [one["id"] for one in found["responses"]] == [f"q{n}" for n in range(8)]
    assert [one["eval_count"] for one in found["responses"]] == [41 - 4 * n for n in range(8)]
    assert answer.headers["x-batch-id"] == found["batch_id"]
    assert found["processed_at"].endswith("Z")
    assert found["stats"]["batch_size"] == 8
    assert 0 < found["stats"]["processing_time"] < LIMIT_S * 1e9
    # No more at one time than was asked for.
    assert max(in_flight(h)) <= 4


def in_flight(h: House) -> list[int]:
    """How many requests were at the backend, each time that one came or went."""
    moments = [(r.last_byte_ns or 0, 1) for r in h.work] + [(r.end_ns or 0, -1) for r in h.work]
    found, now = [], 0
    for _, change in sorted(moments):
        now += change
        found.append(now)
    return found


@pytest.mark.parametrize(("path", "name"), [(CHAT, "chat"), (GENERATE, "generate")])
async def test_an_answer_has_ollama_s_own_fields(path: str, name: str) -> None:
    """All that a real one gave, but for the tokens to go on with; and its place."""
    request = asks("Hello") if name == "chat" else {"model": "fake", "prompt": "Hello"}
    async with served() as (_, client):
        (found,) = (await client.post(path, json={"requests": [request]})).json()["responses"]
    assert set(found) - {"index"} >= ollamas_own(name) - {"context", "load_duration"}
    assert set(found) - {"index"} <= ollamas_own(name)
    assert found["done"] is True
    assert found["total_duration"] > 0


async def test_a_chat_thinks_and_calls_tools() -> None:
    """As Ollama writes it: arguments are an object, with keys in their order."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    requests = [
        asks('[[tool=look {"b": 1, "a": 2.50}]]', tools=[tool], model="fake-tools"),
        asks("[[think=Hm]][[say=Yes]]", think=True, model="fake-think"),
        asks("Hello", logprobs=True, top_logprobs=1, options={"num_predict": 2}),
    ]
    async with served() as (_, client):
        text = (await client.post(CHAT, json={"requests": requests})).text
    called, thought, weighed = json.loads(text)["responses"]
    (call,) = called["message"]["tool_calls"]
    assert call["function"]["name"] == "look"
    assert list(call["function"]["arguments"]) == ["b", "a"]
    assert "error" not in thought, thought
    assert thought["message"]["content"] == "Yes"
    assert len(weighed["logprobs"]) == 2
    assert len(weighed["logprobs"][0]["top_logprobs"]) == 1


async def test_answers_as_they_finish() -> None:
    """A line each, as soon as it is there, and one for the whole at the end."""
    requests = [{"prompt": "[[tokens=400]]"}, {"prompt": "[[say=first]]"}, {"prompt": 7, "id": "bad"}]
    body = {"model": "fake", "requests": requests, "stream": True}
    async with served(pass_s=0.002) as (_, client), client.stream("POST", GENERATE, json=body) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) async for line in answer.aiter_lines()]
    assert sorted(one["index"] for one in lines[:-1]) == [0, 1, 2]
    assert lines[-2]["index"] == 0
    assert {"index": 2, "id": "bad"}.items() <= next(one for one in lines if one.get("index") == 2).items()
    assert set(lines[-1]) == {"batch_id", "processed_at", "stats"}
    assert answer.headers["x-batch-id"] == lines[-1]["batch_id"]


async def test_what_is_said_of_all_is_beneath_what_each_says() -> None:
    """The model, and options."""
    requests = [
        {"prompt": "[[tokens=9]]"},
        {"prompt": "[[tokens=9]]", "options": {"num_predict": 3}},
        {"prompt": "[[tokens=9]]", "model": "fake-think"},
    ]
    body = {"requests": requests, "model": "fake", "options": {"num_predict": 2}, "keep_alive": 60}
    async with served() as (h, client):
        found = (await client.post(GENERATE, json=body)).json()["responses"]
        assert h.loads
        assert {r.body["keep_alive"] for r in h.fake.requests if "keep_alive" in (r.body or {})} == {60}
    assert [one.get("eval_count") for one in found[:2]] == [2, 3]
    assert [one["model"] for one in found] == ["fake:latest", "fake:latest", "fake-think:latest"]


async def test_the_model_stays_as_long_as_the_request_that_wants_it_longest() -> None:
    """As one runner serves them all."""
    requests = [{"prompt": "a", "keep_alive": "2m"}, {"prompt": "b", "keep_alive": 30}, {"prompt": "c"}]
    async with served() as (h, client):
        answer = await client.post(GENERATE, json={"requests": requests, "model": "fake"})
        assert not [one for one in answer.json()["responses"] if "error" in one]
        assert {r.body["keep_alive"] for r in h.fake.requests if "keep_alive" in (r.body or {})} == {120}


async def test_figures_are_measured_or_absent() -> None:
    """The gain, where one alone was measured before; the context in use, where the slots are known."""

    def batch(count: int, *words: str) -> dict[str, Any]:
        requests = [
            {"prompt": f"{each} {' '.join(words)} {n} [[tokens=40]]"} for n, each in enumerate("abcd"[:count])
        ]
        return {"requests": requests, "model": "fake"}

    stand_in = {"num_parallel": 4, "pass_s": 0.004, "prefill_token_s": 0.0005}
    async with served(**stand_in, settings={"slots": 4}) as (_, client):
        first = (await client.post(GENERATE, json=batch(1))).json()["stats"]
        # One request alone shares nothing, so that it has gained nothing.
        assert first.get("throughput_gain", 1.0) < 2
        for word in ("one", "two", "three"):
            _ = await client.post(GENERATE, json=batch(1, *[word] * 40))
        found = (await client.post(GENERATE, json=batch(4, "four"))).json()["stats"]
    assert set(found) == {"batch_size", "processing_time", "memory_efficiency", "throughput_gain"}
    assert 0 < found["memory_efficiency"] <= 1
    # Four at a time; how much that gains is for a quiet machine to say.
    assert 0.5 < found["throughput_gain"] < 8


# -- What is wrong ---------------------------------------------------------------------------------------------


async def test_what_is_wrong_with_one_costs_that_one() -> None:
    """Its place has why; the others are answered."""
    requests: list[Any] = [
        asks("Hello"),
        *("text", 7, None, [], {}, {"messages": []}, {"messages": [{"role": "alien", "content": "x"}]}),
        *(asks("Hello", model="absent"), asks("Hello", nonsense=1), asks("Hello", stream=True)),
        *(asks("Hello", options={"temperature": "hot"}), asks("Hello", id=""), asks("\ud83d"), asks("x", n=2)),
        asks("Hello", keep_alive=-1),
        asks("Hello", id="last"),
    ]
    async with served() as (_, client):
        text = json.dumps({"model": "fake", "requests": requests})
        found = (await client.post(CHAT, content=text)).json()["responses"]
    assert [one["index"] for one in found] == list(range(len(requests)))
    assert [index for index, one in enumerate(found) if "error" not in one] == [0, len(requests) - 1]
    for one in found[1:-1]:
        assert set(one) == {"index", "error", "reason"}
        assert one["error"]
    assert found[8]["reason"] == "MODEL_NOT_FOUND"
    assert found[7]["error"].startswith("messages[0].role: ")
    assert found[-1]["id"] == "last"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b"\xff", "UTF-8"),
        (b"[" * 100_000, "deeply"),
        (b"{}", "requests"),
        (b'{"requests": []}', "requests"),
        (b'{"requests": {}}', "requests"),
        (b'{"requests": [{}], "model": 7}', "model"),
        (b'{"requests": [{}], "max_batch_size": 0}', "max_batch_size"),
        (b'{"requests": [{}], "max_batch_size": "4"}', "max_batch_size"),
        (b'{"requests": [{}], "batch_timeout": "soon"}', "batch_timeout"),
        (b'{"requests": [{}], "batch_timeout": -1}', "batch_timeout"),
        (b'{"requests": [{}], "batch_timeout": true}', "batch_timeout"),
        (b'{"requests": [{}], "batch_timeout": 1e99}', "batch_timeout"),
        (b'{"requests": [{}], "stream": 1}', "stream"),
        (b'{"requests": [{}], "options": {"heat": 1}}', "options.heat"),
        (b'{"requests": [{}], "options": {"temperature": -1}}', "options.temperature"),
        (b'{"requests": [{}], "request": 1}', "requests"),
    ],
)
async def test_a_batch_that_is_none(body: bytes, word: str) -> None:
    """It is refused as a whole, in Ollama's shape, with the field."""
    async with served() as (_, client):
        answer = await client.post(GENERATE, content=body)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert word in answer.json()["error"]


async def test_too_many_and_too_much() -> None:
    """Requests of one batch, and bytes of a body."""
    async with served(settings={"max_items": 3}) as (_, client):
        assert (await client.post(GENERATE, json=prompts(3))).status_code == 200
        answer = await client.post(GENERATE, json=prompts(4))
        assert (answer.status_code, "at most 3" in answer.json()["error"]) == (400, True)
        answer = await client.post(GENERATE, content=b" " * (32 * 1024 * 1024 + 1))
        assert (answer.status_code, set(answer.json())) == (413, {"error"})


async def test_answers_that_are_too_many_to_be_kept() -> None:
    """Are refused, with what to do; streamed they come."""
    async with served(settings={"max_journal_bytes": 20_000}) as (h, client):
        answer = await client.post(GENERATE, json=prompts(80))
        assert answer.status_code == 429
        assert "stream" in answer.json()["error"]
        await h.until_running(0)
        answer = await client.post(GENERATE, json=prompts(80, stream=True))
        assert len(answer.text.splitlines()) == 81


@pytest.mark.parametrize("path", ["/api/batch", "/api/batch/", "/api/batch/embed", "/api/batch/chat/"])
async def test_paths_that_are_none(path: str) -> None:
    """As Ollama says it."""
    async with served() as (_, client):
        answer = await client.post(path, json={})
        assert (answer.status_code, answer.text) == (404, "404 page not found")
        answer = await client.get(CHAT)
        assert (answer.status_code, answer.text) == (405, "405 method not allowed")


# -- Callers that go away, and the state -----------------------------------------------------------------------


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_caller_that_goes_away_takes_its_batch_along(*, is_streamed: bool) -> None:
    """In the midst of the answers, and before any."""
    body = {"requests": [{"prompt": LONG}] * 4, "model": "fake", "stream": is_streamed}
    async with served(pass_s=0.005) as (h, client):
        call = asyncio.ensure_future(client.post(GENERATE, json=body))
        await h.until_running(1)
        assert (await client.get(STATUS)).json()["pending_batches"] == 1
        async with asyncio.timeout(LIMIT_S):
            while len(h.work) < 4:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        _ = call.cancel()
        _ = await asyncio.gather(call, return_exceptions=True)
        await h.until_running(0)
        assert (await client.get(STATUS)).json()["processed_batches"] == 1


async def test_how_batches_are() -> None:
    """What is set, how many have not ended, and how many have: of every kind."""
    async with served(settings={"batch_size": 8, "batch_timeout": "20ms"}) as (h, client):
        expected = {
            "batch_enabled": True,
            "max_batch_size": 8,
            "batch_timeout": "20ms",
            "pending_batches": 0,
            "processed_batches": 0,
        }
        assert (await client.get(STATUS)).json() == expected
        _ = await client.post(GENERATE, json=prompts(2))
        _ = await h.run([chat("a")])
        assert (await client.get(STATUS)).json() == expected | {"processed_batches": 2}


async def test_how_batches_are_where_nothing_is_set() -> None:
    """As many at a time as the runner has slots; ten milliseconds."""
    async with served(settings={"batch_enabled": False}) as (_, client):
        found = (await client.get(STATUS)).json()
    assert found["batch_enabled"] is False
    assert found["max_batch_size"] is None
    assert found["batch_timeout"] == "10ms"


async def test_kept_batches_count_too(tmp_path: Path) -> None:
    """Once each, when they have ended."""
    async with served(keeps_in=tmp_path) as (h, client):
        batch = await h.submit([chat("a"), chat("b")])
        _ = await h.attach(batch.batch_id)
        async with asyncio.timeout(LIMIT_S):
            while (await client.get(STATUS)).json()["processed_batches"] != 1:  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.01)
