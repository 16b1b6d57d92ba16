"""A batch that runs all at one time, or not at all."""

from __future__ import annotations

import grpc
import pytest

from tests.fakes.ollama import FakeModel
from tests.integration.service import chat, chats, house, refused
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import item_pb2

REQUIRED = pb.CO_SCHEDULING_REQUIRED
ALONE = pb.VALIDATION_MODE_PER_ITEM


async def test_with_as_many_slots_as_items_all_go_in_one_wave() -> None:
    """Where their number is configured."""
    async with house(num_parallel=4, settings={"slots": 4}) as h:
        seen = await h.run(chats(4, num_predict=5), co_scheduling=REQUIRED)
        assert set(seen.states().values()) == {"COMPLETED"}
        (group,) = seen.report.groups
        assert group.first_wave.item_count == 4


async def test_with_fewer_it_is_refused_with_the_remedy() -> None:
    """Before it exists: nothing is loaded, and nothing sent."""
    async with house(settings={"slots": 3}) as h:
        refusal = await refused(h.run_batch(chats(4), co_scheduling=REQUIRED))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_ENOUGH_SLOTS")
        assert (refusal.metadata["slots"], refusal.metadata["items"]) == ("3", "4")
        for word in ("OLLAMA_NUM_PARALLEL=4", "UNISONO_SLOTS=4", "TOGETHER"):
            assert word in refusal.message
        assert h.batches.running == 0
        assert not h.loads
        assert not h.work


async def test_an_unknown_number_is_not_enough() -> None:
    """The remedy says how it becomes known."""
    async with house() as h:
        refusal = await refused(h.run_batch(chats(2), co_scheduling=REQUIRED))
        assert refusal.metadata["slots"] == "0"
        assert "UNISONO_SLOTS" in refusal.message
        assert "run a larger batch first" in refusal.message


async def test_what_was_seen_is_enough() -> None:
    """Items that held a slot at one time prove so many slots."""
    async with house(num_parallel=4, pass_s=0.002) as h:
        _ = await h.run(chats(12, num_predict=40))
        seen = await h.run(chats(3, num_predict=5), co_scheduling=REQUIRED)
        assert set(seen.states().values()) == {"COMPLETED"}


@pytest.mark.parametrize(
    "other",
    [chat("z", model="second"), chat("z", runner=item_pb2.RunnerOptions(num_batch=64))],
    ids=["another model", "another runner"],
)
async def test_two_runners_never_run_at_one_time(other: item_pb2.Item) -> None:
    """However many slots they have."""
    models = [FakeModel(name="fake"), FakeModel(name="second")]
    async with house(models=models, settings={"slots": 8}) as h:
        refusal = await refused(h.run_batch([*chats(2), other], co_scheduling=REQUIRED))
        assert (refusal.reason, refusal.metadata["groups"]) == ("NOT_ENOUGH_SLOTS", "2")


async def test_items_that_cannot_run_need_no_slot() -> None:
    """A malformed one and one without a model fail, and the others run together."""
    async with house(num_parallel=2, settings={"slots": 2}) as h:
        items = [*chats(2, num_predict=5), item_pb2.Item(item_id="bad"), chat("lost", model="nosuch")]
        seen = await h.run(items, co_scheduling=REQUIRED, validation=ALONE)
        assert seen.states() == {"i0": "COMPLETED", "i1": "COMPLETED", "bad": "FAILED", "lost": "FAILED"}


async def test_every_answer_of_an_item_counts() -> None:
    """Three answers need three slots."""
    async with house(settings={"slots": 2}) as h:
        item = chat("a")
        item.n = 3
        refusal = await refused(h.run_batch([item], co_scheduling=REQUIRED))
        assert refusal.metadata["items"] == "3"


async def test_fewer_at_a_time_is_a_contradiction() -> None:
    """It would never be released."""
    async with house(settings={"slots": 8}) as h:
        refusal = await refused(h.run_batch(chats(3), co_scheduling=REQUIRED, max_concurrency=2))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["config.max_concurrency"])


async def test_where_the_backend_is_away_nobody_knows() -> None:
    """The call says so at once, and that waiting helps."""
    async with house(starts_away=True) as h:
        refusal = await refused(h.run_batch(chats(2), co_scheduling=REQUIRED))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE")


async def test_a_plan_says_it_beforehand() -> None:
    """As a warning, in the same words."""
    async with house(settings={"slots": 2}) as h:
        config = pb.BatchConfig(model="fake", co_scheduling=REQUIRED)
        plan = await h.stub.PlanBatch(pb.PlanBatchRequest(config=config, items=chats(3)))
        assert [warning.reason for warning in plan.warnings] == ["NOT_ENOUGH_SLOTS"]
        assert "OLLAMA_NUM_PARALLEL=3" in plan.warnings[0].message
        fits = await h.stub.PlanBatch(pb.PlanBatchRequest(config=config, items=chats(2)))
        assert not fits.warnings


async def test_joining_it_again_asks_for_nothing() -> None:
    """The batch is there; whether it could begin now is of no account."""
    async with house(num_parallel=4, settings={"slots": 4}) as h:
        first = await h.run(chats(4, num_predict=3), co_scheduling=REQUIRED, request_id="r")
        await h.fake.go_away()
        again = await h.run(chats(4, num_predict=3), co_scheduling=REQUIRED, request_id="r")
        assert again.batch_id == first.batch_id
