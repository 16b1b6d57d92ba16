"""Messages that all conversations of a batch begin with, sent once."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from tests.integration.service import chat, chats, embed, generate, house, reason_of, refusal_of, refused, user
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import item_pb2

SYSTEM = item_pb2.Message(role=item_pb2.ROLE_SYSTEM, content="You are brief.")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)


def shared(*messages: item_pb2.Message) -> pb.SharedContext:
    """A shared context of these messages, or of one."""
    return pb.SharedContext(messages=messages or [SYSTEM])


def asked(work: Any) -> list[str]:
    """The texts of a request's messages."""
    return [message["content"] for message in work.body["messages"]]


async def test_each_conversation_begins_with_it() -> None:
    """Before its own messages, in the order given."""
    async with house(num_parallel=4) as h:
        seen = await h.run(chats(3), shared_context=shared(SYSTEM, user("An example.")))
        assert set(seen.states().values()) == {"COMPLETED"}
        assert sorted(asked(work) for work in h.work) == [
            ["You are brief.", "An example.", f"Question {n}"] for n in range(3)
        ]
        assert h.work[0].body["messages"][0]["role"] == "system"


async def test_pictures_are_shared_too() -> None:
    """A model that cannot see them cannot answer."""
    async with house() as h:
        picture = item_pb2.Message(role=item_pb2.ROLE_USER, content="Look.", images=[PNG])
        seen = await h.run([chat("a")], shared_context=shared(picture))
        assert reason_of(seen.results["a"]) == "MODEL_LACKS_CAPABILITY"


async def test_streams_and_single_requests_have_it_too() -> None:
    """Wherever a config is."""
    async with house() as h:
        stream = await h.stream().open(shared_context=shared())
        await stream.add(chat("a", "streamed"))
        _ = await (await stream.half_close()).to_end()
        _ = await h.infer(chat("a", "alone"), shared_context=shared()).to_end()
        assert [asked(work) for work in h.work] == [["You are brief.", "streamed"], ["You are brief.", "alone"]]


@pytest.mark.parametrize(
    ("item", "field"), [(generate("a", "x"), "generate"), (embed("a", "x"), "embed")], ids=["prompt", "embedding"]
)
async def test_it_goes_with_conversations_only(item: item_pb2.Item, field: str) -> None:
    """Anything else is refused, or fails alone."""
    async with house() as h:
        refusal = await refused(h.run_batch([chat("b"), item], shared_context=shared()))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [f"items[1].{field}"])
        assert "shared_context goes with chat items only" in refusal.message
        seen = await h.run([chat("b"), item], shared_context=shared(), validation=pb.VALIDATION_MODE_PER_ITEM)
        assert seen.states() == {"a": "FAILED", "b": "COMPLETED"}
        assert refusal_of(seen.results["a"].error).fields == [field]


async def test_what_is_wrong_with_it_is_said_once() -> None:
    """With its own path, before any item is looked at."""
    async with house() as h:
        wrong = shared(SYSTEM, item_pb2.Message(content="who?"))
        refusal = await refused(h.run_batch([chat("a"), item_pb2.Item()], shared_context=wrong))
        assert refusal.fields == ["config.shared_context.messages[1].role"]
        stream = await h.stream().open(shared_context=wrong)
        assert (await refused(stream)).fields == ["open.config.shared_context.messages[1].role"]


async def test_it_counts_towards_each_item_s_limits() -> None:
    """The paths are those of the item as it was sent."""
    async with house(settings={"max_item_text_bytes": 100}) as h:
        assert (await h.run([chat("a", "x" * 40)], shared_context=shared(user("y" * 60)))).states() == {
            "a": "COMPLETED"
        }
        items = [chat("a", "x" * 41), chat("b", "x")]
        refusal = await refused(h.run_batch(items, shared_context=shared(user("y" * 60))))
        assert refusal.fields == ["items[0].chat.messages[0].content"]
        assert "101 bytes of text (60 of them in shared_context)" in refusal.message
        refusal = await refused(h.run_batch([chat("a")], shared_context=shared(user("y" * 101))))
        assert refusal.fields == ["config.shared_context.messages"]


async def test_it_belongs_to_the_content_of_a_request() -> None:
    """The same request_id with another context is another request."""
    async with house() as h:
        _ = await h.run([chat("a")], request_id="r", shared_context=shared())
        refusal = await refused(h.run_batch([chat("a")], request_id="r", shared_context=shared(user("other"))))
        assert refusal.reason == "REQUEST_ID_REUSED"
        _ = await h.run([chat("a")], request_id="r", shared_context=shared())
        assert len(h.work) == 1


async def test_a_plan_counts_it_and_sees_the_family() -> None:
    """Tokens of each prompt, and that all begin alike."""
    async with house() as h:
        config = pb.BatchConfig(model="fake", shared_context=shared(user("y" * 4000)))
        plan = await h.stub.PlanBatch(pb.PlanBatchRequest(config=config, items=chats(5)))
        (group,) = plan.groups
        assert group.estimated_prompt_tokens >= 5 * 1000
        (family,) = group.families
        assert (family.item_count, family.example_item_id) == (5, "i0")
        assert 900 <= family.estimated_prefix_tokens <= 1000
