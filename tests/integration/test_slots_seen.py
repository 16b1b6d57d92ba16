"""What a service believes of the slots while others use them, and in which order its items get there."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.fakes.ollama import FakeModel, RequestRecord
from tests.integration.service import LIMIT_S, House, Seen, Stream, chat, chats, config, house
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2

LONG_PROMPT = "word " * 600


async def slots_of(h: House) -> event_pb2.SlotCount:
    """What the service knows of the runner's slots."""
    info = await h.stub.GetServerInfo(pb.GetServerInfoRequest())
    slots = info.backends[0].runners[0].slots
    assert isinstance(slots, event_pb2.SlotCount)
    return slots


# -- The order ---------------------------------------------------------------------------------------------------


async def test_items_start_in_the_plan_s_order() -> None:
    """With slots that are not known, 64 items get theirs in the order that PlanBatch gives."""
    async with house(num_parallel=4, pass_s=0.001) as h:
        items = [chat(f"i{n}", f"Question {n}", num_predict=4 + 7 * n % 30) for n in range(64)]
        plan = await h.stub.PlanBatch(pb.PlanBatchRequest(config=config(), items=items))
        planned = [item_id for group in plan.groups for item_id in group.item_ids]
        assert sorted(planned) == sorted(item.item_id for item in items)
        seen = await h.run(items)
        assert set(seen.states().values()) == {"COMPLETED"}
        began = sorted(h.work, key=lambda work: work.slot_ns or 0)
        names = {item.chat.messages[0].content: item.item_id for item in items}
        assert [names[work.body["messages"][0]["content"]] for work in began] == planned


# -- How many ----------------------------------------------------------------------------------------------------


async def test_items_that_are_nearly_all_prompt_say_no_wrong_number() -> None:
    """Two tokens after a long prompt, on 8 slots: learned is 8, or nothing but "at least so many"."""
    async with house(num_parallel=8, pass_s=0.001, prefill_token_s=0.00001) as h:
        items = [chat(f"i{n}", f"{n} {LONG_PROMPT}", num_predict=2) for n in range(64)]
        seen = await h.run(items)
        assert set(seen.states().values()) == {"COMPLETED"}
        slots = await slots_of(h)
        assert slots.count in (0, 8)
        assert slots.at_least <= 8


async def test_a_foreign_client_lowers_the_limit_and_not_the_number() -> None:
    """It takes three of four slots and leaves: meanwhile one item runs at a time, afterwards four."""
    async with house(num_parallel=4, pass_s=0.005) as h:
        _ = await h.run(chats(40, num_predict=12))
        learned = await slots_of(h)
        assert (learned.count, learned.source) == (4, event_pb2.SLOT_SOURCE_LEARNED)
        guest = await h.fake.foreign(slots=3)
        h.fake.pass_log.clear()
        seen = await h.run(chats(20, num_predict=12))
        assert set(seen.states().values()) == {"COMPLETED"}
        assert max(len(one.requests) for one in h.fake.pass_log) == 1
        now = await slots_of(h)
        assert (now.count, now.source, now.limit) == (4, event_pb2.SLOT_SOURCE_LEARNED, 1)
        guest.leave()
        h.fake.pass_log.clear()
        _ = await h.run(chats(60, num_predict=12))
        assert max(len(one.requests) for one in h.fake.pass_log) == 4
        assert (await slots_of(h)).count == 4


@pytest.mark.parametrize("speaks", [True, False])
async def test_a_guest_that_never_leaves_starves_nobody(*, speaks: bool) -> None:
    """All are answered in what it leaves."""
    async with house(num_parallel=2, pass_s=0.001, settings={"slots": 2}) as h:
        _ = await h.run(chats(2, num_predict=2))
        guest = await h.fake.foreign(slots=1, speaks=speaks)
        seen = await h.run(chats(12, num_predict=8))
        assert set(seen.states().values()) == {"COMPLETED"}
        guest.leave()


# -- Somebody else's reload --------------------------------------------------------------------------------------


async def test_a_foreign_reload_between_two_items_costs_one_load_back() -> None:
    """Somebody asks for the model with another context, and gets it when no item of ours is there."""
    async with house(num_parallel=4, load_s=0.05, pass_s=0.002, settings={"slots": 4}) as h:
        call = h.run_batch(chats(12, num_predict=10), co_scheduling=pb.CO_SCHEDULING_TOGETHER)
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        async with asyncio.timeout(10):
            await h.fake.foreign_reload(num_ctx=2048)
        seen = await call.to_end()
        assert set(seen.states().values()) == {"COMPLETED"}
        assert len(seen.results) == 12
        assert {result.attempts for result in seen.results.values()} == {1}
        assert h.fake.loads == 3


async def test_a_foreign_reload_waits_no_longer_than_for_our_batch() -> None:
    """Ollama reloads a model when nobody uses it: after the batch at the latest. The next one takes what is there."""
    async with house(num_parallel=4, load_s=0.05, pass_s=0.002, settings={"slots": 4}) as h:
        call = h.run_batch(chats(24, num_predict=10))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
        guest = asyncio.create_task(h.fake.foreign_reload(num_ctx=2048))
        assert len((await call.to_end()).results) == 24
        async with asyncio.timeout(10):
            await guest
        seen = await h.run(chats(8, num_predict=4))
        assert set(seen.states().values()) == {"COMPLETED"}
        assert h.fake.loads == 2


# -- Somebody else's model ---------------------------------------------------------------------------------------

# One of them is in memory at a time.
TWO_MODELS: dict[str, Any] = {
    "models": [FakeModel(name="fake"), FakeModel(name="other")],
    "max_loaded_models": 1,
    "num_parallel": 4,
    "load_s": 0.05,
    "pass_s": 0.002,
    "settings": {"slots": 4},
}


async def ask_for_the_other(h: House) -> None:
    """Another client has a question for the other model, and waits for its answer."""
    body = {"model": "other", "messages": [{"role": "user", "content": "Hello"}], "options": {"num_predict": 20}}
    async with httpx.AsyncClient(base_url=h.fake.url, timeout=LIMIT_S) as client:
        answer = await client.post("/api/chat", json={**body, "stream": False})
    assert answer.status_code == 200
    assert answer.json()["eval_count"] == 20


@dataclass(frozen=True)
class Visit:
    """What the backend saw while somebody else asked for another model."""

    guest: RequestRecord
    # Requests of ours that had a slot when it came; that got one before it, though they came later; and the others.
    beside: list[RequestRecord]
    ahead: list[RequestRecord]
    behind: list[RequestRecord]


def visit_of(h: House) -> Visit:
    """The only one."""
    (guest,) = [one for one in h.work if one.model == "other"]
    assert guest.slot_ns is not None
    visit = Visit(guest, [], [], [])
    for one in h.work:
        assert one.slot_ns is not None
        assert one.end_ns is not None
        if one is guest or one.end_ns < guest.headers_ns:
            continue
        began = (one.slot_ns > guest.headers_ns) + (one.slot_ns > guest.slot_ns)
        (visit.beside, visit.ahead, visit.behind)[began].append(one)
    return visit


async def visited(h: House, count: int, co_scheduling: pb.CoScheduling.ValueType) -> Seen:
    """A batch of items of several lengths; somebody asks for the other model while four of them are running."""
    items = [chat(f"i{n}", f"Question {n}", num_predict=30 + 4 * n) for n in range(count)]
    call = h.run_batch(items, co_scheduling=co_scheduling)
    await h.fake.wait_for(
        lambda fake: fake.busy_slots == 4 and fake.pass_log and len(fake.pass_log[-1].decoding) == 4,
        LIMIT_S,
    )
    # It comes between two passes, so that nobody ends while it is on its way.
    h.fake.hold_passes()
    guest = asyncio.create_task(ask_for_the_other(h))
    await h.fake.wait_for(lambda _: any(one.model == "other" for one in h.work), LIMIT_S)
    h.fake.release_passes()
    seen = await call.to_end()
    async with asyncio.timeout(LIMIT_S):
        await guest
    assert len(seen.results) == count
    assert set(seen.states().values()) == {"COMPLETED"}
    assert {result.attempts for result in seen.results.values()} == {1}
    return seen


async def test_a_foreign_model_is_served_after_the_wave_that_runs() -> None:
    """Waves that go together leave the runner idle between them: then Ollama gives somebody else the room.

    So nobody waits longer than for the longest of the items that were running when it came; our next wave waits for
    its answer, and has the model loaded back, once. That is what its items' load durations tell.
    """
    async with house(**TWO_MODELS) as h:
        seen = await visited(h, 12, pb.CO_SCHEDULING_TOGETHER)
        visit = visit_of(h)
        assert (len(visit.beside), len(visit.ahead), len(visit.behind)) == (4, 0, 8)
        # Ours, the other, and ours back.
        assert h.fake.loads == 3
        assert h.loads == ["fake:latest"]
        back = sorted(seen.results.values(), key=lambda result: result.timings.load.ToNanoseconds())[-4:]
        assert all(result.timings.load.ToNanoseconds() >= TWO_MODELS["load_s"] * 1e9 for result in back)
        # Nothing more to load: the model is ours again.
        assert set((await h.run(chats(8, num_predict=4))).states().values()) == {"COMPLETED"}
        assert h.fake.loads == 3


async def test_a_foreign_model_waits_no_longer_than_for_our_batch() -> None:
    """Slots that are filled again at once are never all free; who wants the loaded model overtakes who wants another.

    From outside nothing shows that somebody waits. So it is served when the batch has nothing more for the runner:
    after all that it had when the guest came, and never in the middle. Our next batch costs one load back.
    """
    async with house(**TWO_MODELS) as h:
        _ = await visited(h, 24, pb.CO_SCHEDULING_UNSPECIFIED)
        visit = visit_of(h)
        assert (len(visit.beside), len(visit.ahead), len(visit.behind)) == (4, 20, 0)
        assert h.fake.loads == 2
        # With what it knew a moment ago, our next batch sends a wave without a load before it: one of its own loads.
        seen = await h.run(chats(8, num_predict=4))
        assert len(seen.results) == 8
        assert set(seen.states().values()) == {"COMPLETED"}
        assert {result.attempts for result in seen.results.values()} == {1}
        assert h.fake.loads == 3


# After 300 ms of work without a pause, others get a moment.
YIELDING: dict[str, Any] = {**TWO_MODELS, "settings": {"slots": 4, "yield_every": "300ms"}}


async def test_a_foreign_model_is_not_kept_away_by_a_batch_without_end() -> None:
    """A stream that always has a next item: the guest is served in the next pause, and not when the stream ends."""
    async with house(**YIELDING) as h:
        stream = h.stream()
        _ = await stream.open()
        count = 8

        def is_short(one: Stream) -> bool:
            return len(one.seen.results) >= count - 8

        _ = await stream.add(*(chat(f"i{n}", num_predict=20) for n in range(8)))
        _ = await stream.release()
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4, LIMIT_S)
        guest = asyncio.create_task(ask_for_the_other(h))
        # Ten pauses; an item takes 0.04 s, a load 0.05 s.
        async with asyncio.timeout(3.0):
            while not guest.done():
                _ = await stream.add(*(chat(f"i{count + n}", num_predict=20) for n in range(8)))
                _ = await stream.release()
                count += 8
                _ = await stream.until(is_short)
        await guest
        _ = await stream.half_close()
        seen = await stream.to_end()
        assert set(seen.states().values()) == {"COMPLETED"}
        assert len(seen.results) == count
        assert {result.attempts for result in seen.results.values()} == {1}
        # Ours, the other, and ours back: by a load before the items, who find it there.
        assert (h.fake.loads, seen.report.groups[0].loads) == (3, 2)
        assert max(result.timings.load.ToNanoseconds() for result in seen.results.values()) < 0.05e9


async def test_pauses_cost_no_load_where_nobody_waits() -> None:
    """The runner is still there; the report has the pauses, and no load but the first."""
    async with house(**YIELDING) as h:
        seen = await h.run(chats(400, num_predict=10))
        assert set(seen.states().values()) == {"COMPLETED"}
        assert {result.attempts for result in seen.results.values()} == {1}
        (group,) = seen.report.groups
        assert (h.fake.loads, group.loads) == (1, 1)
        assert len(h.loads) > 1
        idle = {one.reason: one.slot_time.ToNanoseconds() / 1e9 for one in group.idle}
        assert idle[event_pb2.IDLE_REASON_YIELD] >= 4 * 0.05


async def test_the_report_has_the_loads_after_a_foreign_model() -> None:
    """Ours at the beginning and ours back, and how long the second took."""
    async with house(**YIELDING) as h:
        call = h.run_batch(chats(400, num_predict=10))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4, LIMIT_S)
        await ask_for_the_other(h)
        seen = await call.to_end()
        assert set(seen.states().values()) == {"COMPLETED"}
        (group,) = seen.report.groups
        assert (h.fake.loads, group.loads) == (3, 2)


async def test_no_pauses_where_none_are_wanted() -> None:
    """Then somebody else's model waits for the end of the batch."""
    async with house(**{**TWO_MODELS, "settings": {"slots": 4, "yield_every": 0.0}}) as h:
        call = h.run_batch(chats(200, num_predict=10))
        await h.fake.wait_for(lambda fake: fake.busy_slots == 4, LIMIT_S)
        await ask_for_the_other(h)
        (group,) = (await call.to_end()).report.groups
        assert (h.fake.loads, group.loads) == (2, 1)
        assert visit_of(h).behind == []
        assert event_pb2.IDLE_REASON_YIELD not in {one.reason for one in group.idle}
