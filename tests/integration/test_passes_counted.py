"""The passes that a report counts, beside those that the stand-in made, whatever happens to the items."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.ollama import FakeModel, Fault, FaultKind
from tests.fakes.ollama.answers import Answer
from tests.integration.service import House, Seen, chat, chats, house, is_load, reason_of
from unisono._generated.unisono.v1 import event_pb2, item_pb2

PASS_S = 0.004
# Tokens of one draft are told from those of two passes by the pause between passes, which is 2 ms at least.
DRAFTING_PASS_S = 0.008
DRAFTING: dict[str, Any] = {"num_parallel": 4, "settings": {"slots": 4}, "pass_s": DRAFTING_PASS_S}


def near(seen: Seen, passes: int) -> None:
    """What was counted is right within 2 passes, or 2 %."""
    (group,) = seen.report.groups
    assert group.passes.method == event_pb2.PASS_METHOD_CREATED_AT
    assert abs(group.passes.count - passes) <= max(2, 0.02 * passes), (group.passes, passes)


async def warm(h: House) -> None:
    """The model is loaded, and nothing counted yet."""
    _ = await h.run([chat("warm", num_predict=1)])
    h.fake.pass_log.clear()


def speaking_passes(h: House) -> int:
    """Passes in which somebody got a token: by decoding, or by the end of its prompt."""
    return sum(1 for one in h.fake.pass_log if one.requests)


async def test_pieces_of_any_size() -> None:
    """Answers that come byte by byte, and several in one read, are the passes that made them."""
    async with house(num_parallel=4, settings={"slots": 4}, pass_s=PASS_S) as h:
        await warm(h)
        _ = h.fake.faults.add(
            Fault(FaultKind.SLICE, path="/api/chat", when=lambda body: not is_load(body), times=None, piece_bytes=97)
        )
        seen = await h.run(chats(12, num_predict=20))
        assert set(seen.states().values()) == {"COMPLETED"}
        near(seen, speaking_passes(h))


async def test_passes_quicker_than_they_are_read() -> None:
    """A backend that makes several passes while the service looks elsewhere dates each token itself."""
    async with house(num_parallel=4, settings={"slots": 4}) as h:
        await warm(h)
        seen = await h.run(chats(12, num_predict=60))
        near(seen, speaking_passes(h))


@pytest.mark.parametrize("slots", [pytest.param(4, id="slots told"), pytest.param(None, id="slots learned")])
@pytest.mark.parametrize(
    "right", [pytest.param((2,), id="three a pass"), pytest.param((2, 0, 1), id="one to three a pass")]
)
async def test_drafted_tokens_are_of_one_pass(right: tuple[int, ...], slots: int | None) -> None:
    """A draft of two tokens, of which both are right or some: no more passes are counted than were made.

    Where the slots are not told, what a pass gives is taken for no more of them than there are.
    """
    options: dict[str, Any] = {"runner": item_pb2.RunnerOptions(draft_num_predict=2)}
    settings: dict[str, Any] = {} if slots is None else {"slots": slots}
    async with house(
        models=[FakeModel(name="fake", drafts=right)], num_parallel=4, settings=settings, pass_s=DRAFTING_PASS_S
    ) as h:
        _ = await h.run([chat("warm", num_predict=1, **options)])
        h.fake.pass_log.clear()
        tokens = 40
        items = chats(24, num_predict=tokens, **options)
        seen = await h.run(items)
        assert set(seen.states().values()) == {"COMPLETED"}
        assert len(seen.results) == len(items)
        assert {result.usage.completion_tokens for result in seen.results.values()} == {tokens}
        # Far fewer passes than tokens: it did draft.
        assert speaking_passes(h) < 0.7 * len(items) * tokens / 4
        near(seen, speaking_passes(h))
        assert seen.report.groups[0].group.slots.count in (0, 4)


async def test_drafted_tokens_in_pieces_and_a_crash() -> None:
    """What is drafted is counted right too where it comes in pieces, and the runner dies with four in flight."""
    options: dict[str, Any] = {"runner": item_pb2.RunnerOptions(draft_num_predict=2)}
    async with house(
        models=[FakeModel(name="fake", drafts=(2, 1))],
        num_parallel=4,
        settings={"slots": 4},
        pass_s=DRAFTING_PASS_S,
    ) as h:
        _ = await h.run([chat("warm", num_predict=1, **options)])
        h.fake.pass_log.clear()
        for fault in (
            Fault(
                FaultKind.KILL_RUNNER, path="/api/chat", when=lambda body: not is_load(body), nth=2, after_lines=10
            ),
            Fault(FaultKind.SLICE, path="/api/chat", when=lambda body: not is_load(body), times=None, piece_bytes=97),
        ):
            _ = h.fake.faults.add(fault)
        seen = await h.run(chats(12, num_predict=40, **options))
        assert len(seen.results) == 12
        assert set(seen.states().values()) == {"COMPLETED"}
        assert sum(result.disturbed for result in seen.results.values()) >= 4
        near(seen, speaking_passes(h))


async def test_a_tool_call_that_is_silent_until_it_is_whole() -> None:
    """Its tokens are not seen, and it takes part in their passes all the same."""
    async with house(num_parallel=4, settings={"slots": 4}, pass_s=PASS_S) as h:
        h.fake.answer("weather", Answer(tool_calls=(("weather", {"city": "Oslo"}),), tool_tokens=24))
        _ = await h.run([chat("warm", model="fake-tools", num_predict=1)], model="fake-tools")
        h.fake.pass_log.clear()
        tool = item_pb2.Tool(name="weather", description="The weather", parameters_json='{"type":"object"}')
        asking = chat("tool", "What is the weather?")
        asking.chat.tools.append(tool)
        seen = await h.run([asking, *chats(3, num_predict=24)], model="fake-tools")
        assert set(seen.states().values()) == {"COMPLETED"}
        assert seen.results["tool"].completion.tool_calls[0].name == "weather"
        near(seen, speaking_passes(h))


async def test_a_model_that_drafts_by_itself() -> None:
    """draft_num_predict stands in its Modelfile, as with every such model that is pulled: nobody asks for it."""
    model = FakeModel(name="fake", drafts=(2,), options={"draft_num_predict": 2})
    async with house(models=[model], **DRAFTING) as h:
        await warm(h)
        seen = await h.run(chats(12, num_predict=40))
        near(seen, speaking_passes(h))
        assert seen.report.groups[0].passes.confidence == 1


async def test_what_a_pass_costs_where_it_gives_several_tokens() -> None:
    """A pass is timed from one to the next, however many tokens each gives."""
    model = FakeModel(name="fake", drafts=(2,), options={"draft_num_predict": 2})
    async with house(models=[model], **DRAFTING) as h:
        await warm(h)
        found_s = 0.0
        # What was disturbed by a busy machine is not timed: then there is no figure yet.
        for _ in range(5):
            _ = await h.run(chats(1, num_predict=60))
            seen = await h.run(chats(4, num_predict=60))
            costs = seen.report.groups[0].costs
            found_s = (getattr(costs, "pass").ToNanoseconds() + 4 * 3 * costs.token.ToNanoseconds()) / 1e9
            if found_s:
                break
        assert found_s > 0.9 * DRAFTING_PASS_S


async def test_a_model_that_drafts_unknown_to_all() -> None:
    """Where nobody tells, bursts of tokens are taken for passes, and the report says that this is not certain."""
    model = FakeModel(name="fake", drafts=(2,), options={"draft_num_predict": 2})
    async with house(models=[model], **DRAFTING) as h:
        _ = h.fake.faults.add(Fault(FaultKind.ANSWER, path="/api/show", status=500, times=None))
        await warm(h)
        seen = await h.run(chats(12, num_predict=40))
        (group,) = seen.report.groups
        assert group.passes.confidence < 0.6
        assert group.fewest_passes < 2 * speaking_passes(h)


@pytest.mark.parametrize("others", [3, 0])
async def test_a_silent_tool_call_that_is_drafted(others: int) -> None:
    """Its tokens are not seen, and three of them are one pass; alone, nothing tells that, and it is not stated."""
    model = FakeModel(name="fake", drafts=(2,), capabilities=("completion", "tools"))
    options: dict[str, Any] = {"runner": item_pb2.RunnerOptions(draft_num_predict=2)}
    async with house(models=[model], **DRAFTING) as h:
        h.fake.answer("weather", Answer(tool_calls=(("weather", {"city": "Oslo"}),), tool_tokens=24))
        _ = await h.run([chat("warm", num_predict=1, **options)])
        h.fake.pass_log.clear()
        asking = chat("tool", "What is the weather?", **options)
        asking.chat.tools.append(item_pb2.Tool(name="weather", description="W", parameters_json='{"type":"object"}'))
        seen = await h.run([asking, *chats(others, num_predict=24, **options)])
        (group,) = seen.report.groups
        if others:
            near(seen, speaking_passes(h))
            assert abs(seen.results["tool"].passes - 9) <= 1
            assert group.fewest_passes <= group.passes.count
        else:
            assert group.passes.confidence < 0.2
            assert not group.HasField("fewest_passes")
            assert seen.results["tool"].passes == 0


async def test_no_fewer_passes_than_the_fewest() -> None:
    """The fewest passes that could have done are no more than there were, and an item knows its own."""
    options: dict[str, Any] = {"runner": item_pb2.RunnerOptions(draft_num_predict=2)}
    async with house(models=[FakeModel(name="fake", drafts=(2,))], **DRAFTING) as h:
        seen = await h.run(chats(12, num_predict=40, **options))
        (group,) = seen.report.groups
        assert {result.passes for result in seen.results.values()} == {14}
        assert group.fewest_passes == 42
        assert group.fewest_passes <= group.passes.count


async def test_a_cancelled_item_counts_as_far_as_it_came() -> None:
    """Its passes were made too: the bound is below what was made, and nobody had a pass for less than one item."""
    async with house(num_parallel=4, settings={"slots": 4}, pass_s=PASS_S) as h:
        await warm(h)
        call = h.run_batch([*chats(3, num_predict=10), chat("long", num_predict=3000)])
        batch_id = (await call.until("accepted")).batch_id
        await h.fake.wait_for(lambda fake: fake.passes > 60)
        _ = await h.cancel(batch_id, "long")
        seen = await call.to_end()
        (group,) = seen.report.groups
        near(seen, speaking_passes(h))
        long = seen.results["long"].passes
        assert 50 < long <= group.passes.count
        assert group.fewest_passes == long
        assert group.items_per_pass == pytest.approx((long + 30) / group.passes.count)


async def test_endless_repetition_is_told_and_counted() -> None:
    """The item that says one word without end fails by that name, once; the others' passes are counted."""
    async with house(num_parallel=4, settings={"slots": 4}, pass_s=PASS_S) as h:
        await warm(h)
        seen = await h.run([chat("parrot", "[[repeat=ha]]", num_predict=200), *chats(7, num_predict=40)])
        assert len(seen.results) == 8
        assert reason_of(seen.results["parrot"]) == "REPETITION"
        assert seen.results["parrot"].attempts == 1
        assert list(seen.states().values()).count("COMPLETED") == 7
        near(seen, speaking_passes(h))


@pytest.mark.parametrize("after", [3, 10])
async def test_a_crash_with_four_in_flight(after: int) -> None:
    """Each item has one outcome, and the passes before and after the crash are counted."""
    async with house(num_parallel=4, settings={"slots": 4}, pass_s=PASS_S) as h:
        await warm(h)
        _ = h.fake.faults.add(
            Fault(
                FaultKind.KILL_RUNNER, path="/api/chat", when=lambda body: not is_load(body), nth=2, after_lines=after
            )
        )
        seen = await h.run(chats(12, num_predict=20))
        assert len(seen.results) == 12
        assert set(seen.states().values()) == {"COMPLETED"}
        assert sum(result.disturbed for result in seen.results.values()) >= 4
        near(seen, speaking_passes(h))
