"""Several answers of one item, on every way in."""

from __future__ import annotations

import grpc
import pytest

from tests.integration.service import (
    Stream,
    chat,
    chats,
    embed,
    generate,
    house,
    reason_of,
    refusal_of,
    refused,
    span,
    state_of,
)
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import item_pb2


def several(item: item_pb2.Item, n: int) -> item_pb2.Item:
    """The item, of which so many answers are wanted."""
    made = item_pb2.Item()
    made.CopyFrom(item)
    made.n = n
    return made


def seeds(works: list[object]) -> list[int]:
    """The seeds that the backend was asked with."""
    return sorted(work.body["options"]["seed"] for work in works)  # type: ignore[attr-defined]


async def test_each_answer_has_a_result_of_its_own() -> None:
    """Under its own id, in the item's place, with word of where it comes from."""
    async with house(num_parallel=4) as h:
        seen = await h.run([chat("a", "[[say=before]]"), several(chat("b", "[[say=three times]]"), 3), chat("c")])
        assert seen.of("accepted")[0].item_count == 5
        assert {name: result.index for name, result in seen.results.items()} == {
            "a": 0,
            "b#1": 1,
            "b#2": 2,
            "b#3": 3,
            "c": 4,
        }
        assert {result.completion.content for name, result in seen.results.items() if "#" in name} == {"three times"}
        assert {name: result.variant_of for name, result in seen.results.items() if result.variant_of} == {
            "b#1": "b",
            "b#2": "b",
            "b#3": "b",
        }
        assert seen.report.counts.completed == 5


async def test_seeds_are_counted_on_or_made_of_the_ids() -> None:
    """With a seed, the batch's or the item's own: from there on. Without: the same each time it is sent."""
    async with house(num_parallel=4) as h:
        _ = await h.run([several(chat("a", seed=7), 3)])
        assert seeds(h.work) == [7, 8, 9]
        _ = await h.run([several(generate("a", "x"), 2)], options=item_pb2.Options(seed=20))
        assert seeds(h.work[3:]) == [20, 21]
        _ = await h.run([several(chat("a"), 2)])
        _ = await h.run([several(chat("a"), 2)])
        made = seeds(h.work[5:7])
        assert made == seeds(h.work[7:9])
        assert len(set(made)) == 2


async def test_one_answer_is_the_item_as_ever() -> None:
    """n: 1 changes nothing: no other id, and no seed."""
    async with house() as h:
        seen = await h.run([several(chat("a"), 1)])
        assert seen.results["a"].variant_of == ""
        assert "seed" not in h.work[0].body.get("options", {})


@pytest.mark.parametrize(
    ("item", "fields"),
    [
        (several(chat("a"), 0), ["items[1].n"]),
        (several(chat("a"), 65), ["items[1].n"]),
        (several(embed("a", "x"), 2), ["items[1].n"]),
        (several(chat("x" * 255), 2), ["items[1].n"]),
        # Said once, though it is wrong with each answer.
        (several(chat("a", temperature=-1.0), 3), ["items[1].options.temperature"]),
        # Another item has the id of an answer.
        (several(chat("ok"), 1), ["items[1].item_id"]),
    ],
)
async def test_what_cannot_be_had_is_refused(item: item_pb2.Item, fields: list[str]) -> None:
    """The paths are those of the items that were sent."""
    async with house() as h:
        refusal = await refused(h.run_batch([chat("ok"), item]))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, fields)


async def test_an_id_given_by_hand_is_refused_where_an_answer_has_it() -> None:
    """As any id that is used twice."""
    async with house() as h:
        refusal = await refused(h.run_batch([several(chat("a"), 2), chat("a#2")]))
        assert refusal.fields == ["items[1].item_id"]
        seen = await h.run([several(chat("a"), 2), chat("a#2")], validation=pb.VALIDATION_MODE_PER_ITEM)
        assert [state_of(result) for result in seen.of("result")].count("FAILED") == 1


async def test_a_malformed_item_fails_as_often_as_it_was_to_be_answered() -> None:
    """With PER_ITEM, so that nobody waits for a result that never comes; where n itself is wrong, once."""
    async with house() as h:
        items = [several(chat("a", temperature=-1.0), 2), several(item_pb2.Item(item_id="b"), 2), chat("c")]
        seen = await h.run([*items, several(embed("d", "x"), 2)], validation=pb.VALIDATION_MODE_PER_ITEM)
        failed = {name for name, state in seen.states().items() if state == "FAILED"}
        assert failed == {"a#1", "a#2", "b#1", "b#2", "d"}
        assert {reason_of(seen.results[name]) for name in failed} == {"INVALID_REQUEST"}
        assert seen.results["b#2"].variant_of == "b"
        assert seen.states()["c"] == "COMPLETED"


async def test_answers_count_towards_the_limit_of_items() -> None:
    """Of a batch given whole, and of a plan."""
    async with house(settings={"max_items": 5}) as h:
        seen = await h.run([several(chat("a"), 3), several(chat("b"), 2)])
        assert len(seen.results) == 5
        refusal = await refused(h.run_batch([several(chat("a"), 3), several(chat("b"), 3)]))
        assert refusal.fields == ["items"]
        assert "6 items, each answer of `n` counted as one" in refusal.message


async def acked(stream: Stream, count: int) -> list[tuple[str, str]]:
    """The next acknowledgements: the id of each, and the reason of a refusal."""
    before = len(stream.acks)
    _ = await stream.until_acked(before + count)
    return [
        (ack.item_id, refusal_of(ack.refusal).reason if ack.HasField("refusal") else "")
        for ack in stream.acks[before:]
    ]


async def test_on_a_stream_each_answer_is_acknowledged() -> None:
    """And a refused item once, as a whole, under its own id."""
    async with house(num_parallel=4, settings={"max_open_items": 6}) as h:
        # Nothing goes, so that no item's end brings more credit.
        stream = await h.stream().open(release=pb.ReleasePolicy(interval=span(0)))
        await stream.add(several(chat("a"), 3), chat("b"))
        assert await acked(stream, 4) == [("a#1", ""), ("a#2", ""), ("a#3", ""), ("b", "")]
        assert [ack.index for ack in stream.acks] == [0, 1, 2, 3]
        # An answer has the id; then there is room for two more, and three do not go by halves.
        await stream.add(chat("a#2"), several(chat("c"), 3), several(chat("d"), 2))
        assert await acked(stream, 4) == [
            ("a#2", "DUPLICATE_ITEM"),
            ("c", "CREDIT_EXCEEDED"),
            ("d#1", ""),
            ("d#2", ""),
        ]
        # The path is the item's place in its message.
        bad = several(chat("e", temperature=-1.0), 2)
        await stream.add(several(chat("f"), 2), bad)
        assert await acked(stream, 2) == [("f", "INVALID_REQUEST"), ("e", "INVALID_REQUEST")]
        assert refusal_of(stream.acks[-1].refusal).fields == ["add_items.items[1].options.temperature"]
        seen = await (await stream.half_close()).to_end()
        assert set(seen.results) == {"a#1", "a#2", "a#3", "b", "d#1", "d#2"}


async def test_a_stream_s_batch_has_room_for_so_many_answers() -> None:
    """Beyond, the item is refused as a whole."""
    async with house(settings={"max_items": 4}) as h:
        stream = await h.stream().open()
        await stream.add(*chats(2), several(chat("a"), 3), several(chat("b"), 2))
        assert (await acked(stream, 5))[2:] == [("a", "BATCH_FULL"), ("b#1", ""), ("b#2", "")]
        _ = await (await stream.half_close()).to_end()


async def test_a_reopened_stream_knows_its_answers() -> None:
    """Sent again, the same item is acknowledged again, with the same places; other content is refused."""
    async with house(pass_s=0.002) as h:
        first = await h.stream().open(on_disconnect=pb.ON_DISCONNECT_DETACH)
        await first.add(several(chat("a"), 2))
        _ = await first.until_acked(2)
        second = await h.stream().reopen(first.seen.batch_id)
        await second.add(several(chat("a"), 2), several(chat("a", "something else"), 2))
        assert await acked(second, 3) == [("a#1", ""), ("a#2", ""), ("a", "DUPLICATE_ITEM")]
        assert [ack.index for ack in second.acks[:2]] == [0, 1]
        seen = await (await second.half_close()).to_end()
        assert set(seen.results) == {"a#1", "a#2"}


async def test_a_plan_and_a_single_request_know_answers_too() -> None:
    """The plan names each; Infer answers each."""
    async with house(num_parallel=4) as h:
        items = [several(chat("a"), 2), chat("b")]
        plan = await h.stub.PlanBatch(pb.PlanBatchRequest(config=pb.BatchConfig(model="fake"), items=items))
        assert [item_id for group in plan.groups for item_id in group.item_ids] == ["a#1", "a#2", "b"]
        refused_plan = await h.stub.PlanBatch(
            pb.PlanBatchRequest(config=pb.BatchConfig(model="fake"), items=[chat("b"), several(embed("e", "x"), 3)])
        )
        assert [(one.item_id, one.index) for one in refused_plan.refusals] == [("e", 1)]
        seen = await h.infer(several(chat("", "[[say=hi]]"), 2)).to_end()
        assert set(seen.results) == {"0#1", "0#2"}


async def test_an_item_is_cancelled_with_all_its_answers() -> None:
    """By its own id, which none of them has; an answer that is named besides is counted once."""
    async with house(num_parallel=8) as h:
        h.fake.hold_passes()
        call = h.run_batch([several(chat("a"), 4), chat("b"), several(chat("c"), 2)])
        batch_id = (await call.until("accepted")).batch_id
        assert await h.cancel(batch_id, "a#2") == (1, 0)
        assert await h.cancel(batch_id, "a", "a#1") == (3, 1)
        h.fake.release_passes()
        states = (await call.to_end()).states()
        assert {name for name, state in states.items() if state == "CANCELLED"} == {"a#1", "a#2", "a#3", "a#4"}
        assert {name for name, state in states.items() if state == "COMPLETED"} == {"b", "c#1", "c#2"}


async def test_a_stream_cancels_an_item_with_all_its_answers() -> None:
    """As CancelBatch does; an id that there is not is passed over."""
    async with house(num_parallel=8) as h:
        stream = await h.stream().open(release=pb.ReleasePolicy(interval=span(0)))
        await stream.add(several(chat("a"), 3), chat("b"))
        _ = await stream.until_acked(4)
        _ = await stream.cancel_items("a", "nobody")
        states = (await (await stream.half_close()).to_end()).states()
        assert states == {"a#1": "CANCELLED", "a#2": "CANCELLED", "a#3": "CANCELLED", "b": "COMPLETED"}
