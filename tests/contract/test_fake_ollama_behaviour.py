"""The stand-in for Ollama behaves as a real one was measured to behave: slots, passes, prefixes, loads, times."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.fakes.ollama import FakeModel, FakeOllama, Outcome, RequestRecord


def chat(text: str, **more: Any) -> dict[str, Any]:
    """A chat of one message."""
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **more}


def head_of(body: bytes, path: str = "/api/chat") -> bytes:
    """The head of a request."""
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()


def client_of(fake: FakeOllama) -> httpx.AsyncClient:
    """A client with as many connections as a test may want."""
    return httpx.AsyncClient(base_url=fake.url, timeout=20, limits=httpx.Limits(max_connections=None))


async def load(client: httpx.AsyncClient, **options: Any) -> None:
    """Load the model."""
    await client.post("/api/chat", json={"model": "fake", "messages": [], "options": options})


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The objects of a stream."""
    return [json.loads(line) for line in response.text.splitlines()]


async def staged(fake: FakeOllama, count: int, tokens: int, path: str = "/api/chat") -> list[asyncio.StreamWriter]:
    """Connections on each of which a request waits for its last byte."""
    writers = []
    for place in range(count):
        body = json.dumps(chat(f"item {place} [[tokens={tokens}]]", stream=False)).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", fake.port)
        writer.write(head_of(body, path) + body[:-1])
        writers.append(writer)
    await fake.wait_for(lambda f: sum(r.body_bytes > 0 for r in f.requests) >= count)
    return writers


# Passes and slots.


async def test_items_released_together_share_their_passes() -> None:
    """Eight items on eight slots take as many passes as one."""
    async with FakeOllama(num_parallel=8) as fake, client_of(fake) as client:
        await load(client)
        fake.hold_passes()
        answers = [asyncio.create_task(client.post("/api/chat", json=chat(f"{n} [[tokens=9]]"))) for n in range(8)]
        await fake.wait_for(lambda f: f.busy_slots == 8)
        fake.release_passes()
        await asyncio.gather(*answers)
        assert fake.passes == 10  # the first computes all prompts and says a first token, the last ends
        assert [len(one.requests) for one in fake.pass_log] == [8] * 10
        assert all(answer.text.count("\n") == 10 for answer in answers_of(answers))


def answers_of(tasks: list[asyncio.Task[httpx.Response]]) -> list[httpx.Response]:
    """The responses of tasks that are over."""
    return [task.result() for task in tasks]


async def test_one_after_the_other_shares_nothing() -> None:
    """With one slot each item has passes of its own."""
    async with FakeOllama(num_parallel=1) as fake, client_of(fake) as client:
        await asyncio.gather(*(client.post("/api/chat", json=chat(f"{n} [[tokens=4]]")) for n in range(5)))
        assert fake.passes == 5 * 5
        assert {len(one.requests) for one in fake.pass_log} == {1}


async def test_slots_are_given_in_the_order_of_arrival() -> None:
    """What waits for a slot gets it first come, first served."""
    async with FakeOllama(num_parallel=2) as fake, client_of(fake) as client:
        await load(client)
        fake.hold_passes()
        tasks: list[asyncio.Task[httpx.Response]] = []
        for number in range(6):
            tasks.append(asyncio.create_task(client.post("/api/chat", json=chat(f"{number} [[tokens=3]]"))))
            await fake.wait_for(lambda f: f.in_flight == len(tasks))
        assert (fake.busy_slots, fake.waiting) == (2, 4)
        fake.release_passes()
        await asyncio.gather(*tasks)
        granted = sorted(fake.requests_to("/api/chat")[1:], key=lambda r: r.slot_ns or 0)
        assert [record.id for record in granted] == sorted(record.id for record in granted)


async def test_a_pass_begins_only_when_it_may() -> None:
    """Held passes can be taken one by one, and each gives every slot one token."""
    async with FakeOllama() as fake, client_of(fake) as client:
        await load(client)
        fake.hold_passes()
        tasks = [asyncio.create_task(client.post("/api/chat", json=chat(f"{n} [[tokens=5]]"))) for n in range(2)]
        await fake.wait_for(lambda f: f.busy_slots == 2)
        await fake.step(3)
        assert [record.lines for record in fake.requests[-2:]] == [3, 3]
        fake.release_passes()
        await asyncio.gather(*tasks)


async def test_embedding_models_and_some_families_have_one_slot() -> None:
    """OLLAMA_NUM_PARALLEL does not count for embedding models and for families like qwen35."""
    models = (FakeModel(name="fake", family="qwen35"), FakeModel(name="e", capabilities=("embedding",)))
    async with FakeOllama(models, num_parallel=8) as fake, client_of(fake) as client:
        await load(client)
        await client.post("/api/embed", json={"model": "e"})
        assert [len(runner.slots) for runner in fake.runners] == [1, 1]


async def test_a_long_prefill_takes_several_passes_and_stalls_nobody_for_good() -> None:
    """A prompt of 1,200 tokens takes three passes of 512; meanwhile the others say one token a pass."""
    async with FakeOllama() as fake, client_of(fake) as client:
        await load(client)
        fake.hold_passes()
        short = asyncio.create_task(client.post("/api/chat", json=chat("short [[tokens=20]]")))
        await fake.wait_for(lambda f: f.busy_slots == 1)
        await fake.step(2)
        long = asyncio.create_task(client.post("/api/chat", json=chat("word " * 1190 + "[[tokens=2]]")))
        await fake.wait_for(lambda f: f.busy_slots == 2)
        await fake.step(3)
        long_id = fake.requests[-1].id
        prefills = [one for one in fake.pass_log if long_id in one.prefilling]
        assert len(prefills) == 3
        assert max(one.prompt_tokens for one in prefills) == 511
        assert all(len(one.decoding) == 1 for one in prefills)
        assert [record.lines for record in fake.requests[-2:]] == [5, 1]
        fake.release_passes()
        await asyncio.gather(short, long)


async def test_joining_prompts_share_a_pass() -> None:
    """Prompts that fit into one batch are computed in one pass."""
    async with FakeOllama(num_parallel=4) as fake, client_of(fake) as client:
        await load(client)
        fake.hold_passes()
        texts = [f"{name} " * 100 + "[[tokens=1]]" for name in ("a", "b", "c", "d")]
        tasks = [asyncio.create_task(client.post("/api/chat", json=chat(text))) for text in texts]
        await fake.wait_for(lambda f: f.busy_slots == 4)
        fake.release_passes()
        await asyncio.gather(*tasks)
        assert len(fake.pass_log[0].prefilling) == 4
        assert fake.pass_log[0].prompt_tokens == 4 * (101 + 8)


# Prefixes.


async def test_a_prefix_is_not_computed_again() -> None:
    """A second prompt that begins alike goes to the slot that holds it, and only its rest is computed."""
    async with FakeOllama(num_parallel=4) as fake, client_of(fake) as client:
        context = {"role": "system", "content": "rule " * 200}
        body = {"model": "fake", "stream": False, "options": {"num_predict": 2}}
        finals = []
        for question in ("first one", "second one"):
            messages = [context, {"role": "user", "content": question}]
            finals.append((await client.post("/api/chat", json={**body, "messages": messages})).json())
        first, second = fake.requests[-2:]
        assert first.slot == second.slot
        assert (first.prompt_tokens_cached, second.prompt_tokens_cached) == (0, 209)
        assert fake.prompt_tokens_computed == first.prompt_tokens + second.prompt_tokens - 209
        # prompt_eval_count counts what was found in the prefix too.
        assert [final["prompt_eval_count"] for final in finals] == [first.prompt_tokens, second.prompt_tokens]


async def test_an_unlike_prompt_takes_the_slot_used_least_recently() -> None:
    """Without a similar prefix the slots are taken in turn."""
    async with FakeOllama(num_parallel=3) as fake, client_of(fake) as client:
        for text in ("alpha " * 60, "beta " * 60, "gamma " * 60, "delta " * 60):
            await client.post("/api/chat", json=chat(text))
        slots = [record.slot for record in fake.requests]
        assert len(set(slots[:3])) == 3
        assert slots[3] == slots[0]


async def test_prefixes_can_be_turned_off() -> None:
    """Without the prefix cache every prompt is computed whole."""
    async with FakeOllama(prefix_cache=False) as fake, client_of(fake) as client:
        for _ in range(2):
            await client.post("/api/chat", json=chat("same " * 50))
        assert fake.prompt_tokens_computed == sum(record.prompt_tokens for record in fake.requests)


# Loads.


async def test_other_runner_options_reload_the_model() -> None:
    """num_ctx and its like reload; options of the answer do not, nor does what is asked for by default."""
    async with FakeOllama() as fake, client_of(fake) as client:
        for options, loads in [
            ({}, 1),
            ({"temperature": 0, "seed": 3}, 1),
            ({"num_ctx": 4096}, 1),
            ({"num_ctx": 2048}, 2),
            ({"num_ctx": 2048, "num_gpu": -1}, 2),
            ({"num_ctx": 2048, "num_thread": 2}, 3),
            ({"num_ctx": 100_000}, 4),
            ({"num_ctx": 8192}, 4),  # what the model was trained for: the same
        ]:
            await load(client, **options)
            assert fake.loads == loads, options


async def test_a_reload_waits_for_those_that_use_the_runner() -> None:
    """A request with another num_ctx waits until the last of the others is over."""
    async with FakeOllama() as fake, client_of(fake) as client:
        await load(client)
        fake.hold_passes()
        first = asyncio.create_task(client.post("/api/chat", json=chat("a [[tokens=3]]")))
        await fake.wait_for(lambda f: f.busy_slots == 1)
        other = asyncio.create_task(client.post("/api/chat", json=chat("b [[tokens=3]]", options={"num_ctx": 512})))
        await fake.wait_for(lambda f: f.in_flight == 2)
        assert (fake.loads, other.done()) == (1, False)
        fake.release_passes()
        await asyncio.gather(first, other)
        assert fake.loads == 2
        a, b = fake.requests[-2:]
        assert (a.end_ns or 0) < (b.slot_ns or 0)


async def test_models_evict_each_other() -> None:
    """With room for one model each change of model loads."""
    async with FakeOllama(max_loaded_models=1) as fake, client_of(fake) as client:
        for name in ("fake", "fake-think", "fake", "fake"):
            await client.post("/api/generate", json={"model": name})
        assert fake.loads == 3
        assert [row["name"] for row in (await client.get("/api/ps")).json()["models"]] == ["fake:latest"]


async def test_aliases_of_one_file_share_a_runner() -> None:
    """Two names with one digest are one runner."""
    models = (FakeModel(name="a", digest="0" * 64), FakeModel(name="b", digest="0" * 64))
    async with FakeOllama(models) as fake, client_of(fake) as client:
        for name in ("a", "b"):
            await client.post("/api/generate", json={"model": name})
        assert fake.loads == 1


async def test_a_cold_model_refuses_what_exceeds_its_queue() -> None:
    """While a model loads, one request and OLLAMA_MAX_QUEUE more are taken; a loaded model refuses nothing."""
    async with FakeOllama(max_queue=3) as fake, client_of(fake) as client:
        fake.hold_loads()
        tasks = [asyncio.create_task(client.post("/api/chat", json=chat(str(n)))) for n in range(9)]
        await fake.wait_for(lambda f: f.received == 9 and f.in_flight == 4)
        assert fake.pending == 3
        fake.release_loads()
        statuses = sorted(answer.status_code for answer in await asyncio.gather(*tasks))
        assert statuses == [200] * 4 + [503] * 5
        again = await asyncio.gather(*(client.post("/api/chat", json=chat(str(n))) for n in range(40)))
        assert {answer.status_code for answer in again} == {200}


async def test_a_cancelled_load_is_aborted() -> None:
    """A client that goes away while its request loads takes the load with it; the next one loads anew."""
    async with FakeOllama() as fake, client_of(fake) as client:
        fake.hold_loads()
        task = asyncio.create_task(client.post("/api/generate", json={"model": "fake"}))
        await fake.wait_for(lambda f: f.loading)
        task.cancel()
        await fake.wait_for(lambda f: not f.loading)
        fake.release_loads()
        assert fake.loads == 0
        await load(client)
        assert fake.loads == 1


async def test_keep_alive_of_zero_unloads_and_short_ones_expire() -> None:
    """keep_alive 0 unloads at once, a short one when its time is over."""
    async with FakeOllama() as fake, client_of(fake) as client:
        await client.post("/api/chat", json=chat("x", keep_alive=0))
        await fake.wait_for(lambda f: not f.runners)
        await client.post("/api/chat", json=chat("x", keep_alive="20ms"))
        await fake.wait_for(lambda f: not f.runners)
        await client.post("/api/chat", json=chat("x", keep_alive=-1))
        assert len(fake.runners) == 1
        answer = await client.post("/api/chat", json={"model": "fake", "messages": [], "keep_alive": 0})
        assert answer.json()["done_reason"] == "unload"
        assert not fake.runners


# The wire.


async def test_a_request_without_its_last_byte_stays_pending() -> None:
    """Held requests reach no slot; released in one loop they arrive within a short time."""
    async with FakeOllama(num_parallel=8) as fake, client_of(fake) as client:
        await load(client)
        writers = await staged(fake, 8, tokens=5)
        await client.get("/api/version")  # the server goes on meanwhile
        assert (fake.in_flight, fake.busy_slots, fake.passes) == (0, 0, 0)
        for writer in writers:
            writer.write(b"}")
        await fake.wait_for(lambda f: f.completed == 8 + 2)
        held = fake.requests_to("/api/chat")[1:]
        assert all((r.last_byte_ns or 0) > r.headers_ns for r in held)
        assert fake.spread_ms("/api/chat", since=1) < 1000
        for writer in writers:
            writer.close()


async def test_the_time_in_which_a_request_is_held_is_in_its_durations() -> None:
    """total_duration and load_duration begin with the headers, as in a real server."""
    async with FakeOllama() as fake:
        body = json.dumps(chat("x [[tokens=2]]", stream=False)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", fake.port)
        writer.write(head_of(body) + body[:-1])
        await fake.wait_for(lambda f: f.received == 1)
        await asyncio.get_running_loop().run_in_executor(None, asyncio.run, asyncio.sleep(0.05))
        writer.write(body[-1:])
        answer = json.loads((await reader.readuntil(b"}")).partition(b"\r\n\r\n")[2] + await reader.read(1000))
        writer.close()
        record = fake.requests[0]
        held_ns = (record.last_byte_ns or 0) - record.headers_ns
        assert held_ns > 45_000_000
        assert answer["total_duration"] > answer["load_duration"] >= held_ns
        parts = answer["load_duration"] + answer["prompt_eval_duration"] + answer["eval_duration"]
        assert parts <= answer["total_duration"]


async def test_the_json_value_begins_the_request_not_the_announced_length() -> None:
    """A byte held back after the final brace holds only the answer: the work begins with the brace."""
    async with FakeOllama() as fake:
        body = json.dumps(chat("x [[tokens=2]]", stream=False)).encode() + b"\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", fake.port)
        writer.write(head_of(body) + body[:-1])
        await fake.wait_for(lambda f: f.passes == 3 and f.in_flight == 0)
        assert (fake.requests[0].last_byte_ns, fake.completed) == (None, 0)
        writer.write(b"\n")
        assert b" 200 OK" in await reader.readuntil(b"\r\n")
        writer.write(head_of(b"{}") + b"{}")  # the connection can be used again
        await fake.wait_for(lambda f: f.received == 2 and f.requests[1].status == 400)
        writer.close()


async def test_one_connection_carries_many_requests() -> None:
    """Keep-alive and requests sent before the answer to the last one work."""
    async with FakeOllama() as fake:
        body = json.dumps(chat("x [[tokens=2]]")).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", fake.port)
        writer.write((head_of(body) + body) * 3)
        for _ in range(3):
            await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        assert [record.connection for record in fake.requests] == [1, 1, 1]


async def test_only_local_hosts_are_served() -> None:
    """A server on loopback refuses a Host that is not local, with 403 and no body."""
    async with FakeOllama() as fake, client_of(fake) as client:
        for host, status in (("example.org", 403), ("localhost:1", 200), ("127.0.0.1", 200), ("a.internal", 200)):
            assert (await client.get("/api/version", headers={"Host": host})).status_code == status


async def test_what_is_no_http_is_refused() -> None:
    """Rubbish is answered with 400 and closed."""
    async with FakeOllama() as fake:
        reader, writer = await asyncio.open_connection("127.0.0.1", fake.port)
        writer.write(b"rubbish\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        writer.close()


async def test_the_log_tells_what_came_and_when() -> None:
    """A record holds headers, body, times in their order, and the end."""
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with FakeOllama() as fake, client_of(fake) as client:
        await client.post("/api/chat?x=1", json=chat("hello"), headers={"traceparent": parent})
        (record,) = fake.requests
        assert (record.method, record.path, record.model) == ("POST", "/api/chat", "fake")
        assert record.traceparent == parent
        assert record.body == chat("hello")
        assert record.outcome is Outcome.COMPLETED
        times = [record.headers_ns, record.last_byte_ns, record.slot_ns, record.first_token_ns, record.end_ns]
        assert times == sorted(time for time in times if time is not None)
        assert record.body_bytes == len(json.dumps(chat("hello"), separators=(",", ":")))


# Clients that go away.


@pytest.mark.parametrize("where", ["decoding", "prefilling", "waiting"])
async def test_a_client_that_goes_away_frees_its_slot(where: str) -> None:
    """Its place is free for the next, whatever it was doing."""
    async with FakeOllama(num_parallel=1) as fake, client_of(fake) as client:
        await load(client)
        fake.hold_passes()
        text = "word " * 2000 if where == "prefilling" else "x [[tokens=500]]"
        tasks = [asyncio.create_task(client.post("/api/chat", json=chat(text)))]
        await fake.wait_for(lambda f: f.busy_slots == 1)
        await fake.step(2)
        if where == "waiting":
            tasks.append(asyncio.create_task(client.post("/api/chat", json=chat("y"))))
            await fake.wait_for(lambda f: f.waiting == 1)
        victim = tasks[-1]
        victim.cancel()
        await asyncio.wait([victim])
        await fake.wait_for(lambda f: f.in_flight == len(tasks) - 1)
        assert (fake.busy_slots, fake.waiting) == (len(tasks) - 1, 0)
        assert fake.requests[-1].outcome is Outcome.CLIENT_GONE
        fake.release_passes()
        assert (await client.post("/api/chat", json=chat("z"))).status_code == 200
        await asyncio.gather(*tasks[:-1])


async def test_a_prompt_block_that_has_begun_is_finished_first() -> None:
    """A client that goes away in a prefill frees its slot when the block is computed, not before."""
    async with FakeOllama(num_parallel=1, prefill_token_s=0.0005) as fake, client_of(fake) as client:
        await load(client)
        task = asyncio.create_task(client.post("/api/chat", json=chat("word " * 600)))
        await fake.wait_for(lambda f: f.busy_slots == 1 and f.in_flight == 1)
        await asyncio.sleep(0)  # let the pass begin
        task.cancel()
        await fake.wait_for(lambda f: f.in_flight == 0)
        assert (fake.busy_slots, fake.passes) == (1, 0)
        await fake.wait_for(lambda f: f.busy_slots == 0)
        assert (fake.passes, fake.prompt_tokens_computed) == (1, 512)


# Answers.


async def test_lengths_and_ends() -> None:
    """An answer that ends by itself counts its end token; one cut by its length has done right behind."""
    async with FakeOllama() as fake, client_of(fake) as client:
        stopped = lines_of(await client.post("/api/chat", json=chat("x [[tokens=7]]")))
        cut = lines_of(await client.post("/api/chat", json=chat("x", options={"num_predict": 7})))
        assert (len(stopped), stopped[-1]["done_reason"], stopped[-1]["eval_count"]) == (8, "stop", 8)
        assert (len(cut), cut[-1]["done_reason"], cut[-1]["eval_count"]) == (8, "length", 7)
        first, second = fake.requests
        assert [sum(r.id in one.requests for one in fake.pass_log) for r in (first, second)] == [8, 7]


async def test_answers_are_the_same_every_time() -> None:
    """An answer follows from its prompt and its seed."""
    texts: list[str] = []
    for seed in (1, 1, 2):
        async with FakeOllama() as fake, client_of(fake) as client:
            body = chat("tell me", stream=False, options={"num_predict": 12, "seed": seed})
            texts.append((await client.post("/api/chat", json=body)).json()["message"]["content"])
    assert texts[0] == texts[1] != texts[2]


async def test_rules_in_the_prompt() -> None:
    """say, stop, repeat and formats."""
    async with FakeOllama() as fake, client_of(fake) as client:

        async def content(text: str, **more: Any) -> str:
            answer = (await client.post("/api/chat", json=chat(text, stream=False, **more))).json()
            said: str = answer["message"]["content"]
            return said

        assert await content("[[say=one <two> & three]]") == "one <two> & three"
        assert await content("[[say=one two STOP three]]", options={"stop": ["STOP"]}) == "one two "
        schema = {"type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}}
        assert [type(v) for v in json.loads(await content("x", format=schema)).values()] == [int, bool]
        assert isinstance(json.loads(await content("x", format="json")), dict)
        repeated = lines_of(await client.post("/api/chat", json=chat("[[repeat=no]]")))
        assert len(repeated) == 31
        assert not any(line["done"] for line in repeated)
        await fake.wait_for(lambda f: f.busy_slots == 0)


# Numbers.


async def test_many_connections_at_once() -> None:
    """700 connections at once are all answered, each by its own connection."""
    async with FakeOllama(num_parallel=64) as fake, client_of(fake) as client:
        await load(client)
        writers = await staged(fake, 700, tokens=2)
        assert fake.open_connections == 701
        for writer in writers:
            writer.write(b"}")
        await fake.wait_for(lambda f: f.completed == 701, timeout_s=20)
        records: list[RequestRecord] = fake.requests[1:]
        assert {record.outcome for record in records} == {Outcome.COMPLETED}
        assert len({record.connection for record in records}) == 700
        for writer in writers:
            writer.close()
