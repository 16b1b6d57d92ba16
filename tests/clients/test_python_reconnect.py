"""A connection that is cut at every moment that matters: nothing is lost or doubled, the caller notices nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from tests.clients.line import COUNT, Line, asked, line
from tests.clients.proxy import Proxy
from tests.fakes.ollama import Answer
from tests.integration.service import LIMIT_S, house
from unisono.app.run_batch import RunningBatch
from unisono_client import BatchLostError, Chat, Client, RefusedError, Result, Session, State, UnreachableError
from unisono_client import session as session_module
from unisono_client._generated.unisono.v1 import batch_inference_pb2 as pb


def is_whole(results: list[Result], count: int = COUNT) -> bool:
    """Whether each item has its own answer, once."""
    return sorted((result.place, result.content) for result in results) == [(n, f"answer {n}") for n in range(count)]


async def run(here: Line, count: int = COUNT) -> list[Result]:
    """All results of a batch, through to its report."""
    async with asyncio.timeout(LIMIT_S):
        running = here.client.run(asked(count), model="fake")
        results = [result async for result in running]
    assert running.report is not None
    assert running.report.completed == count
    assert len(here.house.batches._batches) == 1, "a batch was made twice"
    return results


async def accepted(here: Line, session: Session) -> None:
    """Returns when the client knows its batch."""
    async with asyncio.timeout(LIMIT_S):
        while not session.batch_id:
            _ = await here.client.stub.GetServerInfo(pb.GetServerInfoRequest())


def ended(batch: RunningBatch) -> int:
    """Items of the batch that have a result."""
    return batch._figures.ended


MOMENTS: dict[str, Callable[[RunningBatch], bool]] = {
    "before the batch is known to have been accepted": lambda batch: True,
    "between the items and their acknowledgement": lambda batch: batch.accepted_count > 0,
    "among the results": lambda batch: ended(batch) > COUNT // 2,
    "after the half-close": lambda batch: batch.is_input_closed,
    "with the last result and the end": lambda batch: batch.is_over,
}


@pytest.mark.parametrize("is_reset", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_cut_loses_nothing(moment: str, is_reset: bool) -> None:  # noqa: FBT001  # a parameter of the test
    """The connection is reset, or closed in order: each item has one answer all the same, and was computed once."""
    async with line() as here:
        here.proxy.is_reset = is_reset
        here.cut_once(MOMENTS[moment])
        assert is_whole(await run(here))
        assert here.proxy.cuts == 1
        assert len(here.house.work) == COUNT


async def test_a_cut_before_the_service_has_heard_anything() -> None:
    """The first bytes never arrive."""
    async with line() as here:
        here.proxy.cut_when(lambda proxy: proxy.up > 0)
        assert is_whole(await run(here))


async def test_a_cut_between_the_last_result_and_the_end() -> None:
    """All results are there, and the caller says that nothing follows: the end comes over another connection."""
    async with line() as here, here.client.session(model="fake", release={"size": 1}) as session:
        await session.add(*asked(5))
        results: list[Result] = []
        while len(results) < 5:
            results += await session.take()
        here.cut_once(lambda batch: batch.is_input_closed)
        await session.close_input()
        async with asyncio.timeout(LIMIT_S):
            assert await session.take() == []
        assert is_whole(results, 5)
        assert session.report is not None
        assert session.report.completed == 5
        assert here.proxy.cuts == 1


async def test_a_half_close_that_was_lost_is_said_again() -> None:
    """The service has all items, and never hears that there are no more: it is told on the next connection."""
    async with line() as here, here.client.session(model="fake", release={"size": 1}) as session:
        await session.add(*asked(5))
        results = await session.take()
        here.proxy.swallows_up = True
        await session.close_input()
        await asyncio.sleep(0)
        here.proxy.cut()
        async with asyncio.timeout(LIMIT_S):
            results += [result async for result in session]
        assert is_whole(results, 5)


async def test_an_open_session_outlives_its_connections() -> None:
    """Cut while nothing is under way, again and again: more items are taken, and none is refused."""
    async with line() as here, here.client.session(model="fake", release={"size": 1}) as session:
        results: list[Result] = []
        async with asyncio.timeout(LIMIT_S):
            for n, item in enumerate(asked(6)):
                here.proxy.is_reset = n % 2 == 0
                await session.add(item)
                results += await session.take()
                here.proxy.cut()
            await session.close_input()
            results += [result async for result in session]
        assert is_whole(results, 6)


@pytest.mark.parametrize("before", [1, 3])
async def test_a_full_batch_that_was_cut(before: int) -> None:
    """Credit that will never come is not waited for after a cut either: what the batch does not take is told."""
    async with line(max_items=3) as here, here.client.session(model="fake", release={"size": 1}) as session:
        items = [Chat(f"[[tokens={5 * (n + 1)}]]", item_id=f"i{n}") for n in range(5)]
        here.house.fake.hold_passes()
        await session.add(*items[:3])
        results: list[Result] = []
        async with asyncio.timeout(LIMIT_S):
            await here.house.fake.wait_for(lambda fake: fake.busy_slots == 3)
            while sum(request.outcome == "completed" for request in here.house.work) < before:
                await here.house.fake.step()
            while len(results) < before:
                results += await session.take()
            here.proxy.cut()
            here.house.fake.release_passes()
            await session.add(*items[3:])
            await session.close_input()
            results += [result async for result in session]
        assert here.proxy.cuts == 1
        assert sorted(result.item_id for result in results) == [item.item_id for item in items]
        refused = {result.item_id: result.error.reason for result in results if result.error}
        assert refused == {"i3": "BATCH_FULL", "i4": "BATCH_FULL"}


async def test_cuts_anywhere() -> None:
    """Connections that break after any number of bytes, one after the other, in both directions: nothing is lost."""
    chance = random.Random(7)
    async with line() as here:
        for _ in range(12):
            broken_at = chance.choice([chance.randrange(400), chance.randrange(6_000)])
            before, is_up, many = (here.proxy.up, here.proxy.down), chance.random() < 0.5, 1 + chance.randrange(3)
            first_cut = here.proxy.cuts
            here.proxy.is_reset = chance.random() < 0.5

            def breaks(proxy: Proxy) -> bool:
                passed = proxy.up - before[0] if is_up else proxy.down - before[1]  # noqa: B023  # this turn's
                if passed <= broken_at * (1 + proxy.cuts - first_cut):  # noqa: B023
                    return False
                if proxy.cuts - first_cut + 1 < many:  # noqa: B023
                    _ = asyncio.get_running_loop().call_soon(proxy.cut_when, breaks)
                return True

            here.proxy.cut_when(breaks)
            async with asyncio.timeout(LIMIT_S):
                several = [
                    Chat(item.messages, item_id=item.item_id, n=2 if n % 7 == 0 else None)
                    for n, item in enumerate(asked())
                ]
                results = [result async for result in here.client.run(several, model="fake")]
            here.proxy.cut_when(lambda proxy: False)
            assert all(result.content == f"answer {result.place}" for result in results)
            assert sorted({result.place for result in results}) == list(range(COUNT))
            assert len(results) == len({result.item_id for result in results}) == COUNT + len(range(0, COUNT, 7))


async def test_what_is_on_its_way_at_a_cut_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full journal forgets nothing that was given to a connection and never arrived: it can be asked for again."""
    monkeypatch.setattr(session_module, "MAX_UNREAD", 5)
    async with line(max_journal_bytes="32MB") as here:
        here.house.fake.answer("big", Answer(content=("y" * 100_000,)))
        async with here.client.session(model="fake") as session:
            await session.add(*(f"big {n}" for n in range(450)))
            await session.close_input()
            count = 0
            async with asyncio.timeout(2 * LIMIT_S):
                async for result in session:
                    count += len(result.content) == 100_000
                    if count == 20:
                        assert here.batch is not None
                        while not here.batch.journal.is_full:
                            _ = await here.client.infer("x", model="fake")
                        here.proxy.cut()
            assert count == 450


async def test_a_large_result_goes_on_in_its_middle() -> None:
    """A result that comes in parts, with the cut between two of them, is put together all the same."""
    async with line() as here:
        text = "".join(f"{n:07d} " for n in range(1_250_000))
        here.house.fake.answer("large", Answer(content=(text,)))
        here.proxy.cut_when(lambda proxy: proxy.down > 6_000_000)
        async with asyncio.timeout(LIMIT_S):
            (result,) = [result async for result in here.client.run(["large"], model="fake")]
        assert result.content == text
        assert here.proxy.cuts == 1


async def test_a_single_request_is_resumed() -> None:
    """Infer: cut before it is known, and in the middle of what it says; no text is told twice."""
    async with line() as here:
        here.proxy.cut_when(lambda proxy: proxy.down > 0)
        assert (await here.client.infer("[[say=one]]", model="fake")).content == "one"
        here.house.fake.pass_s = 0.01
        said = ""
        async with asyncio.timeout(LIMIT_S):
            async for each in here.client.stream("[[tokens=40]]", model="fake", deltas={"flush_interval": 0.01}):
                if isinstance(each, Result):
                    assert each.content == said
                    break
                if not said:
                    here.proxy.cut()
                said += each.content
            else:
                pytest.fail("there was no result")
        assert here.proxy.cuts == 2


async def test_a_service_that_stays_away() -> None:
    """Once the stated time is over, the error says where, how long, and what to do; results that came are good."""
    async with line(give_up_after_s=0.5) as here:
        here.house.fake.hold_passes()
        async with here.client.session(model="fake") as session:
            await session.add(*asked(3))
            await session.close_input()
            await accepted(here, session)
            await here.house.fake.wait_for(lambda fake: fake.busy_slots == 3)
            here.proxy.is_away = True
            here.proxy.cut()
            async with asyncio.timeout(LIMIT_S):
                with pytest.raises(UnreachableError) as caught:
                    _ = await session.take()
        assert here.proxy.target in str(caught.value)
        assert "0.5 s" in str(caught.value)
        assert caught.value.batch_id == session.batch_id
        assert "attach(" in str(caught.value)
        here.house.fake.release_passes()
        here.proxy.is_away = False
        async with asyncio.timeout(LIMIT_S):
            attached = here.client.attach(caught.value.batch_id, after_sequence=caught.value.after_sequence)
            assert {result.item_id async for result in attached} == {"i0", "i1", "i2"}


async def test_a_connection_that_brings_nothing_new_is_none() -> None:
    """One that is taken, and cut each time before it brought anything new, is given up as well."""
    async with line(give_up_after_s=0.5) as here, here.client.session(model="fake", release={"size": 1}) as session:
        await session.add(*asked(1))
        assert len(await session.take()) == 1
        await session.add(Chat(""))

        def breaks(proxy: Proxy) -> bool:
            _ = asyncio.get_running_loop().call_soon(proxy.cut_when, breaks)
            return True

        here.proxy.cut_when(breaks)
        here.proxy.cut()
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(UnreachableError):
                _ = await session.take()
        here.proxy.cut_when(lambda proxy: False)


async def test_nobody_listens() -> None:
    """An address without a service: the error says how to start one."""
    async with Client("127.0.0.1:9", give_up_after_s=0.2) as client:
        with pytest.raises(UnreachableError, match="unisono serve"):
            _ = await client.infer("x")


async def test_a_batch_that_the_service_forgot() -> None:
    """A service that was started anew does not know the batch; the error says so, and what to send again."""
    async with line() as here, house() as successor:
        here.house.fake.hold_passes()
        async with here.client.session(model="fake", release={"size": 1}) as session:
            await session.add(*asked(3))
            await accepted(here, session)
            here.proxy.move_to(successor.target)
            here.proxy.cut()
            async with asyncio.timeout(LIMIT_S):
                with pytest.raises(BatchLostError, match="send what has none again") as caught:
                    _ = await session.take()
            assert caught.value.reason == "BATCH_NOT_FOUND"


async def test_another_stream_takes_the_batch() -> None:
    """A session whose batch another caller reopens ends with STREAM_REPLACED, and does not take it back."""
    async with line() as here:
        async with here.client.session(model="fake", release={"size": 1}) as session:
            await session.add(*asked(1))
            _ = await session.take()
            other = await here.house.stream().reopen(session.batch_id)
            _ = await other.until(lambda stream: stream.seen.events)
            async with asyncio.timeout(LIMIT_S):
                with pytest.raises(RefusedError) as caught:
                    _ = await session.take()
            assert caught.value.reason == "STREAM_REPLACED"
        with pytest.raises(AssertionError):
            _ = await other.until(lambda stream: False)


async def test_leaving_cancels_the_batch() -> None:
    """A caller that breaks off its loop has its batch cancelled at once; one that asked for DETACH has not."""
    async with line() as here:
        for goes_on in (False, True):
            async with here.client.run(
                asked(), model="fake", on_disconnect="DETACH" if goes_on else "CANCEL"
            ) as running:
                async for _ in running:
                    here.house.fake.hold_passes()
                    break
            here.house.fake.release_passes()
            seen = await here.house.attach(running.batch_id)
            assert (set(seen.states().values()) == {"COMPLETED"}) == goes_on
            states = [result.state async for result in here.client.attach(running.batch_id)]
            assert (State.CANCELLED in states) != goes_on
