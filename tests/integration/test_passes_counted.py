"""The passes that a report counts, beside those that the stand-in made, whatever happens to the items."""

from __future__ import annotations

import pytest

from tests.fakes.ollama import Fault, FaultKind
from tests.fakes.ollama.answers import Answer
from tests.integration.service import House, Seen, chat, chats, house, is_load, reason_of
from unisono._generated.unisono.v1 import event_pb2, item_pb2

PASS_S = 0.004


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
