"""Embeddings through the real port: many items in one request, and what becomes of them when it fails."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from tests.fakes.ollama import Fault, FaultKind
from tests.fakes.ollama.embeddings import vector
from tests.fakes.otlp import OtlpReceiver
from tests.integration.service import House, Seen, chat, embed, house, is_load, reason_of, span
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import event_pb2, item_pb2
from unisono.app.group_run import GroupRun
from unisono.core.commands import End

# A stream's items go when they are released, and not before.
NEVER_BY_TIME = pb.ReleasePolicy(interval=span(0))
# More than the 2,048 tokens of context that the model has.
TOO_LONG = "word " * 3000


def embeds(count: int, start: int = 0) -> list[item_pb2.Item]:
    """Items named e0, e1 and so on, of one text each."""
    return [embed(f"e{n}", f"text number {n}") for n in range(start, start + count)]


def sizes(h: House) -> list[int]:
    """How many texts each request had that the backend got whole, the largest first; loads left out."""
    return sorted((len(request.body["input"]) for request in h.work), reverse=True)


def cursed(h: House, word: str = "cursed", *, kind: FaultKind = FaultKind.ANSWER, **fields: Any) -> Fault:
    """A text that ends each request that holds it."""
    has_it = lambda body: any(word in text for text in body.get("input") or ())  # noqa: E731
    return h.fake.faults.add(Fault(kind, path="/api/embed", when=has_it, **{"times": None, **fields}))


def trouble(h: House, **fields: Any) -> Fault:
    """Something that goes wrong with a request for embeddings, whatever its texts."""
    fault = Fault(fields.pop("kind", FaultKind.ANSWER), path="/api/embed", when=lambda b: not is_load(b), **fields)
    return h.fake.faults.add(fault)


def is_right(seen: Seen, item: item_pb2.Item, size: int = 64) -> bool:
    """Whether an item has the vectors of its own texts, in their order."""
    got = [list(one.values) for one in seen.results[item.item_id].completion.embeddings]
    return got == [pytest.approx(json.loads(vector(text, 64, size)), rel=1e-5) for text in item.embed.input]


def only_one_failed(seen: Seen, items: list[item_pb2.Item], reason: str, bad: str = "bad") -> None:
    """One has no answer, for its own reason; all others have theirs, and were charged one attempt."""
    assert {name for name, state in seen.states().items() if state != "COMPLETED"} == {bad}
    assert reason_of(seen.results[bad]) == reason
    assert len(seen.results) == len(items)
    for item in items:
        if item.item_id != bad:
            assert is_right(seen, item)
            assert seen.results[item.item_id].attempts == 1
    counts = seen.report.counts
    assert (counts.accepted, counts.completed, counts.failed) == (len(items), len(items) - 1, 1)
    assert seen.summary.state == event_pb2.BATCH_STATE_COMPLETED


# -- Together --------------------------------------------------------------------------------------------------


async def test_many_items_go_in_few_requests() -> None:
    """500 items are two requests; each gets the vector of its own text, and tokens and counts add up."""
    async with house() as h:
        items = embeds(500)
        seen = await h.run(items)
        assert sizes(h) == [256, 244]
        assert all(is_right(seen, item) for item in items)
        # A text of three words, between a beginning and an end; 500 of them.
        used = sum(result.usage.prompt_tokens for result in seen.results.values())
        assert used == seen.report.prompt_tokens == sum(request.prompt_tokens for request in h.work) > 500
        assert (seen.report.counts.completed, seen.report.retries) == (500, 0)
        (group,) = seen.report.groups
        assert group.group.item_count == 500
        assert group.waves <= 2
        assert not group.HasField("context_used")
        assert sum(released.item_count for released in seen.of("released")) <= 500
        assert {(one.attempts, one.disturbed) for one in seen.results.values()} == {(1, 0)}
        # One at a time, the answer is the same.
        for item in (items[0], items[255], items[256], items[499]):
            alone = await h.run([item])
            assert alone.results[item.item_id].completion == seen.results[item.item_id].completion


async def test_items_of_several_texts_stay_whole() -> None:
    """Each gets its own texts' vectors in its own order; a large item goes alone; other models are not concerned."""
    async with house() as h:
        texts = [f"t{n}" for n in range(600)]
        items = [embed("a", "x", "y", "x"), embed("large", *texts), embed("b", "z"), embed("c", "", "y")]
        seen = await h.run([*items, chat("chat")])
        assert all(is_right(seen, item) for item in items)
        assert seen.states()["chat"] == "COMPLETED"
        bundles = [request.body["input"] for request in h.work if request.path == "/api/embed"]
        assert sorted(bundles) == [texts, ["x", "y", "x"], ["z", "", "y"]]


async def test_dimensions() -> None:
    """Items that want vectors of other lengths go in requests of their own."""
    async with house() as h:
        items = embeds(40)
        for item in items[::2]:
            item.embed.dimensions = 8
        seen = await h.run(items)
        assert all(is_right(seen, item, item.embed.dimensions or 64) for item in items)
        assert {len(seen.results["e0"].completion.embeddings[0].values), len(h.work)} == {8, 2}


@pytest.mark.parametrize(
    "fields", [{"max_concurrency": 1}, {"co_scheduling": pb.CO_SCHEDULING_TOGETHER}], ids=["one", "together"]
)
async def test_a_bundle_counts_as_one(fields: dict[str, Any]) -> None:
    """One request at a time, or in waves: each of them is a bundle."""
    async with house() as h:
        items = embeds(300)
        seen = await h.run(items, **fields)
        assert all(is_right(seen, item) for item in items)
        assert sizes(h) == [256, 44]


async def test_a_rate_is_one_of_items() -> None:
    """items_per_second is asked for so that the backend gets no more: nothing is put together."""
    async with house() as h:
        items = embeds(5)
        seen = await h.run(items, items_per_second=50.0)
        assert all(is_right(seen, item) for item in items)
        assert sizes(h) == [1] * 5


async def test_a_stream_bundles_what_is_released_together() -> None:
    """Each release makes bundles of its own."""
    async with house() as h:
        stream = await h.stream().open(model="fake-embed", release=NEVER_BY_TIME)
        first, second = embeds(3), embeds(4, 3)
        for items in (first, second):
            _ = await stream.add(*items)
            _ = await stream.release()
        seen = await (await stream.half_close()).to_end()
        assert all(is_right(seen, item) for item in (*first, *second))
        assert sizes(h) == [4, 3]


async def test_the_request_is_part_of_the_first_one_s_trace(
    otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' spans say that they went along: in a bundle of so many; and whom it was divided for."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    async with house() as h:
        _ = await h.run([*embeds(2), embed("bad", TOO_LONG)])
        sent = [(len(request.body["input"]), request.headers["traceparent"].split("-")[2]) for request in h.work]
    spans = await asyncio.to_thread(otlp.wait_for, lambda spans: any(not span.parent_id for span in spans))
    of = {str(span.attributes["unisono.item_id"]): span for span in spans if span.name.startswith("embeddings")}
    first, last = of["e0"].span_id, of["bad"].span_id
    assert sorted(sent) == [(1, last), (2, first), (3, first)]
    assert [of[name].attributes.get("unisono.bundle_size") for name in ("e0", "e1", "bad")] == [2, 2, None]
    assert [event.name for event in of["e1"].events] == ["released", "broken_off", "released"]
    assert of["e1"].attributes["unisono.disturbed"] == 1


# -- One text is at fault --------------------------------------------------------------------------------------


async def test_one_text_too_long_fails_its_item_alone() -> None:
    """The request is divided until the item stands alone; nobody else is charged."""
    async with house() as h:
        items = embeds(100)
        items[37] = embed("bad", "short", TOO_LONG)
        seen = await h.run(items)
        only_one_failed(seen, items, "PROMPT_TOO_LONG")
        # 100, 50, 25, 13, 7, 4, 2, 1: two more requests for each.
        assert len(h.work) <= 15
        assert seen.report.retries == 0
        # Those in the other half of the first division were in two requests, and the item itself in all.
        assert seen.results["e99"].disturbed == 1
        assert seen.results["bad"].disturbed >= 6


async def test_one_refused_fails_alone() -> None:
    """Whatever the backend has against it; several of them, too."""
    async with house() as h:
        _ = cursed(h, status=400, body={"error": "no such text, please"})
        items = [*embeds(20), embed("bad", "a cursed text"), *embeds(20, 20)]
        only_one_failed(await h.run(items), items, "REFUSED_BY_BACKEND")
        seen = await h.run([embed(f"i{n}", "cursed" if n % 3 else "good") for n in range(12)])
        assert [seen.states()[f"i{n}"] for n in range(12)] == ["FAILED" if n % 3 else "COMPLETED" for n in range(12)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 500, "body": {"error": "failed to encode: NaN or Inf in a vector"}}, "BACKEND_FAILED"),
        ({"kind": FaultKind.KILL_RUNNER}, "RUNNER_DIED"),
        ({"kind": FaultKind.CLOSE}, "CONNECTION_LOST"),
    ],
    ids=["not a number", "killer", "closes"],
)
async def test_one_that_the_backend_fails_at_fails_alone(fault: dict[str, Any], reason: str) -> None:
    """Tried again as a whole first; then its halves, once each; and the one that does it as often as any item."""
    async with house() as h:
        items = [*embeds(5), embed("bad", "a cursed text")]
        armed = cursed(h, **fault)
        seen = await h.run(items, max_attempts=2)
        assert {name for name, state in seen.states().items() if state != "COMPLETED"} == {"bad"}
        assert reason_of(seen.results["bad"]) == reason
        assert all(is_right(seen, item) for item in items[:5])
        # Twice the six, once each 3, 2; twice the one.
        assert armed.hits <= 6
        assert seen.report.counts.completed == 5


# -- The backend is at fault -----------------------------------------------------------------------------------


async def test_a_full_queue_is_tried_again_as_a_whole() -> None:
    """The second of two requests meets a 503, and goes again; its items were sent twice, the others once."""
    async with house() as h:
        items = embeds(300)
        fault = trouble(h, nth=2)
        seen = await h.run(items, max_concurrency=1)
        assert fault.hits == 1
        assert all(is_right(seen, item) for item in items)
        assert sizes(h) == [256, 44, 44]
        assert [seen.results[f"e{n}"].attempts for n in (0, 255, 256, 299)] == [1, 1, 2, 2]
        assert seen.report.retries == 44


async def test_a_queue_that_stays_full_fails_them_all() -> None:
    """It is no text's fault: nothing is divided, and each has used up its attempts."""
    async with house() as h:
        fault = trouble(h, times=None)
        seen = await h.run(embeds(10), max_attempts=2)
        assert fault.hits == 2
        assert {(reason_of(one), one.attempts) for one in seen.results.values()} == {("BACKEND_BUSY", 2)}
        assert (len(seen.results), seen.report.counts.failed) == (10, 10)


async def test_a_full_queue_does_not_end_those_under_suspicion() -> None:
    """While halves are tried, they have one attempt; one that meets a full queue is divided once more."""
    async with house() as h:
        armed = cursed(h, status=500, body={"error": "odd"}, times=2)
        busy = trouble(h, nth=3)
        items = [*embeds(7), embed("odd", "cursed")]
        seen = await h.run(items, max_attempts=2)
        assert (armed.hits, busy.hits) == (2, 1)
        assert all(is_right(seen, item) for item in items)


async def test_mistakes_leave_the_attempts_that_were_used_up() -> None:
    """A busy backend and then a text too long: the halves go on with what attempts are left."""
    async with house() as h:
        _ = trouble(h)
        items = [*embeds(3), embed("bad", TOO_LONG)]
        seen = await h.run(items, max_attempts=2)
        assert {name for name, state in seen.states().items() if state == "FAILED"} == {"bad"}
        assert seen.results["e0"].attempts == 2
        assert seen.results["e0"].disturbed >= 1


@pytest.mark.parametrize("count", [8, 1])
async def test_a_wrong_number_of_vectors_fails_them_all(count: int) -> None:
    """Nobody can say whose they are. After all attempts, and one by one, each has the reason; nothing hangs."""
    async with house() as h:
        fault = trouble(h, status=200, body={"model": "fake-embed", "embeddings": [[1.0]] * 3}, times=None)
        seen = await h.run(embeds(count), max_attempts=2)
        assert {reason_of(result) for result in seen.results.values()} == {"BAD_ANSWER"}
        assert len(seen.results) == count
        # Twice in one request, once in each half of it, and twice each.
        assert fault.hits == (2 + 2 + 4 + 2 * 8 if count == 8 else 2)


async def test_a_model_that_cannot_be_loaded_fails_them_once() -> None:
    """What concerns all of them divides nothing."""
    async with house() as h:
        broken = Fault(
            FaultKind.ANSWER, path="/api/embed", when=is_load, status=500, body={"error": "no space"}, times=None
        )
        _ = h.fake.faults.add(broken)
        seen = await h.run(embeds(20))
        assert {reason_of(result) for result in seen.results.values()} == {"LOAD_FAILED"}
        assert (len(seen.results), broken.hits, len(h.work)) == (20, 3, 0)


# -- Some are ended --------------------------------------------------------------------------------------------


async def test_one_that_is_cancelled_is_told_nothing_more() -> None:
    """The others get their answer from the same request."""
    async with house() as h:
        h.fake.hold_passes()
        items = embeds(10)
        call = h.run_batch(items)
        await h.fake.wait_for(lambda fake: fake.busy_slots == 1)
        batch_id = (await call.until("accepted")).batch_id
        assert await h.cancel(batch_id, "e3", "e0") == (2, 0)
        _ = await call.until("result")
        h.fake.release_passes()
        seen = await call.to_end()
        assert {name for name, state in seen.states().items() if state == "CANCELLED"} == {"e0", "e3"}
        assert all(is_right(seen, item) for item in items if item.item_id not in {"e0", "e3"})
        assert {seen.results[name].attempts for name in ("e0", "e3", "e4")} == {1}
        assert len(h.work) == 1
        assert (seen.report.counts.cancelled, seen.report.counts.completed) == (2, 8)


@pytest.mark.parametrize("count", [1, 6])
async def test_the_text_of_one_that_was_cancelled_harms_nobody(count: int) -> None:
    """It is still in the request, which is refused for it: those who are left, be it one, go again without it."""
    async with house() as h:
        h.fake.hold_loads()
        items = embeds(count)
        call = h.run_batch([embed("bad", TOO_LONG), *items])
        await h.fake.wait_for(lambda fake: fake.loading)
        assert await h.cancel((await call.until("accepted")).batch_id, "bad") == (1, 0)
        h.fake.release_loads()
        seen = await call.to_end()
        assert seen.states() == {"bad": "CANCELLED", **{item.item_id: "COMPLETED" for item in items}}
        assert all(is_right(seen, item) for item in items)
        assert {(one.attempts, one.disturbed) for name, one in seen.results.items() if name != "bad"} == {(1, 1)}


@pytest.mark.parametrize("whole", [True, False], ids=["the batch", "its items"])
async def test_a_request_of_which_nobody_is_left_is_broken_off(*, whole: bool) -> None:
    """Cancelled as a whole, or one after the other: its connection is closed."""
    async with house() as h:
        h.fake.hold_passes()
        call = h.run_batch(embeds(300), max_concurrency=1)
        await h.fake.wait_for(lambda fake: fake.busy_slots == 1)
        batch_id = (await call.until("accepted")).batch_id
        names: list[list[str]] = [[]] if whole else [["e0"], [f"e{n}" for n in range(1, 290)], ["e299"], []]
        for some in names:
            _ = await h.cancel(batch_id, *some)
        seen = await call.to_end()
        assert list(seen.states().values()) == ["CANCELLED"] * 300
        await h.fake.wait_for(lambda fake: fake.open_connections == 0 and fake.busy_slots == 0, 2.0)
        assert seen.summary.state == event_pb2.BATCH_STATE_CANCELLED


async def test_each_keeps_its_own_queue_timeout() -> None:
    """Of two that go together, the one that was there earlier expires earlier."""
    async with house() as h:
        h.fake.hold_passes()
        stream = await h.stream().open(model="fake-embed", release=NEVER_BY_TIME, queue_timeout=span(1.0))
        _ = await (await stream.add(embed("early", "a"))).until_acked(1)
        await asyncio.sleep(0.5)
        _ = await stream.add(embed("late", "b"))
        _ = await stream.release()
        _ = await stream.half_close()
        _ = await stream.until(lambda s: "result early" in s.log)
        assert "result late" not in stream.log
        h.fake.release_passes()
        seen = await stream.to_end()
        assert seen.states() == {"early": "EXPIRED", "late": "COMPLETED"}
        assert reason_of(seen.results["early"]) == "QUEUE_TIMEOUT"
        assert len(h.work) == 1


async def test_all_that_are_late_expire_and_the_request_with_them() -> None:
    """queue_timeout and batch_deadline, for a whole bundle."""
    async with house() as h:
        h.fake.hold_passes()
        for field, reason in (("queue_timeout", "QUEUE_TIMEOUT"), ("batch_deadline", "BATCH_DEADLINE")):
            seen = await h.run(embeds(20), **{field: span(0.4)})
            assert set(seen.states().values()) == {"EXPIRED"}
            assert {reason_of(result) for result in seen.results.values()} == {reason}
            await h.fake.wait_for(lambda fake: fake.open_connections == 0 and fake.busy_slots == 0, 2.0)


async def test_a_defect_at_the_end_of_one_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those behind it in the bundle are told that they have ended."""
    tell = GroupRun.item_ended

    def wrong(run: GroupRun, end: End) -> None:
        tell(run, end)
        raise ZeroDivisionError

    async with house() as h:
        h.expected_defects.add("the end of an item of a bundle")
        monkeypatch.setattr(GroupRun, "item_ended", wrong)
        seen = await h.run(embeds(5))
        assert list(seen.states().values()) == ["COMPLETED"] * 5
        assert len(h.defects) == 5


@pytest.mark.parametrize("seed", range(6))
async def test_nothing_is_lost_whatever_happens(seed: int) -> None:
    """Two batches, texts too long, a failing backend, cancels at any moment: each item ends once, and rightly."""
    chance = random.Random(seed)
    async with house() as h:
        for _ in range(chance.randrange(4)):
            kind = chance.choice([FaultKind.ANSWER, FaultKind.CLOSE, FaultKind.KILL_RUNNER])
            _ = trouble(h, kind=kind, nth=chance.randrange(1, 6))
        bad = {f"e{n}" for n in chance.sample(range(120), chance.randrange(4))}
        items = embeds(120)
        for item in items:
            item.embed.input.extend(["x"] * chance.randrange(4) + [TOO_LONG] * (item.item_id in bad))
        calls = [h.run_batch(items, max_attempts=5), h.run_batch(items, max_attempts=5)]
        ids = [(await call.until("accepted")).batch_id for call in calls]
        for _ in range(chance.randrange(8)):
            await asyncio.sleep(chance.random() * 0.05)
            some = chance.sample([item.item_id for item in items], chance.randrange(1, 60))
            _ = await h.cancel(chance.choice(ids), *some)
        for call in calls:
            seen = await call.to_end()
            states = seen.states()
            assert len(states) == 120
            assert {name for name, state in states.items() if state == "FAILED"} <= bad
            assert set(states.values()) <= {"FAILED", "CANCELLED", "COMPLETED"}
            assert all(is_right(seen, item) for item in items if states[item.item_id] == "COMPLETED")
            assert not bad & {name for name, state in states.items() if state == "COMPLETED"}
            assert seen.report.prompt_tokens == sum(one.usage.prompt_tokens for one in seen.results.values())
