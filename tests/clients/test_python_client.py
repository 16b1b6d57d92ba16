"""The Python client over a whole service: what is asked, what comes back, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from datetime import timedelta

import pytest

from tests.fakes.ollama import FakeModel
from tests.integration.service import LIMIT_S, house
from unisono_client import (
    Chat,
    Client,
    ClosedError,
    Delta,
    Embed,
    Generate,
    ItemError,
    Message,
    RefusedError,
    Result,
    State,
    Tool,
    UnisonoError,
    batch_benchmark,
    batch_generate,
)
from unisono_client import run as run_module
from unisono_client import session as session_module
from unisono_client._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono_client.config import BatchConfig


async def test_results_come_as_they_finish_or_in_order() -> None:
    """Each item has one result; with `in_order` they come as the items were given, answers of one item together."""
    async with house(settings={"slots": 2}, num_parallel=2) as h, Client(h.target) as client:
        items = [Chat(f"[[tokens={60 if n == 0 else 2}]] {n}", n=2 if n == 3 else None) for n in range(6)]
        names = ["0", "1", "2", "3#1", "3#2", "4", "5"]
        as_finished = [result.item_id async for result in client.run(items, model="fake", max_concurrency=2)]
        assert sorted(as_finished) == names
        run = client.run(items, model="fake", in_order=True)
        assert [result.item_id async for result in run] == names
        assert run.report is not None
        assert (run.report.state, run.report.completed, run.report.error) == ("COMPLETED", 7, None)
        assert run.report.batch_id == run.batch_id
        assert run.report.duration > timedelta()
        assert run.report.passes > 0


async def test_every_kind_of_item_and_answer() -> None:
    """Chat, prompt and embedding, with system, tools, thinking, schema and options, as the backend received them."""
    async with house() as h, Client(h.target) as client:
        weather = Tool("weather", "tells it", {"type": "object", "properties": {"city": {"type": "string"}}})
        items = [
            Chat("[[say=Rome]]", system="Be brief.", options={"num_predict": 9, "num_ctx": 512}, item_id="chat"),
            Chat([{"role": "user", "content": "Hello"}, Message("assistant", "Hi"), Message("user", "[[say=You]]")]),
            Chat('[[tool=weather {"city": "Rome"}]]', tools=[weather], model="fake-tools", item_id="tool"),
            Chat("[[think=Hm]][[say=Yes]]", think=True, model="fake-think", item_id="think"),
            Generate("[[say=done]]", raw=True, item_id="prompt"),
            Embed(["one", "two"], model="fake-embed", item_id="vectors"),
        ]
        results = [
            result async for result in client.run(items, model="fake", options={"temperature": 0.5}, in_order=True)
        ]
        assert [result.error for result in results] == [None] * 6
        chat, talk, tool, think, prompt, vectors = results
        assert (chat.content, chat.finish_reason, chat.state) == ("Rome", "STOP", State.COMPLETED)
        assert (talk.item_id, talk.content, prompt.content) == ("1", "You", "done")
        assert [(call.name, call.arguments) for call in tool.tool_calls] == [("weather", {"city": "Rome"})]
        assert (think.thinking, think.content) == ("Hm", "Yes")
        assert [len(vector) > 0 for vector in vectors.embeddings] == [True, True]
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 2
        assert chat.timings.total is not None
        assert chat.timings.total > timedelta()
        assert chat.attempts == 1
        assert "Rome" in repr(chat)
        (body,) = [request.body for request in h.work if "Be brief." in str(request.body)]
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert (body["options"]["num_predict"], body["options"]["temperature"]) == (9, 0.5)


async def test_what_is_wrong_with_an_item_is_a_value() -> None:
    """A malformed item, an unknown model, an id used twice: each is the result of its item, and the others run."""
    async with house() as h, Client(h.target) as client:
        items = [
            Chat("[[say=good]]", item_id="a"),
            Chat([], item_id="b"),
            Chat("x", model="nosuch", item_id="c"),
            Chat("y", item_id="a"),
            Chat("z", n=65, item_id="d"),
        ]
        good, malformed, unknown, twice, many = [
            result async for result in client.run(items, model="fake", in_order=True)
        ]
        assert good.raise_for_error().content == "good"
        assert malformed.error is not None
        assert (malformed.state, malformed.error.reason) == (State.FAILED, "INVALID_REQUEST")
        assert malformed.error.fields[0].field == "chat.messages"
        assert unknown.error is not None
        assert unknown.error.reason == "MODEL_NOT_FOUND"
        assert twice.error is not None
        assert (twice.state, twice.error.reason, twice.place) == (State.REFUSED, "DUPLICATE_ITEM", 3)
        assert many.error is not None
        assert (many.state, many.error.reason) == (State.FAILED, "INVALID_REQUEST")
        with pytest.raises(ItemError, match="MODEL_NOT_FOUND"):
            _ = unknown.raise_for_error()
        assert not unknown.content


async def test_what_is_wrong_with_a_call_is_an_exception() -> None:
    """Unknown names, types that do not fit, a refusal of the service: raised, with the field where there is one."""
    async with house() as h, Client(h.target) as client:
        with pytest.raises(RefusedError, match="nonsense"):
            _ = client.run([], **BatchConfig(nonsense=1))  # type: ignore[typeddict-unknown-key]
        with pytest.raises(RefusedError, match="tempreature"):
            _ = await client.infer(Chat("x", options={"tempreature": 0}))  # type: ignore[arg-type]
        with pytest.raises(RefusedError, match="role: is 'robot'"):
            _ = [result async for result in client.run([Chat([Message("robot", "x")])], model="fake")]
        with pytest.raises(RefusedError, match="release"):
            _ = client.run([], release={"size": 1})
        with pytest.raises(RefusedError) as caught:
            _ = [result async for result in client.run(["x"], model="fake", max_attempts=99)]
        assert (caught.value.reason, caught.value.code) == ("INVALID_REQUEST", "INVALID_ARGUMENT")
        assert caught.value.fields[0].field == "open.config.max_attempts"
        with pytest.raises(ZeroDivisionError):
            _ = [result async for result in client.run((str(1 // n) for n in (1, 0)), model="fake")]
    with pytest.raises(ClosedError):
        _ = client.run([])


async def test_items_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` takes little more than it can send: an endless source is not asked for all."""
    monkeypatch.setattr(run_module, "AHEAD", 100)
    taken = most_unsent = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"[[say=ok]] {taken}"

    async def slowly() -> AsyncIterator[str]:
        for n in range(3):
            await asyncio.sleep(0.01)
            yield f"[[say={n}]]"

    async with house(settings={"max_open_items": 50}) as h, Client(h.target) as client:
        done = 0
        async with client.run(endless(), model="fake") as run:
            async for _ in run:
                done += 1
                most_unsent = max(most_unsent, run._work.session.unsent)
                if done == 50:
                    break
        assert taken > 50
        assert most_unsent <= 100 + 100
        assert [result.content async for result in client.run(slowly(), model="fake")] == ["0", "1", "2"]


async def test_more_than_a_batch_takes() -> None:
    """What the batch does not take is refused as a value, by the batch's own reason; the rest runs."""
    async with house(settings={"max_items": 30, "max_open_items": 8}) as h, Client(h.target) as client:
        async with asyncio.timeout(LIMIT_S):
            results = [result async for result in client.run((f"[[say=ok]] {n}" for n in range(40)), model="fake")]
        assert sum(result.is_completed for result in results) == 30
        assert {result.error.reason for result in results if result.error} == {"BATCH_FULL"}
        # An item with more answers than there is credit for, too.
        (result,) = [result async for result in client.run([Chat("x", n=20)], model="fake")]
        assert result.error is not None
        assert (result.state, result.error.reason) == (State.REFUSED, "CREDIT_EXCEEDED")


async def test_writing_never_waits_for_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 items are added before the first result is read, with little credit, and few results kept unread."""
    monkeypatch.setattr(session_module, "MAX_UNREAD", 20)
    async with house(settings={"max_open_items": 100}) as h, Client(h.target) as client:
        async with asyncio.timeout(LIMIT_S), client.session(model="fake") as session:
            for n in range(1_000):
                await session.add(f"[[say=ok]] {n}")
            await session.close_input()
            with pytest.raises(ClosedError):
                await session.add("late")
            await h.fake.wait_for(lambda fake: fake.completed > 50)
            # Nothing is read on beyond what may wait here.
            most = 0
            done = 0
            async for result in session:
                most = max(most, len(session._unread))
                done += result.is_completed
        assert done == 1_000
        # The first read gives all that is there at once: that many and one message's worth at most.
        assert most <= 21
        assert session.outstanding == session.unsent == 0


async def test_items_go_when_they_are_released_and_end_when_cancelled() -> None:
    """A session's release, cancel of some and cancel of all, before and after its input was closed."""
    async with house() as h, Client(h.target) as client:
        for closes in (False, True):
            h.fake.hold_passes()
            async with (
                asyncio.timeout(LIMIT_S),
                client.session(model="fake", release={"size": 1_000, "interval": 0}) as session,
            ):
                await session.add(*(Chat(str(n), item_id=f"i{n}") for n in range(4)))
                await session.release()
                await h.fake.wait_for(lambda fake: fake.busy_slots == 4)
                if closes:
                    await session.close_input()
                await session.cancel("i2")
                (result,) = await session.take()
                assert (result.item_id, result.state) == ("i2", State.CANCELLED)
                await session.cancel()
                await session.cancel()
                rest = [result async for result in session]
                assert {result.state for result in rest} == {State.CANCELLED}
                assert session.report is not None
                assert session.report.state == "CANCELLED"
            h.fake.release_passes()


async def test_progress_is_told() -> None:
    """`on_progress` hears of each result: how many there are, and how many there will be."""
    async with house() as h, Client(h.target) as client:
        told: list[tuple[int, int]] = []
        run = client.run([f"[[say=ok]] {n}" for n in range(5)], model="fake", on_progress=lambda *at: told.append(at))
        assert len([result async for result in run]) == 5
        assert told == [(n, 5) for n in range(1, 6)]


async def test_one_answer_and_one_that_streams() -> None:
    """`infer` gives the result; `stream` what it is made of, which joined is the same."""
    async with house(pass_s=0.005) as h, Client(h.target) as client:
        assert (await client.infer("[[say=Rome]]", model="fake")).content == "Rome"
        several: list[Delta | Result] = [
            each async for each in client.stream("[[tokens=20]]", model="fake", deltas={"flush_interval": 0.01})
        ]
        *deltas, result = several
        assert isinstance(result, Result)
        assert len(deltas) > 1
        assert "".join(each.content for each in deltas) == result.content
        assert (await client.infer(Chat("x", model="nosuch"), raise_errors=False)).state is State.FAILED
        with pytest.raises(ItemError, match="MODEL_NOT_FOUND"):
            _ = await client.infer(Chat("x", model="nosuch"))


async def test_a_batch_is_attached_to_and_cancelled_by_its_id() -> None:
    """What one client began, another follows and ends."""
    async with house() as h, Client(h.target) as client, Client(h.target) as other:
        h.fake.hold_passes()
        async with client.session(model="fake", on_disconnect="DETACH", release={"size": 1}) as session:
            await session.add("a", "b")
            await h.fake.wait_for(lambda fake: fake.busy_slots == 2)
            while not session.batch_id:
                _ = await client.stub.GetServerInfo(pb.GetServerInfoRequest())
            assert await other.cancel(session.batch_id, "0") == (1, 0)
            assert await other.cancel(session.batch_id) == (1, 1)
        states = [result.state async for result in other.attach(session.batch_id)]
        assert states == [State.CANCELLED] * 2
        with pytest.raises(UnisonoError, match="BATCH_NOT_FOUND"):
            _ = await other.cancel("batch_none")
        h.fake.release_passes()


async def test_a_shared_beginning_and_the_batchs_own_terms() -> None:
    """shared_context, priority, TOGETHER, spans of time: each reaches the service under its own name."""
    async with house() as h, Client(h.target) as client:
        results = client.run(
            ["[[say=ok]]"],
            model="fake",
            shared_context=[Message("system", "You are brief.")],
            co_scheduling="TOGETHER",
            priority="HIGH",
            weight=2,
            queue_timeout=timedelta(seconds=30),
            item_timeout=20,
            context_policy="HARMONISE",
            keep_alive=60,
        )
        assert [result.content async for result in results] == ["ok"]
        assert h.work[-1].body["messages"][0] == {"role": "system", "content": "You are brief."}
        expired = client.run(["x"], model="fake", batch_deadline=0.05)
        h.fake.hold_passes()
        assert [result.state async for result in expired] == [State.EXPIRED]
        h.fake.release_passes()


async def test_helpers_for_scripts() -> None:
    """batch_generate and batch_benchmark: one call each, answers in order, figures of each model."""
    models = [FakeModel(name="first"), FakeModel(name="second")]
    async with house(models=models, pass_s=0.001) as h:
        told: list[tuple[int, int]] = []
        prompts = [f"[[say=answer {n}]]" for n in range(10)]
        results = await batch_generate(
            prompts,
            model="first",
            system="Be brief.",
            options={"temperature": 0},
            max_concurrent=3,
            target=h.target,
            on_progress=lambda *at: told.append(at),
        )
        assert [result.content for result in results] == [f"answer {n}" for n in range(10)]
        assert told[-1] == (10, 10)
        assert h.work[-1].body["system"] == "Be brief."
        assert await batch_generate([], target=h.target) == []
        found = await batch_benchmark(["first", "second", "none"], prompts, num_runs=2, target=h.target)
        assert [each.model for each in found] == ["first", "second", "none"]
        assert [len(each.runs) for each in found] == [2, 2, 2]
        assert found[0].tokens_per_second > 0
        assert found[0].duration_s > 0
        assert (found[0].sample, found[0].failure) == ("answer 0", "")
        assert (found[2].runs[0].failed, found[2].runs[0].completed, found[2].gain) == (10, 0, None)
        assert "MODEL_NOT_FOUND" in found[2].failure
        with pytest.raises(ValueError, match="at least"):
            _ = await batch_benchmark([], prompts)


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncGenerator[None, None]:
    """A client leaves no task behind."""
    before = asyncio.all_tasks()
    yield
    for _ in range(20):
        await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() - before if "unisono_client" in str(task.get_coro())]
    assert not left
