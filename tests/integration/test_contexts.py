"""Items that ask for contexts of different sizes, through the real port."""

from __future__ import annotations

from typing import Any

from tests.integration.service import House, chat, chats, config, house
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import item_pb2


def asking(item_id: str, num_ctx: int | None, **options: Any) -> item_pb2.Item:
    """A conversation that asks for a context, or for none."""
    if num_ctx is not None:
        options["runner"] = item_pb2.RunnerOptions(num_ctx=num_ctx)
    return chat(item_id, num_predict=2, **options)


def sent(h: House) -> list[int | None]:
    """The contexts that the backend was asked for, in the order of the requests."""
    return [request.body.get("options", {}).get("num_ctx") for request in h.work]


MIXED = [asking(f"i{n}", size) for n, size in enumerate([2048, 1024, None, 2048, 512])]


async def test_one_load_for_all() -> None:
    """Whatever items ask for, each request carries the group's context: another value would load the model anew."""
    async with house() as h:
        seen = await h.run(MIXED)
        (planned,) = seen.of("group_planned")
        assert planned.runner.num_ctx == 2048
        assert sent(h) == [2048] * 5
        assert h.loads == ["fake:latest"]


async def test_each_for_itself_where_the_caller_wants_that() -> None:
    """SEPARATE makes a group of each, and a load."""
    async with house() as h:
        seen = await h.run(MIXED, context_policy=pb.CONTEXT_POLICY_SEPARATE)
        assert sorted(planned.runner.num_ctx for planned in seen.of("group_planned")) == [0, 512, 1024, 2048]
        assert len(h.loads) == 4


async def test_a_conflict_is_refused_where_the_caller_wants_that() -> None:
    """REJECT fails each item of the model."""
    async with house() as h:
        seen = await h.run(MIXED, context_policy=pb.CONTEXT_POLICY_REJECT)
        assert len(seen.results) == 5
        assert all("num_ctx" in result.error.message for result in seen.results.values())
        assert h.loads == []


async def test_the_next_batch_takes_what_is_loaded() -> None:
    """What was loaded by default is joined by the same name, also by items that ask for no more than that."""
    async with house() as h:
        await h.run(chats(3, num_predict=2))
        await h.run([asking("a", 1024), asking("b", 4096), asking("c", None)])
        assert set(sent(h)) == {None}
        await h.run([asking("a", 1024), asking("b", 5000)])
        await h.run(chats(2, num_predict=2))
        assert sent(h)[6:] == [5000] * 4


async def test_no_more_than_memory_allows() -> None:
    """With a limit, a larger context is not asked for, and the plan says so."""
    async with house(settings={"memory_limit": 1}) as h:
        answer = await h.stub.PlanBatch(pb.PlanBatchRequest(config=config(), items=[asking("a", 4000)]))
        assert [warning.reason for warning in answer.warnings] == ["CONTEXT_CLAMPED"]


async def test_a_batch_without_an_answer_has_no_figures_of_answers() -> None:
    """Passes were counted, and who shared them; of the context nobody was told."""
    async with house(num_parallel=4, pass_s=0.005, settings={"slots": 4}) as h:
        call = h.run_batch(chats(3, num_predict=2000))
        batch_id = (await call.until("accepted")).batch_id
        await h.fake.wait_for(lambda fake: fake.passes > 20)
        _ = await h.cancel(batch_id)
        (group,) = (await call.to_end()).report.groups
    assert group.passes.count > 5
    assert 2 < group.items_per_pass <= 3
    assert 5 < group.fewest_passes <= group.passes.count
    assert not group.HasField("context_used")


async def test_the_batch_that_loads_the_model_knows_what_the_backend_gave_it() -> None:
    """What it takes cannot be told before the load, where the default is the backend's; the report tells it."""
    async with house(num_parallel=4, settings={"slots": 4}) as h:
        items = chats(4, num_predict=8)
        plan = await h.stub.PlanBatch(pb.PlanBatchRequest(config=config(), items=items))
        assert not plan.groups[0].group.HasField("memory")
        assert "the backend's default" in plan.groups[0].group.context_reason
        cold, warm = [(await h.run(items)).report.groups[0] for _ in range(2)]
    assert (cold.group.loaded, cold.loads, warm.group.loaded) == (False, 1, True)
    assert cold.group.memory.context_length == warm.group.memory.context_length == 4096
    assert cold.group.memory.kv_cache_bytes == warm.group.memory.kv_cache_bytes

    assert cold.context_used > 0


async def test_slots_that_were_seen_count_for_memory() -> None:
    """Where their number is not known, at least so many are: in a plan, and in the events."""
    async with house(num_parallel=8) as h:
        _ = await h.run(chats(8, num_predict=20))
        plan = await h.stub.PlanBatch(pb.PlanBatchRequest(config=config(), items=chats(2)))
        (planned,) = plan.groups
        assert planned.group.slots.at_least == planned.group.memory.slots > 1
        assert planned.group.slots.count == 0
        (group,) = (await h.run(chats(2))).of("group_planned")
        assert group.memory.slots == group.slots.at_least
