"""RunBatch through the real port: what comes back for a batch that is given whole."""

from __future__ import annotations

import functools
import json
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.fakes.ollama import Answer, FakeModel, Fault, FaultKind
from tests.integration.service import (
    MAX_SEND_BYTES,
    chat,
    chats,
    config,
    embed,
    generate,
    house,
    reason_of,
    refused,
    span,
    state_of,
    user,
)
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.app.follow import follow
from unisono.edge.grpc import service as servicer


async def test_events_come_in_order_and_without_gaps() -> None:
    """`accepted` has sequence 1, numbers have no gap, each item has one result, and `summary` is the last event."""
    async with house(pass_s=0.001) as h:
        seen = await h.run(chats(9, num_predict=4))
        assert seen.kinds[0] == "accepted"
        assert seen.of("accepted")[0].item_count == 9
        assert seen.sequences == list(range(1, len(seen.events) + 1))
        assert sorted(seen.results) == sorted(f"i{n}" for n in range(9))
        assert {name: result.index for name, result in seen.results.items()} == {f"i{n}": n for n in range(9)}
        assert seen.summary.state == event_pb2.BATCH_STATE_COMPLETED
        assert not seen.summary.HasField("error")
        times = [event.time.ToNanoseconds() for event in seen.events]
        assert all(before <= after for before, after in pairwise(times))
        assert times[0] > 1_700_000_000_000_000_000
        # Before the first result, it was said where the items go, that the model is loaded, and that they went.
        before_results = seen.kinds[: seen.kinds.index("result")]
        assert before_results[1:] == ["group_planned", "loading", "loading", "released"]
        (planned,) = seen.of("group_planned")
        assert (planned.group, planned.backend, planned.model, planned.item_count) == (0, "ollama", "fake:latest", 9)
        assert not planned.loaded
        started, loaded = seen.of("loading")
        assert started.state == event_pb2.Loading.STATE_STARTED
        assert loaded.state == event_pb2.Loading.STATE_LOADED
        assert loaded.HasField("duration")


async def test_results_come_as_items_finish() -> None:
    """A short answer does not wait for a long one that was asked for before it."""
    async with house(pass_s=0.001) as h:
        seen = await h.run(
            [chat("long", num_predict=60), chat("short", num_predict=3), chat("middle", num_predict=20)]
        )
        assert list(seen.results) == ["short", "middle", "long"]
        assert [result.index for result in seen.results.values()] == [1, 2, 0]


async def test_a_result_tells_all_that_is_known_of_its_item() -> None:
    """Answer, usage, timings, attempts, who shared its passes, their number, and its group."""
    async with house(pass_s=0.002, num_parallel=4) as h:
        h.fake.hold_passes()
        call = h.run_batch([chat(f"i{n}", f"[[say=one two three {n}]]") for n in range(4)])
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        h.fake.release_passes()
        seen = await call.to_end()
        for n in range(4):
            result = seen.results[f"i{n}"]
            assert state_of(result) == "COMPLETED"
            done = result.completion
            assert (done.model, done.content) == ("fake:latest", f"one two three {n}")
            assert done.finish_reason == item_pb2.FINISH_REASON_STOP
            assert done.finish_reason_raw == "stop"
            assert result.usage.prompt_tokens > 0
            assert result.usage.completion_tokens == 5  # the end token is one, too
            assert (result.attempts, result.group, result.shared_with, result.passes) == (1, 0, 3, 5)
            timings = result.timings
            for name in ("queued", "slot_wait", "load", "prompt_eval", "eval", "first_token", "total"):
                assert timings.HasField(name), name
            assert timings.first_token.ToNanoseconds() <= timings.total.ToNanoseconds()
            assert timings.eval.ToNanoseconds() <= timings.total.ToNanoseconds()
        report = seen.report
        assert report.batch_id == seen.batch_id
        assert (report.counts.accepted, report.counts.completed, report.counts.in_flight) == (4, 4, 0)
        assert report.completion_tokens == 20
        assert report.prompt_tokens == sum(result.usage.prompt_tokens for result in seen.results.values())
        (group,) = report.groups
        assert (group.loads, group.waves, group.first_wave.item_count) == (1, 1, 4)
        assert group.passes.count == h.fake.passes == 5
        assert group.passes.method == event_pb2.PASS_METHOD_CREATED_AT
        assert group.items_per_pass == pytest.approx(4.0)


async def test_chat_generate_and_embed_go_in_one_batch() -> None:
    """One batch holds conversations, prompts and embeddings; each model is a group, and vectors come back exactly."""
    async with house() as h:
        async with httpx.AsyncClient(base_url=h.fake.url) as direct:
            answer = await direct.post("/api/embed", json={"model": "fake-embed", "input": ["red", "blue"]})
            truth = answer.json()
        items = [chat("c", "[[say=hi]]"), generate("g", "[[say=there]]"), embed("e", "red", "blue")]
        seen = await h.run(items)
        assert seen.results["c"].completion.content == "hi"
        assert seen.results["g"].completion.content == "there"
        vectors = [list(one.values) for one in seen.results["e"].completion.embeddings]
        assert [pytest.approx(vector, rel=1e-6) for vector in truth["embeddings"]] == vectors
        assert seen.results["e"].completion.finish_reason == item_pb2.FINISH_REASON_EMBEDDED
        assert seen.results["e"].usage.prompt_tokens > 0
        assert {result.group for result in seen.results.values()} == {0, 1}
        assert seen.results["c"].group == seen.results["g"].group != seen.results["e"].group
        assert sorted(request.path for request in h.work if request.body["model"] == "fake:latest") == [
            "/api/chat",
            "/api/generate",
        ]


async def test_what_is_asked_reaches_the_backend_as_written() -> None:
    """Tools, schemas, thinking, log probabilities, roles, and call arguments travel verbatim, keys in their order."""
    parameters = '{"type":"object","properties":{"z":{"type":"integer"},"a":{"type":"string"}},"required":["z","a"]}'
    tools = item_pb2.Item(
        item_id="tools",
        model="fake-tools",
        chat=item_pb2.ChatRequest(
            messages=[
                item_pb2.Message(role=item_pb2.ROLE_SYSTEM, content="Be brief."),
                user("How is the weather?"),
                item_pb2.Message(
                    role=item_pb2.ROLE_ASSISTANT,
                    thinking="hm",
                    tool_calls=[item_pb2.ToolCall(id="c1", name="weather", arguments_json='{"z":2,"a":1.0}')],
                ),
                item_pb2.Message(role=item_pb2.ROLE_TOOL, content="rain", tool_name="weather", tool_call_id="c1"),
                user('[[tool=weather {"z": 1, "a": "b"}]]'),
            ],
            tools=[item_pb2.Tool(name="weather", description="tells it", parameters_json=parameters)],
        ),
    )
    thinks = item_pb2.Item(
        item_id="thinks",
        model="fake-think",
        chat=item_pb2.ChatRequest(
            messages=[user("[[think=let me see]][[say=done]]")],
            think=item_pb2.THINK_HIGH,
            logprobs=item_pb2.Logprobs(top=2),
        ),
    )
    schema = '{"type":"object","properties":{"y":{"type":"integer"},"b":{"type":"boolean"}}}'
    shaped = generate("shaped", "Give me one")
    shaped.generate.format.json_schema = schema
    shaped.generate.system = "You answer."
    anything = generate("anything", "Give me any")
    anything.generate.format.json = True
    anything.generate.truncate = True
    async with house() as h:
        seen = await h.run([tools, thinks, shaped, anything])
        sent = {request.body["model"]: request.body for request in h.work if request.path == "/api/chat"}

        body = sent["fake-tools:latest"]
        assert json.dumps(body["tools"][0]["function"]["parameters"], separators=(",", ":")) == parameters
        assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "tool", "user"]
        call = body["messages"][2]["tool_calls"][0]
        assert json.dumps(call["function"]["arguments"]) == '{"z": 2, "a": 1.0}'
        assert (call["id"], body["messages"][2]["thinking"]) == ("c1", "hm")
        assert (body["messages"][3]["tool_name"], body["messages"][3]["tool_call_id"]) == ("weather", "c1")
        done = seen.results["tools"].completion
        assert [(one.name, json.loads(one.arguments_json)) for one in done.tool_calls] == [
            ("weather", {"z": 1, "a": "b"})
        ]
        assert list(json.loads(done.tool_calls[0].arguments_json)) == ["z", "a"]
        assert done.finish_reason == item_pb2.FINISH_REASON_TOOL_CALLS

        body = sent["fake-think:latest"]
        assert (body["think"], body["logprobs"], body["top_logprobs"]) == ("high", True, 2)
        done = seen.results["thinks"].completion
        assert (done.thinking, done.content) == ("let me see", "done")
        assert {len(one.top) for one in done.logprobs} == {2}
        # Thoughts have log probabilities, too; the tokens are all there, in their order.
        assert "".join(one.token for one in done.logprobs).endswith("done")

        shapes = {r.body["prompt"]: r.body for r in h.work if r.path == "/api/generate"}
        assert json.dumps(shapes["Give me one"]["format"], separators=(",", ":")) == schema
        assert shapes["Give me one"]["system"] == "You answer."
        assert shapes["Give me one"]["truncate"] is False
        assert (shapes["Give me any"]["format"], shapes["Give me any"]["truncate"]) == ("json", True)
        assert json.loads(seen.results["shaped"].completion.content).keys() == {"y", "b"}
        assert json.loads(seen.results["anything"].completion.content)


async def test_an_items_options_lie_over_the_batchs_field_by_field() -> None:
    """Options of the batch apply where the item says nothing; zero is a choice, and unnamed options are passed on."""
    batch = item_pb2.Options(
        num_predict=3, temperature=0.7, stop=["END"], runner=item_pb2.RunnerOptions(num_ctx=2048, num_batch=64)
    )
    own = chat("own", num_predict=2, temperature=0.0, extra_options_json='{"mirostat":1}', stop=["a", "b"])
    own.options.runner.num_batch = 32
    async with house() as h:
        seen = await h.run([chat("plain"), own], options=batch)
        sent = {len(request.body["options"]["stop"]): request.body["options"] for request in h.work}
        assert sent[1] == {"num_predict": 3, "temperature": 0.7, "stop": ["END"], "num_ctx": 2048, "num_batch": 64}
        assert sent[2] == {
            "num_predict": 2,
            "temperature": 0.0,
            "stop": ["a", "b"],
            "num_ctx": 2048,
            "num_batch": 32,
            "mirostat": 1,
        }
        assert seen.results["plain"].completion.finish_reason == item_pb2.FINISH_REASON_LENGTH
        assert seen.results["own"].usage.completion_tokens == 2
        # Differing runner options are different runners.
        assert len(seen.of("group_planned")) == 2
        assert {planned.runner.num_batch for planned in seen.of("group_planned")} == {32, 64}


async def test_the_model_of_an_item_may_be_left_out() -> None:
    """An item's own model wins over the batch's; with neither, the only model of a backend answers."""
    async with house(models=[FakeModel(name="only")]) as h:
        seen = await h.run([chat("a", "[[say=x]]")], model="")
        assert seen.results["a"].completion.content == "x"
    async with house() as h:
        seen = await h.run([chat("a"), chat("b", model="fake-tools")], model="")
        assert seen.states() == {"a": "FAILED", "b": "COMPLETED"}
        assert reason_of(seen.results["a"]) == "MODEL_NOT_FOUND"


# -- Text as it is generated -----------------------------------------------------------------------------------


def said(seen: Any, item_id: str, attempt: int = 1) -> tuple[str, str]:
    """Thoughts and text of an item's deltas, put together; their offsets must be right."""
    content = thinking = ""
    for deltas in seen.of("deltas"):
        for delta in deltas.items:
            if (delta.item_id, delta.attempt) == (item_id, attempt):
                assert delta.content_offset == len(content.encode())
                assert delta.thinking_offset == len(thinking.encode())
                content += delta.content
                thinking += delta.thinking
    return thinking, content


async def test_deltas_are_the_text_of_the_result() -> None:
    """Where asked for, text comes as it is generated: put together it is the result's, and offsets count bytes."""
    items = [
        chat("long", num_predict=50),
        chat("accents", "[[say=ça déjà vu — ✓ voilà]]"),
        chat("thinks", "[[think=ah so]][[say=yes]]", model="fake-think"),
    ]
    async with house(pass_s=0.002) as h:
        seen = await h.run(items, deltas=pb.DeltaConfig(flush_interval=span(0.01)))
        for name, result in seen.results.items():
            assert said(seen, name) == (result.completion.thinking, result.completion.content)
        assert len([d for deltas in seen.of("deltas") for d in deltas.items if d.item_id == "long"]) > 3
        for event in seen.events:
            assert event.HasField("sequence") == (event.WhichOneof("event") not in ("deltas", "heartbeat"))
        assert seen.sequences == list(range(1, len(seen.sequences) + 1))
        # Nothing of an item follows its result.
        over: set[str] = set()
        for event in seen.events:
            assert not over & {delta.item_id for delta in event.deltas.items}
            over.add(event.result.item_id)


async def test_no_deltas_unless_asked_for() -> None:
    """A caller that did not ask for text as it is generated gets results alone."""
    async with house(pass_s=0.002) as h:
        seen = await h.run(chats(3, num_predict=80))
        assert "deltas" not in seen.kinds


async def test_deltas_are_flushed_by_size() -> None:
    """Text goes out when so many bytes have gathered, however long the interval is."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(
            [chat("a", num_predict=10)], deltas=pb.DeltaConfig(flush_interval=span(10.0), flush_bytes=8)
        )
        _ = await call.until("released")
        await h.fake.wait_for(lambda fake: fake.busy_slots == 1)
        await h.fake.step(4)
        deltas = await call.until("deltas")
        assert deltas.items[0].content_offset == 0
        h.fake.release_passes()
        _ = await call.to_end()


async def test_deltas_of_a_new_attempt_begin_again() -> None:
    """A restarted item's text carries its attempt, from 1, and starts again at offset 0."""
    async with house() as h:
        h.fake.faults.add(
            Fault(FaultKind.RESET, path="/api/chat", when=lambda body: bool(body["messages"]), after_lines=3)
        )
        h.fake.hold_passes()
        call = h.run_batch([chat("a", "[[tokens=6]]")], deltas=pb.DeltaConfig(flush_interval=span(0.01)))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 1)
        await h.fake.step(2)
        first = await call.until("deltas")
        assert (first.items[0].attempt, first.items[0].content_offset) == (1, 0)
        h.fake.release_passes()
        seen = await call.to_end()
        result = seen.results["a"]
        assert result.attempts == 2
        assert said(seen, "a", attempt=2) == ("", result.completion.content)


# -- Silence, failures -----------------------------------------------------------------------------------------


async def test_a_silent_stream_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats come while nothing happens, have no sequence, and are not replayed."""
    monkeypatch.setattr(servicer, "follow", functools.partial(follow, heartbeat_s=0.02))
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch([chat("a")])
        for _ in range(3):
            _ = await call.until("heartbeat")
            assert not call.seen.events[-1].HasField("sequence")
            assert call.seen.events[-1].HasField("time")
        h.fake.release_passes()
        seen = await call.to_end()
        assert seen.summary.state == event_pb2.BATCH_STATE_COMPLETED
        batch_id = seen.report.batch_id
        assert "heartbeat" not in (await h.attach(batch_id)).kinds


async def test_progress_tells_how_far_a_batch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch runs, its counts are told from time to time, and they add up."""
    monkeypatch.setattr("unisono.app.run_batch.PROGRESS_INTERVAL_S", 0.05)
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(chats(12, num_predict=5), deltas=None)
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        await h.fake.step(2)
        progress = await call.until("progress")
        assert progress.accepted == 12
        assert progress.queued + progress.in_flight == 12
        assert progress.in_flight >= 4
        h.fake.release_passes()
        seen = await call.to_end()
        assert seen.report.counts.completed == 12
        assert seen.report.counts.completion_tokens == 60


async def test_an_items_failure_never_ends_the_stream() -> None:
    """A failed item is a result with a status, and all others are answered."""
    async with house(settings={"slots": 4}) as h:
        too_long = chat("too long", "word " * 5000)
        items = [too_long, chat("a"), chat("nobody", model="absent"), chat("b"), chat("wrong", model="fake-embed")]
        seen = await h.run(items)
        assert seen.states() == {
            "too long": "FAILED",
            "a": "COMPLETED",
            "nobody": "FAILED",
            "b": "COMPLETED",
            "wrong": "FAILED",
        }
        assert reason_of(seen.results["too long"]) == "PROMPT_TOO_LONG"
        assert reason_of(seen.results["nobody"]) == "MODEL_NOT_FOUND"
        assert reason_of(seen.results["wrong"]) == "MODEL_LACKS_CAPABILITY"
        assert not seen.results["nobody"].HasField("group")
        assert seen.results["nobody"].attempts == 0
        assert seen.summary.state == event_pb2.BATCH_STATE_COMPLETED
        counts = seen.report.counts
        assert (counts.accepted, counts.completed, counts.failed) == (5, 2, 3)


# -- Sizes -----------------------------------------------------------------------------------------------------


async def test_a_large_answer_comes_in_parts() -> None:
    """An answer of 6 MB comes in parts before its result, in one piece after another, no message above 4 MiB."""
    pieces = tuple(f"{n}{'é' if n % 2 else 'x'}" + "y" * 500_000 for n in range(12))
    async with house() as h:
        h.fake.answer("the book", Answer(content=pieces))
        seen = await h.run([chat("book", "the book"), chat("small", "[[say=hi]]")])
        assert seen.results["book"].completion.content == "".join(pieces)
        assert seen.results["book"].parts == len(seen.of("result_part")) >= 2
        assert [part.part for part in seen.of("result_part")] == list(range(seen.results["book"].parts))
        first = seen.kinds.index("result_part")
        count = seen.results["book"].parts
        assert seen.kinds[first : first + count + 1] == ["result_part"] * count + ["result"]
        assert seen.sequences == list(range(1, len(seen.sequences) + 1))
        assert seen.results["small"].parts == 0
        assert max(event.ByteSize() for event in seen.events) < MAX_SEND_BYTES
        # With deltas, too: also where one flush would be larger than a message.
        again = await h.run([chat("book", "the book")], deltas=pb.DeltaConfig(flush_interval=span(10.0)))
        assert said(again, "book") == ("", "".join(pieces))
        assert again.results["book"].completion.content == "".join(pieces)


async def test_many_vectors_come_in_parts() -> None:
    """An embedding of 2,048 texts comes back in their order, in as many messages as it takes."""
    models = [FakeModel(name="wide", capabilities=("embedding",), family="bert", embedding_length=768)]
    async with house(models=models) as h:
        texts = [f"text {n}" for n in range(2048)]
        seen = await h.run([embed("e", *texts, model="wide"), embed("two", *texts[100:102], model="wide")])
        vectors = seen.results["e"].completion.embeddings
        assert len(vectors) == 2048
        assert {len(vector.values) for vector in vectors} == {768}
        assert seen.results["e"].parts >= 2
        assert vectors[100:102] == seen.results["two"].completion.embeddings


async def test_requests_of_32_mib_are_received() -> None:
    """A request of almost 32 MiB is taken; a larger one is refused by the transport and harms nobody."""
    text = "x" * (4 * 1024 * 1024 - 64)
    async with house(models=[FakeModel(name="fake")]) as h:
        items = [chat(f"i{n}", text, num_predict=1) for n in range(7)]
        items.append(chat("last", "x" * (4 * 1024 * 1024 - 8192), num_predict=1))
        size = pb.RunBatchRequest(config=config(), items=items).ByteSize()
        assert 32 * 1024 * 1024 - 16_384 < size <= 32 * 1024 * 1024
        seen = await h.run(items)
        assert set(seen.states().values()) == {"COMPLETED"}
        items.append(chat("more", "x" * 20_000))
        with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
            _ = await h.run(items)
        assert (await h.run([chat("a")])).states() == {"a": "COMPLETED"}


async def test_a_batch_has_at_most_50_000_items() -> None:
    """50,000 items are accepted; one more refuses the batch before anything is done."""
    async with house() as h:
        items = [generate(f"{n}", "x") for n in range(50_001)]
        no = await refused(h.run_batch(items))
        assert (no.code.name, no.reason, no.fields) == ("INVALID_ARGUMENT", "INVALID_REQUEST", ["items"])
        assert {request.path for request in h.fake.requests} == {"/api/version"}
        h.fake.hold_passes()
        call = h.run_batch(items[:50_000])
        accepted = await call.until("accepted")
        assert accepted.item_count == 50_000
        _ = await call.until("released")
        assert await h.cancel(accepted.batch_id) == (50_000, 0)
        # Reading them all takes a while; the end of it will do.
        await call.lose()
        (summary,) = (
            await h.attach(accepted.batch_id, h.batches.get(accepted.batch_id).journal.last_sequence - 1)
        ).events
        assert summary.summary.report.counts.cancelled == 50_000


async def test_an_id_used_twice_fails_alone_or_refuses_the_batch() -> None:
    """PER_ITEM: the second item of an id becomes a failed result. STRICT: the batch is refused, and names it."""
    async with house() as h:
        items = [chat("a", "[[say=first]]"), chat("b"), chat("a", "[[say=second]]")]
        call = h.run_batch(items, validation=pb.VALIDATION_MODE_PER_ITEM)
        while not call.seen.of("summary"):
            _ = await call.until("result" if len(call.seen.of("result")) < 3 else "summary")
        results = call.seen.of("result")
        by_index = {result.index: result for result in results}
        assert len(results) == 3
        assert by_index[0].completion.content == "first"
        assert (by_index[2].item_id, state_of(by_index[2])) == ("a", "FAILED")
        assert reason_of(by_index[2]) == "INVALID_REQUEST"
        h_before = len(h.work)
        no = await refused(h.run_batch(items))
        assert (no.code.name, no.fields) == ("INVALID_ARGUMENT", ["items[2].item_id"])
        assert len(h.work) == h_before == 2


async def test_a_wave_goes_together_and_slots_are_filled_again() -> None:
    """What fits goes in one release after the load; passes are shared as the slots allow."""
    async with house(num_parallel=4, pass_s=0.005, settings={"slots": 4}) as h:
        seen = await h.run(chats(16, num_predict=10))
        paths = [request.path for request in h.fake.requests if request.path in ("/api/chat", "/api/generate")]
        assert len(paths) == 17
        assert len(h.loads) == 1
        released = seen.of("released")
        assert released[0].item_count >= 4
        assert released[0].HasField("spread")
        (group,) = seen.report.groups
        assert group.fewest_passes == 40
        assert h.fake.passes <= 46
        assert abs(group.passes.count - h.fake.passes) <= 2
        assert group.group.slots.source == event_pb2.SLOT_SOURCE_CONFIGURED
