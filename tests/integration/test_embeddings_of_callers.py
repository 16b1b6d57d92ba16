"""Embeddings of single callers through the real port: gathered into one request, each with its own fate."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from tests.fakes.ollama import Fault, FaultKind
from tests.fakes.ollama.embeddings import vector
from tests.integration.service import House, Reading, Seen, embed, house, is_load, reason_of, span
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb

# A window in which all are caught who come at one time, and that none of them takes for a standstill.
WIDE = {"batch_timeout": 1.0}
# More than the 2,048 tokens of context that the model has.
TOO_LONG = "word " * 3000


def sizes(h: House) -> list[int]:
    """How many texts each request had that the backend got whole, in their order; loads left out."""
    return [len(request.body["input"]) for request in h.work]


def calls(h: House, count: int, start: int = 0, **fields: Any) -> list[Reading]:
    """So many callers, each with one text."""
    return [h.infer(embed("", f"text number {n}"), **fields) for n in range(start, start + count)]


def is_right(seen: Seen, text: str) -> bool:
    """Whether a caller has the vector of his own text."""
    (result,) = seen.results.values()
    (got,) = result.completion.embeddings
    return list(got.values) == pytest.approx(json.loads(vector(text, 64, 64)), rel=1e-5)


async def all_of(readings: list[Reading]) -> list[Seen]:
    """What all of them see, to the end."""
    return list(await asyncio.gather(*(reading.to_end() for reading in readings)))


async def behind_one(h: House) -> Reading:
    """A caller's text that is being computed, and is held there."""
    _ = await h.run([embed("warm", "x")])
    h.fake.hold_passes()
    first = h.infer(embed("", "text number 0"))
    await h.fake.wait_for(lambda fake: fake.busy_slots == 1)
    return first


async def taken(readings: list[Reading]) -> list[str]:
    """They are gathered, and the window has had the time to close; their batches."""
    ids = []
    for reading in readings:
        ids.append((await reading.until("accepted")).batch_id)
        _ = await reading.until("group_planned")
    await asyncio.sleep(2 * WIDE["batch_timeout"])
    return ids


async def test_they_go_as_one_request() -> None:
    """The first goes at once; those who come while it is computed share a request, and each gets his own vector."""
    async with house(settings=WIDE) as h:
        first = await behind_one(h)
        others = calls(h, 30, 1)
        _ = await taken(others)
        h.fake.release_passes()
        seen = await all_of([first, *others])
        assert sizes(h) == [1, 1, 30]
        assert all(is_right(one, f"text number {n}") for n, one in enumerate(seen))
        released = [one.of("released")[0] for one in seen]
        assert [(event.item_count, event.others) for event in released] == [(1, 0)] + [(1, 29)] * 30
        used = [one.report.prompt_tokens for one in seen]
        assert sum(used) == sum(request.prompt_tokens for request in h.work[1:])
        assert {(result.attempts, result.disturbed) for one in seen for result in one.results.values()} == {(1, 0)}


async def test_nobody_waits_for_company_that_need_not() -> None:
    """One by one on an idle runner, each goes at once, however long the window is."""
    async with house(settings={"batch_timeout": 30}) as h:
        for number in range(3):
            async with asyncio.timeout(5):
                _ = await all_of(calls(h, 1, number))
        assert sizes(h) == [1, 1, 1]


async def test_they_go_when_the_one_before_has_ended_or_the_size_is_reached() -> None:
    """Before the window closes by time."""
    async with house(settings={"batch_timeout": 30, "batch_size": 5}) as h:
        first = await behind_one(h)
        five = [h.infer(embed("", "text number 1", "and", "three", "more", "texts"))]
        _ = await taken(five)
        assert sizes(h) == [1, 1, 5]
        two = calls(h, 2, 6)
        _ = await taken(two)
        assert len(h.work) == 3
        h.fake.release_passes()
        async with asyncio.timeout(5):
            _ = await all_of([first, *five, *two])
        assert sizes(h) == [1, 1, 5, 2]


@pytest.mark.parametrize("off", [{"batch_enabled": False}, {"batch_timeout": 0}])
async def test_without_a_window_each_has_his_own_request(off: dict[str, Any]) -> None:
    """Nobody is gathered."""
    async with house(settings=off) as h:
        first = await behind_one(h)
        others = calls(h, 4, 1)
        _ = await taken(others)
        h.fake.release_passes()
        _ = await all_of([first, *others])
        assert sizes(h) == [1] * 6


async def test_only_those_share_who_are_alike() -> None:
    """Another length of vector, another limit or another share of the slots is another request."""
    async with house(settings=WIDE) as h:
        first = await behind_one(h)
        short = [h.infer(embed("", f"text number {n}")) for n in range(2)]
        item = embed("", "text number 9")
        item.embed.dimensions = 8
        other = [
            h.infer(item),
            *calls(h, 2, item_timeout=span(7)),
            *calls(h, 2, weight=3),
            *calls(h, 2, co_scheduling=pb.CO_SCHEDULING_TOGETHER),
            *calls(h, 2, items_per_second=100.0),
        ]
        _ = await taken([*short, *other])
        h.fake.release_passes()
        seen = await all_of([first, *short, *other])
        assert {state for one in seen for state in one.states().values()} == {"COMPLETED"}
        # Of those with limits or shares of their own, the first need not wait for anybody.
        assert sorted(sizes(h)[2:]) == [1] * 9 + [2]


async def test_what_is_not_loaded_is_loaded_once_and_all_are_told() -> None:
    """Also those who came while it was being loaded."""
    async with house() as h:
        h.fake.hold_loads()
        first = calls(h, 1)
        await h.fake.wait_for(lambda fake: fake.loading)
        others = calls(h, 8, 1)
        _ = await taken(others)
        h.fake.release_loads()
        seen = await all_of([*first, *others])
        assert sizes(h) == [1, 8]
        assert all(one.of("loading") and one.report.groups[0].loads == 1 for one in seen)


# -- One caller's fate is his own ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_sent", [True, False], ids=["sent", "gathered"])
async def test_one_who_leaves_costs_nobody_anything(*, is_sent: bool) -> None:
    """Cancelled or hung up, while they are gathered or when their request waits at the backend."""
    async with house(settings=WIDE if is_sent else {"batch_timeout": 30}) as h:
        first = await behind_one(h)
        others = calls(h, 6, 1)
        ids = await taken(others)
        assert len(h.work) == (3 if is_sent else 2)
        assert await h.cancel(ids[0]) == (1, 0)
        await others[5].lose()
        assert (await others[0].to_end()).states() == {"0": "CANCELLED"}
        await h.until_running(5)
        h.fake.release_passes()
        seen = await all_of([first, *others[1:5]])
        assert all(is_right(one, f"text number {n}") for n, one in zip((0, 2, 3, 4, 5), seen, strict=True))
        assert {one.results["0"].attempts for one in seen} == {1}
        assert sizes(h) == [1, 1, 6 if is_sent else 4]


async def test_all_who_are_gathered_may_leave() -> None:
    """Nothing is sent for them, and whoever comes next is served."""
    async with house(settings={"batch_timeout": 30}) as h:
        first = await behind_one(h)
        others = calls(h, 3, 1)
        for batch_id in await taken(others):
            assert await h.cancel(batch_id) == (1, 0)
        h.fake.release_passes()
        assert {one.states()["0"] for one in await all_of(others)} == {"CANCELLED"}
        (last,) = await all_of(calls(h, 1, 7))
        assert is_right(last, "text number 7")
        assert is_right(await first.to_end(), "text number 0")
        assert sizes(h) == [1, 1, 1]


@pytest.mark.parametrize(
    ("limit", "reason"),
    [({"queue_timeout": span(1)}, "QUEUE_TIMEOUT"), ({"batch_deadline": span(1)}, "BATCH_DEADLINE")],
    ids=["queue", "batch"],
)
@pytest.mark.parametrize("is_sent", [True, False], ids=["sent", "gathered"])
async def test_each_keeps_his_own_limits(limit: dict[str, Any], reason: str, *, is_sent: bool) -> None:
    """One who waits no longer than a moment expires; those beside him have their answer."""
    async with house(settings=WIDE if is_sent else {"batch_timeout": 30}) as h:
        first = await behind_one(h)
        others = calls(h, 3, 1)
        hasty = h.infer(embed("", "text number 9"), **limit)
        seen = await hasty.to_end()
        assert (seen.states(), reason_of(seen.results["0"])) == ({"0": "EXPIRED"}, reason)
        h.fake.release_passes()
        assert {one.states()["0"] for one in await all_of([first, *others])} == {"COMPLETED"}
        assert sizes(h) == [1, 1, 4 if is_sent else 3]


async def test_one_text_at_fault_fails_its_caller_alone() -> None:
    """The request is divided until it stands alone."""
    async with house(settings=WIDE) as h:
        first = await behind_one(h)
        others = [*calls(h, 4, 1), h.infer(embed("", TOO_LONG)), *calls(h, 3, 5)]
        _ = await taken(others)
        h.fake.release_passes()
        seen = await all_of([first, *others])
        bad = seen.pop(5)
        assert reason_of(bad.results["0"]) == "PROMPT_TOO_LONG"
        assert all(is_right(one, f"text number {n}") for n, one in enumerate(seen))
        assert {one.results["0"].attempts for one in seen} == {1}


def has_curse(body: dict[str, Any]) -> bool:
    """A text that the backend fails at."""
    return "cursed" in (body.get("input") or ())


async def test_one_that_is_tried_again_holds_nobody_up() -> None:
    """While it waits for its next attempt, those who come are served."""
    async with house() as h:
        _ = await h.run([embed("warm", "x")])
        armed = h.fake.faults.add(
            Fault(FaultKind.ANSWER, path="/api/embed", when=has_curse, status=500, body={"error": "odd"}, times=None)
        )
        cursed = asyncio.create_task(h.infer(embed("", "cursed"), max_attempts=10).to_end())
        await h.fake.wait_for(lambda _: armed.hits > 1)
        assert is_right((await all_of(calls(h, 1)))[0], "text number 0")
        assert not cursed.done()
        cursed.cancel()


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_lost_whatever_happens(seed: int) -> None:
    """Texts too long, a failing backend, callers that leave at any moment: each call ends, and rightly."""
    chance = random.Random(seed)
    async with house() as h:
        for _ in range(chance.randrange(3)):
            kind = chance.choice([FaultKind.ANSWER, FaultKind.CLOSE, FaultKind.KILL_RUNNER])
            _ = h.fake.faults.add(
                Fault(kind, path="/api/embed", when=lambda b: not is_load(b), nth=chance.randrange(1, 6))
            )
        bad = set(chance.sample(range(60), chance.randrange(3)))

        async def ask(number: int) -> None:
            await asyncio.sleep(chance.random() * 0.1)
            text = TOO_LONG if number in bad else f"text {number}"
            reading = h.infer(embed("", text), max_attempts=5)
            if chance.random() < 0.2:
                await asyncio.sleep(chance.random() * 0.05)
                await reading.lose()
                return
            seen = await reading.to_end()
            assert seen.states() == {"0": "FAILED" if number in bad else "COMPLETED"}
            assert number in bad or is_right(seen, text)

        _ = await asyncio.gather(*(ask(number) for number in range(60)))
        assert len(h.work) < 60 + 20


async def test_a_service_that_stops_ends_those_who_are_gathered() -> None:
    """Nobody hangs."""
    async with house(settings={"batch_timeout": 30}) as h:
        first = await behind_one(h)
        others = calls(h, 3, 1)
        _ = await taken(others)
        await h.batches.close(drain_s=0.0)
        seen = await all_of([first, *others])
        assert {state for one in seen for state in one.states().values()} == {"CANCELLED"}
        assert sizes(h) == [1, 1]
