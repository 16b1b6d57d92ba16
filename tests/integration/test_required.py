"""A batch that runs all at one time, or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest

from tests.fakes.ollama import FakeModel
from tests.integration.service import House, chat, chats, embed, house, refused
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import item_pb2
from unisono.adapters.ollama import OllamaBackend
from unisono.core.model import LoadedRunner

REQUIRED = pb.CO_SCHEDULING_REQUIRED
ALONE = pb.VALIDATION_MODE_PER_ITEM


async def plan(h: House, items: list[item_pb2.Item], **more: Any) -> pb.PlanBatchResponse:
    """What such a batch would do."""
    asked = pb.BatchConfig(model="fake", co_scheduling=REQUIRED, **more)
    answer = await h.stub.PlanBatch(pb.PlanBatchRequest(config=asked, items=items))
    assert isinstance(answer, pb.PlanBatchResponse)
    return answer


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
        assert refusal.metadata["slots"] == "1"
        assert "UNISONO_SLOTS" in refusal.message
        assert "run a larger batch first" in refusal.message


async def test_one_item_can_always_run() -> None:
    """Every runner has a slot."""
    async with house() as h:
        seen = await h.run(chats(1, num_predict=5), co_scheduling=REQUIRED)
        assert set(seen.states().values()) == {"COMPLETED"}


async def test_embedding_models_have_one_slot_before_they_had_work() -> None:
    """That is not for anybody to change, so no setting is named."""
    async with house() as h:
        refusal = await refused(h.run_batch([embed("a", "x"), embed("b", "y")], co_scheduling=REQUIRED))
        assert (refusal.reason, refusal.metadata["slots"]) == ("NOT_ENOUGH_SLOTS", "1")
        assert "Ollama gives embedding models one slot" in refusal.message
        assert "NUM_PARALLEL=" not in refusal.message
        seen = await h.run([embed("a", "x")], co_scheduling=REQUIRED)
        assert set(seen.states().values()) == {"COMPLETED"}


async def test_a_family_that_gets_one_slot_is_told_before_it_had_work() -> None:
    """As for those, the remedy is another one."""
    async with house(models=[FakeModel(name="fake", family="qwen35")]) as h:
        refusal = await refused(h.run_batch(chats(2), co_scheduling=REQUIRED))
        assert "Ollama runs the family qwen35 one request at a time" in refusal.message
        assert "NUM_PARALLEL=" not in refusal.message


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
    """It would never be released; a plan refuses it like the batch itself."""
    async with house(settings={"slots": 8}) as h:
        ran = await refused(h.run_batch(chats(3), co_scheduling=REQUIRED, max_concurrency=2))
        planned = await refused(plan(h, chats(3), max_concurrency=2))
        for refusal in (ran, planned):
            assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["config.max_concurrency"])
        assert ran.message == planned.message
        await plan(h, chats(2), max_concurrency=2)


async def test_slots_that_others_hold_are_not_there() -> None:
    """Learned are four; while a foreign client holds three, a wave of four would not share its passes."""
    async with house(num_parallel=4, pass_s=0.005) as h:
        _ = await h.run(chats(40, num_predict=12))
        guest = await h.fake.foreign(slots=3)
        _ = await h.run(chats(20, num_predict=12))
        refusal = await refused(h.run_batch(chats(4), co_scheduling=REQUIRED))
        assert (refusal.reason, refusal.metadata["slots"]) == ("NOT_ENOUGH_SLOTS", "1")
        assert "of which 1 can be used at this moment" in refusal.message
        guest.leave()
        _ = await h.run(chats(60, num_predict=12))
        seen = await h.run(chats(4, num_predict=5), co_scheduling=REQUIRED)
        assert seen.report.groups[0].first_wave.item_count == 4


async def test_a_new_process_of_the_runner_has_shown_nothing() -> None:
    """The server comes back with fewer slots, and the next load tells that it is another process."""
    async with house(num_parallel=4, pass_s=0.002) as h:
        _ = await h.run(chats(24, num_predict=20))
        await h.fake.go_away()
        h.fake.num_parallel = 2
        await h.fake.come_back()
        _ = await h.run(chats(2, num_predict=5))
        refusal = await refused(h.run_batch(chats(4), co_scheduling=REQUIRED))
        assert "has shown 2 so far" in refusal.message


# -- Memory ------------------------------------------------------------------------------------------------------


async def test_a_share_of_the_context_is_kept_to() -> None:
    """Four items that may need all of their slots are too many for a half; with short answers they are not."""
    async with house(num_parallel=4, settings={"slots": 4, "memory_factor": 0.5}) as h:
        large = [chat(f"i{n}", num_predict=1000, runner=item_pb2.RunnerOptions(num_ctx=1024)) for n in range(4)]
        ran = await refused(h.run_batch(large, co_scheduling=REQUIRED))
        assert (ran.reason, ran.metadata["limit"]) == ("NOT_ENOUGH_SLOTS", "memory_factor")
        assert (ran.metadata["slots"], ran.metadata["items"]) == ("2", "4")
        assert not h.loads
        answer = await plan(h, large)
        assert answer.warnings[0].message == f"RunBatch refuses this batch: {ran.message}"
        small = [chat(f"i{n}", num_predict=400, runner=item_pb2.RunnerOptions(num_ctx=1024)) for n in range(4)]
        assert not (await plan(h, small)).warnings
        seen = await h.run(small, co_scheduling=REQUIRED)
        assert seen.report.groups[0].first_wave.item_count == 4


async def test_a_runner_that_may_not_take_so_much_is_not_loaded() -> None:
    """Each context by itself, so that none is made smaller."""
    models = [FakeModel(name="fake", size=1_000_000)]
    asked = [chat(f"i{n}", num_predict=4, runner=item_pb2.RunnerOptions(num_ctx=1024)) for n in range(4)]
    separate = pb.CONTEXT_POLICY_SEPARATE
    async with house(models=models, settings={"slots": 4, "memory_limit": 8_000_000}) as h:
        ran = await refused(h.run_batch(asked, co_scheduling=REQUIRED, context_policy=separate))
        assert (ran.reason, ran.metadata["limit"]) == ("NOT_ENOUGH_SLOTS", "memory_limit")
        assert "UNISONO_MEMORY_LIMIT" in ran.message
        answer = await plan(h, asked, context_policy=separate)
        assert answer.warnings[0].message == f"RunBatch refuses this batch: {ran.message}"
        assert not h.loads
        seen = await h.run(asked, co_scheduling=REQUIRED)
        assert set(seen.states().values()) == {"COMPLETED"}


async def test_where_the_backend_is_away_nobody_knows() -> None:
    """The call says so at once, and that waiting helps."""
    async with house(starts_away=True) as h:
        refusal = await refused(h.run_batch(chats(2), co_scheduling=REQUIRED))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE")


async def test_a_plan_says_it_beforehand() -> None:
    """As a warning, in the same words, which says who refuses."""
    async with house(settings={"slots": 2}) as h:
        ran = await refused(h.run_batch(chats(3), co_scheduling=REQUIRED))
        answer = await plan(h, chats(3))
        assert [warning.reason for warning in answer.warnings] == ["NOT_ENOUGH_SLOTS"]
        assert answer.warnings[0].message == f"RunBatch refuses this batch: {ran.message}"
        assert "OLLAMA_NUM_PARALLEL=3" in answer.warnings[0].message
        assert not (await plan(h, chats(2))).warnings


async def test_joining_it_again_asks_for_nothing() -> None:
    """The batch is there; whether it could begin now is of no account."""
    async with house(num_parallel=4, settings={"slots": 4}) as h:
        first = await h.run(chats(4, num_predict=3), co_scheduling=REQUIRED, request_id="r")
        await h.fake.go_away()
        again = await h.run(chats(4, num_predict=3), co_scheduling=REQUIRED, request_id="r")
        assert again.batch_id == first.batch_id


# -- Told --------------------------------------------------------------------------------------------------------


async def test_slots_that_a_backend_tells_count_before_anything_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are more than are tried while nothing is known."""
    real = OllamaBackend.loaded

    async def loaded(self: OllamaBackend) -> tuple[LoadedRunner, ...]:
        return tuple(replace(there, slots=12) for there in await real(self))

    monkeypatch.setattr(OllamaBackend, "loaded", loaded)
    async with house(num_parallel=12) as h, httpx.AsyncClient() as guest:
        _ = await guest.post(f"{h.fake.url}/api/generate", json={"model": "fake"})
        assert not (await plan(h, chats(12))).warnings
        assert (await plan(h, chats(13))).warnings
        seen = await h.run(chats(12, num_predict=5), co_scheduling=REQUIRED)
        assert seen.report.groups[0].first_wave.item_count == 12
