"""Wrong input through the real port: a clear status with the field's path, and nothing sent to the backend."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from tests.integration.service import (
    House,
    chat,
    chats,
    config,
    embed,
    generate,
    house,
    reason_of,
    refusal_of,
    refused,
    span,
    state_of,
    user,
)
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2, item_pb2

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 16
MIB = 1024 * 1024


def no_work(h: House) -> None:
    """Nothing was sent to the backend: neither an item nor a load, nor was a connection opened to hold one."""
    assert not [request for request in h.fake.requests if request.path != "/api/version"]
    assert h.fake.open_connections == 0


def changed(change: Callable[[Any], object], item: item_pb2.Item | None = None) -> item_pb2.Item:
    """An item that is wrong in one way."""
    item = item or chat("wrong")
    _ = change(item)
    return item


def with_unknown_field(item: item_pb2.Item) -> None:
    """An option that only a newer contract has: field 999 of Options, a varint."""
    item.options.MergeFromString(b"\xb8\x3e\x01")


def with_unknown_runner_field(item: item_pb2.Item) -> None:
    """The same within the runner's options."""
    item.options.runner.MergeFromString(b"\xb8\x3e\x01")


def message(**fields: Any) -> item_pb2.Item:
    """A conversation whose second message is made of these fields."""
    messages = [user("first"), item_pb2.Message(**fields)]
    return item_pb2.Item(item_id="wrong", chat=item_pb2.ChatRequest(messages=messages))


# What is wrong, the path from the item on, and a word of the description.
WRONG_ITEMS: dict[str, tuple[item_pb2.Item, str, str]] = {
    "no id": (chat(""), "item_id", "required"),
    "long id": (chat("x" * 257), "item_id", "256"),
    "control character in the id": (chat("a\nb"), "item_id", "control"),
    "no request": (item_pb2.Item(item_id="wrong"), "request", "required"),
    "no messages": (item_pb2.Item(item_id="wrong", chat=item_pb2.ChatRequest()), "chat.messages", "empty"),
    "no role": (message(content="x"), "chat.messages[1].role", "required"),
    "unknown role": (message(role=99, content="x"), "chat.messages[1].role", "99"),
    "empty message": (message(role=item_pb2.ROLE_USER), "chat.messages[1].content", "empty"),
    "10 MB of text": (chat("wrong", "x" * (10 * MIB)), "chat.messages[0].content", "bytes of text"),
    "no picture": (
        message(role=item_pb2.ROLE_USER, content="see", images=[PNG, b"not a picture"]),
        "chat.messages[1].images[1]",
        "PNG",
    ),
    "picture in base64": (
        message(role=item_pb2.ROLE_USER, content="see", images=[base64.b64encode(PNG)]),
        "chat.messages[1].images[0]",
        "base64",
    ),
    "large picture": (
        message(role=item_pb2.ROLE_USER, content="see", images=[PNG + b"\0" * (16 * MIB)]),
        "chat.messages[1].images[0]",
        "bytes",
    ),
    "bad call arguments": (
        message(role=item_pb2.ROLE_ASSISTANT, tool_calls=[item_pb2.ToolCall(name="f", arguments_json="[1]")]),
        "chat.messages[1].tool_calls[0].arguments_json",
        "object",
    ),
    "nameless tool": (
        changed(lambda item: item.chat.tools.add(description="x")),
        "chat.tools[0].name",
        "required",
    ),
    "bad parameters": (
        changed(lambda item: item.chat.tools.add(name="f", parameters_json="{")),
        "chat.tools[0].parameters_json",
        "JSON",
    ),
    "bad schema": (
        changed(lambda item: setattr(item.chat.format, "json_schema", '{"type": NaN}')),
        "chat.format.json_schema",
        "JSON",
    ),
    "json: false": (changed(lambda item: setattr(item.chat.format, "json", False)), "chat.format", "true"),
    "unknown think": (changed(lambda item: setattr(item.chat, "think", 77)), "chat.think", "77"),
    "many logprobs": (changed(lambda item: setattr(item.chat.logprobs, "top", 21)), "chat.logprobs.top", "20"),
    "unknown option": (changed(with_unknown_field), "options", "999"),
    "unknown runner option": (changed(with_unknown_runner_field), "options.runner", "999"),
    "typed name in extra options": (
        chat("wrong", extra_options_json='{"mirostat": 1, "temperature": 0}'),
        "options.extra_options_json.temperature",
        "options.temperature",
    ),
    "extra options are no object": (chat("wrong", extra_options_json="7"), "options.extra_options_json", "object"),
    "top_p": (chat("wrong", top_p=1.5), "options.top_p", "1.5"),
    "temperature": (chat("wrong", temperature=float("nan")), "options.temperature", "nan"),
    "num_ctx": (chat("wrong", runner=item_pb2.RunnerOptions(num_ctx=1)), "options.runner.num_ctx", "16"),
    "empty stop": (chat("wrong", stop=["a", ""]), "options.stop", "empty"),
    "many stops": (chat("wrong", stop=["a"] * 17), "options.stop", "16"),
    "empty prompt": (generate("wrong", ""), "generate.prompt", "empty"),
    "raw and a template": (
        changed(
            lambda item: item.generate.MergeFrom(item_pb2.GenerateRequest(raw=True, template="x")), generate("w", "x")
        ),
        "generate.template",
        "raw",
    ),
    "nothing to embed": (embed("wrong"), "embed.input", "empty"),
    "much to embed": (embed("wrong", *["x"] * 2049), "embed.input", "2,048"),
    "dimensions": (
        changed(lambda item: setattr(item.embed, "dimensions", 0), embed("w", "x")),
        "embed.dimensions",
        "1",
    ),
}


async def test_a_malformed_item_refuses_its_batch_and_names_the_field() -> None:
    """STRICT: INVALID_ARGUMENT with the path "items[3]…" and what is wrong there; nothing reaches the backend."""
    async with house() as h:
        for what, (wrong, path, word) in WRONG_ITEMS.items():
            no = await refused(h.run_batch([*chats(3), wrong]))
            assert (no.code, no.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"), what
            assert no.fields == [f"items[3].{path}"], what
            assert word in no.descriptions[0], (what, no.descriptions)
            assert f"items[3].{path}" in no.message, what
        no_work(h)


async def test_per_item_a_malformed_item_fails_alone() -> None:
    """PER_ITEM: each malformed item is a failed result with its fields, and the others are answered."""
    small = {what: wrong for what, wrong in WRONG_ITEMS.items() if wrong[0].ByteSize() < MIB}
    items = [chat("good", "[[say=yes]]")]
    for n, (wrong, path, _) in enumerate(small.values()):
        item = item_pb2.Item()
        item.CopyFrom(wrong)
        if path != "item_id":
            item.item_id = f"w{n}"
        items.append(item)
    async with house() as h:
        call = h.run_batch([*items, chat("last", "[[say=too]]")], validation=pb.VALIDATION_MODE_PER_ITEM)
        seen = await call.to_end()
        by_index = {result.index: result for result in seen.of("result")}
        assert len(by_index) == len(small) + 2
        assert by_index[0].completion.content == "yes"
        assert by_index[len(small) + 1].completion.content == "too"
        for n, (what, (_, path, word)) in enumerate(small.items()):
            result = by_index[n + 1]
            assert state_of(result) == "FAILED", what
            no = refusal_of(result.error)
            assert (no.code, no.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"), what
            assert no.fields == [path], what
            assert word in no.descriptions[0], what
            assert (result.attempts, result.HasField("group"), result.HasField("usage")) == (0, False, False)
        assert len(h.work) == 2


async def test_all_that_is_wrong_is_listed() -> None:
    """A request that is wrong in many places names them all, or as many as fit, and says that it was cut."""
    async with house() as h:
        items = [chat("a"), chat(""), chat("a", top_p=2.0), message(content="x")]
        no = await refused(h.run_batch(items))
        assert no.fields == [
            "items[1].item_id",
            "items[2].options.top_p",
            "items[2].item_id",
            "items[3].chat.messages[1].role",
        ]
        no = await refused(h.run_batch([chat("") for _ in range(10_000)]))
        assert no.code is grpc.StatusCode.INVALID_ARGUMENT
        assert 10 < len(no.fields) <= 100
        assert "9,999 more" in no.message
        assert "listed" in no.message
        no_work(h)


async def test_an_empty_batch_is_refused() -> None:
    """A batch needs an item, whatever the validation."""
    async with house() as h:
        for mode in (pb.VALIDATION_MODE_STRICT, pb.VALIDATION_MODE_PER_ITEM):
            no = await refused(h.run_batch([], validation=mode))
            assert (no.code, no.reason, no.fields) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "INVALID_REQUEST",
                ["items"],
            )
        no_work(h)


WRONG_CONFIGS: dict[str, tuple[pb.BatchConfig, str]] = {
    "attempts": (config(max_attempts=11), "config.max_attempts"),
    "no attempts": (config(max_attempts=0), "config.max_attempts"),
    "negative time": (config(queue_timeout=span(-1)), "config.queue_timeout"),
    "options": (config(options=item_pb2.Options(top_p=7)), "config.options.top_p"),
    "request_id": (config(request_id="x" * 257), "config.request_id"),
    "validation": (config(validation=9), "config.validation"),
    "on_disconnect": (config(on_disconnect=9), "config.on_disconnect"),
    "flush": (config(deltas=pb.DeltaConfig(flush_interval=span(0.001))), "config.deltas.flush_interval"),
    "flush bytes": (config(deltas=pb.DeltaConfig(flush_bytes=0)), "config.deltas.flush_bytes"),
    "release": (config(release=pb.ReleasePolicy(size=0)), "config.release.size"),
    "long model": (config(model="x" * 300), "config.model"),
}


async def test_a_wrong_config_is_refused_and_names_the_field() -> None:
    """What is wrong with the config refuses RunBatch, StreamBatch and PlanBatch, with the path of the field."""
    async with house() as h:
        for what, (wrong, path) in WRONG_CONFIGS.items():
            no = await refused(h.stub.PlanBatch(pb.PlanBatchRequest(config=wrong, items=chats(1))))
            assert (no.code, no.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [path]), what
            fields = {field.name: value for field, value in wrong.ListFields()}
            if wrong.HasField("max_attempts"):
                fields["max_attempts"] = wrong.max_attempts
            no = await refused(h.run_batch(chats(1), **fields))
            assert (no.code, no.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [path]), what
            stream = h.stream()
            _ = await stream.open(**fields)
            no = await refused(stream)
            assert (no.code, no.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [f"open.{path}"]), what
        no_work(h)


async def test_an_unknown_model_fails_its_items_and_says_how_to_get_it() -> None:
    """MODEL_NOT_FOUND is the result of the items that name the model; all others complete."""
    async with house() as h:
        items = [chat("a"), chat("b", model="llama9:70b"), chat("c", model="no/such name!"), chat("d")]
        seen = await h.run(items)
        assert seen.states() == {"a": "COMPLETED", "b": "FAILED", "c": "FAILED", "d": "COMPLETED"}
        no = refusal_of(seen.results["b"].error)
        assert (no.code, no.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert "ollama pull llama9:70b" in no.message
        assert no.metadata["model"] == "llama9:70b"
        assert reason_of(seen.results["c"]) == "MODEL_NOT_FOUND"
        assert {request.body["model"] for request in h.work} == {"fake:latest"}


async def test_what_a_model_cannot_do_fails_the_item_that_asks_it() -> None:
    """MODEL_LACKS_CAPABILITY for chat, tools, thinking, pictures, embeddings and suffixes; nothing is sent."""
    tools = chat("tools")
    _ = tools.chat.tools.add(name="f")
    thinks = chat("thinks")
    thinks.chat.think = item_pb2.THINK_ON
    sees = message(role=item_pb2.ROLE_USER, content="see", images=[PNG])
    sees.item_id = "sees"
    fills = generate("fills", "a")
    fills.generate.suffix = "c"
    items = [
        tools,
        thinks,
        sees,
        fills,
        embed("embeds", "x", model="fake"),
        chat("chats", model="fake-embed"),
        chat("ok"),
    ]
    async with house() as h:
        seen = await h.run(items)
        capabilities = {"tools", "thinking", "vision", "insert", "embedding", "completion"}
        assert seen.states().pop("ok") == "COMPLETED"
        found = set()
        for name in ("tools", "thinks", "sees", "fills", "embeds", "chats"):
            no = refusal_of(seen.results[name].error)
            assert (no.code, no.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_LACKS_CAPABILITY")
            found.add(no.metadata["capability"])
        assert found == capabilities
        assert len(h.work) == 1


async def test_what_the_backend_calls_wrong_is_not_tried_again() -> None:
    """A prompt that is too long is the caller's mistake; it may ask for a cut instead."""
    long = chat("long", "word " * 9000)
    async with house() as h:
        seen = await h.run([long, chat("ok")])
        no = refusal_of(seen.results["long"].error)
        assert (no.code, no.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG")
        assert seen.results["long"].attempts == 1
        assert seen.states()["ok"] == "COMPLETED"
        assert seen.report.retries == 0
        # The caller may ask for the cut instead.
        cut = chat("cut", "word " * 9000)
        cut.chat.truncate = True
        cut.item_id = "cut"
        assert (await h.run([cut])).states() == {"cut": "COMPLETED"}


@pytest.mark.parametrize("rpc", ["ListPasses", "PlanBatch"])
async def test_page_tokens_that_are_made_up_are_refused(rpc: str) -> None:
    """INVALID_ARGUMENT names `page_token`; a page that is too large names `page_size`."""
    async with house() as h:
        seen = await h.run(chats(1))
        requests = {
            "ListPasses": pb.ListPassesRequest(batch_id=seen.batch_id),
            "PlanBatch": pb.PlanBatchRequest(config=config(), items=chats(1)),
        }
        request: Any = requests[rpc]
        for token in ("x", "Mg==", "dTE6LTE=", "dTE6eA=="):
            request.page_token = token
            no = await refused(getattr(h.stub, rpc)(request))
            assert (no.code, no.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["page_token"])
        request.page_token = ""
        request.page_size = 50_001
        no = await refused(getattr(h.stub, rpc)(request))
        assert (no.code, no.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["page_size"])


async def test_unknown_batches_and_items_are_not_found() -> None:
    """NOT_FOUND with BATCH_NOT_FOUND or ITEM_NOT_FOUND, for each rpc that names a batch."""
    async with house() as h:
        stream = h.stream()
        _ = await stream.reopen("batch_nobody")
        calls = [
            h.attach_batch("batch_nobody"),
            stream,
            h.stub.CancelBatch(pb.CancelBatchRequest(batch_id="batch_nobody")),
            h.stub.ListPasses(pb.ListPassesRequest(batch_id="")),
        ]
        for call in calls:
            no = await refused(call)
            assert (no.code, no.reason) == (grpc.StatusCode.NOT_FOUND, "BATCH_NOT_FOUND")
        seen = await h.run(chats(2))
        no = await refused(h.stub.CancelBatch(pb.CancelBatchRequest(batch_id=seen.batch_id, item_ids=["i0", "zz"])))
        assert (no.code, no.reason) == (grpc.StatusCode.NOT_FOUND, "ITEM_NOT_FOUND")


async def test_more_batches_than_the_limit_are_refused_for_the_moment() -> None:
    """RESOURCE_EXHAUSTED with a RetryInfo; when one has ended, the next is taken."""
    async with house(settings={"max_batches": 2}) as h:
        h.fake.hold_passes()
        calls = [h.run_batch(chats(1)) for _ in range(2)]
        for call in calls:
            _ = await call.until("accepted")
        no = await refused(h.run_batch(chats(1)))
        assert (no.code, no.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED")
        assert no.retry_after_s == 5.0
        h.fake.release_passes()
        for call in calls:
            _ = await call.to_end()
        assert (await h.run(chats(1))).summary.state == event_pb2.BATCH_STATE_COMPLETED
